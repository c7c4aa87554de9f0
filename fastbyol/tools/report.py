"""report.html of a run: one self-contained file with settings, curves, pictures and results."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fastbyol import __version__
from fastbyol.config import Config
from fastbyol.data import ImageSet, find_images
from fastbyol.data.crops import center_crops
from fastbyol.data.decode import BadImage, decode
from fastbyol.errors import InputError, first_line, printable
from fastbyol.evaluate import TASKS, is_metric, load_checkpoint_model, read_results
from fastbyol.evaluate.features import CENTER_FRACTION, check_splits, extract
from fastbyol.evaluate.knn import nearest
from fastbyol.model import BYOL
from fastbyol.precision import compute_dtype
from fastbyol.runtime.files import check_output, read_json_or
from fastbyol.runtime.runlog import read_metrics
from fastbyol.step import choose_device
from fastbyol.tools.pages import ACCENT, BAD, GOOD, image, section, table, text, write_page
from fastbyol.tools.plots import title, to_png
from fastbyol.tools.preview import draw_views, to_pixels
from fastbyol.train import CHECKPOINTS, CONFIG, ENVIRONMENT, REPORT, SUMMARY

_QUERIES, _NEIGHBORS = 8, 5
_NO_METRICS = {"base_lr", "held_out_top1"}  # of a row: how it came about

_CURVES = (  # kind, key, title, unit
    ("train", "loss", "Loss", ""),
    ("knn", "top1", "Online kNN top-1", "%"),
    ("train", "lr", "Learning rate", ""),
    ("train", "tau", "Target decay tau", ""),
    ("train", "projection_std", "Std of normalized projections", ""),
    ("train", "images_per_s", "Images per second", ""),
    ("train", "wait_share", "Time waiting for data", "%"),
)


def write_report(run: Path, say: Callable[[str], None], *, root: str | None = None) -> Path:
    """Writes RUN/report.html from what the run and its evaluations left in the folder.

    Args:
        root: the data set that the pictures are taken from; by default the run's.

    Returns:
        the file written.

    Raises:
        InputError: the folder holds no run, or no file can be written there.
        RunError: the file could not be written in the end.
    """
    if not run.is_dir():
        raise InputError(f"--run {run}: there is no such folder")
    if root is not None and not os.path.lexists(root):
        raise InputError(f"--root {root}: there is no such data set")
    if run.name == CHECKPOINTS and not (run / CHECKPOINTS).exists():
        raise InputError(f"--run {run}: holds checkpoints; name the run's folder, {run.parent}")
    check_output(run / REPORT, str(run / REPORT))
    path, config, model, _ = load_checkpoint_model(run, say)

    def warn(fault: str) -> None:
        say(f"warning: {fault}")

    lines = read_metrics(run, warn)
    settings = json.dumps(config.to_dict(), indent=2, ensure_ascii=False).splitlines()
    parts = [
        f"<h1>{text(config.name)}</h1><p class=note>BYOL pre-training by fastbyol {__version__}, "
        f"checkpoint {text(path.name)}</p>",
        _summary(run, warn),
        _results(run, warn),
        section("Curves", image(_draw_curves(lines, config))) if lines else "",
        _pictures(config, model, root, say),
        section("Settings", f"<pre>{'<br>'.join(map(text, settings))}</pre>"),
        _environment(run, warn),
    ]
    return write_page(run / REPORT, config.name, parts)


def refresh_report(run_or_file: Path, say: Callable[[str], None], *, root: str | None = None) -> None:
    """Writes the report again after an evaluation, where a whole run was evaluated that has one.

    Args:
        root: the data set of the evaluation, which pictures are taken from where the run's has been moved.
    """
    if not (run_or_file / REPORT).exists():
        return
    data = read_json_or(run_or_file / CONFIG, lambda text: None).get("data")
    own = data.get("root") if isinstance(data, dict) else None
    moved = isinstance(own, str) and not os.path.lexists(own)
    say(f"report: {write_report(run_or_file, say, root=root if moved else None)}")


def _summary(run: Path, warn: Callable[[str], None]) -> str:
    values = read_json_or(run / SUMMARY, warn)
    if not values:
        return ""
    try:
        rows = [("steps", f"{values['steps']} of {values['total_steps']}"), ("time", f"{values['seconds']:.0f} s")]
        if values["images_per_s"] is not None:
            rows.append(("speed", f"{values['images_per_s']:.0f} images/s (median)"))
            rows.append(("waiting for data", f"{values['wait_share']:.1%} of the time (median)"))
            rows.append(("last loss", f"{values['loss']:.3f}"))
        if values["knn_best"] is not None:
            rows.append(("online kNN", f"{values['knn_last']:.1%} at the end, {values['knn_best']:.1%} at best"))
        rows.append(("skipped images", str(len(values["bad_images"]))))
        first = list(values["bad_images"].items())[:50]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        warn(f"{run / SUMMARY}: not what a run writes; it is left out")
        return ""
    bad = "".join(f"<li>{text(name)}: {text(reason)}</li>" for name, reason in first)
    return section("Run", table(rows) + (f"<ul>{bad}</ul>" if bad else ""))


def _results(run: Path, warn: Callable[[str], None]) -> str:
    """A table for each evaluation: one per protocol, data set, checkpoint and settings."""
    tables = [_result(path, result, warn) for path, result in read_results(run, warn)]
    return section("What the features are worth", f"<div class=columns>{''.join(tables)}</div>") if tables else ""


def _result(path: Path, result: dict[str, Any], warn: Callable[[str], None]) -> str:
    protocol = TASKS.get(result["protocol"])
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items() if value not in (None, []))
    names = list(
        dict.fromkeys(key for row in result["rows"].values() for key, value in row.items() if is_metric(value))
    )
    metrics = [key for key in names if key not in _NO_METRICS]
    head = "".join(f"<th>{text(key.replace('_', ' '))}</th>" for key in metrics)
    rows = "".join(
        f"<tr{' class=best' if i == 0 else ''}><td>{text(name)}</td>"
        + "".join(f"<td class=number>{f'{row[key]:.1%}' if is_metric(row.get(key)) else ''}</td>" for key in metrics)
        + _accuracy_bar(row.get(metrics[0]) if metrics else None, baseline=i > 0)
        for i, (name, row) in enumerate(result["rows"].items())
    )
    picture = _picture(path.with_suffix(".png"), warn) if protocol and protocol.draw else ""
    splits = ", ".join(map(str, result.get("splits") or []))
    step = f", step {result['step']}" if "step" in result else ""
    return (
        f"<div><h3>{text(protocol.title if protocol else result['protocol'])}</h3>"
        f"<p class=note>{text(result['root'])}{text(f' ({splits})' if splits else '')}, checkpoint {text(Path(result['checkpoint']).name + step)}</p>"
        f"<table><tr><th>features</th>{head}<th></th></tr>{rows}</table>"
        f"<p class=note>{text(result['train_images'])} training and {text(result['val_images'])} validation images, "
        f"{text(result['classes'])} classes; {text(settings)}</p>"
        f"{picture}</div>"
    )


def _picture(path: Path, warn: Callable[[str], None]) -> str:
    """What an evaluation drew; nothing where it is missing or damaged."""
    if not path.is_file():
        return ""
    try:
        png = path.read_bytes()
        decode(png)
    except (OSError, BadImage) as error:
        warn(f"{path}: {first_line(error)}; it is left out")
        return ""
    return image(png)


def _accuracy_bar(value: Any, *, baseline: bool) -> str:
    width = 200 * min(max(value, 0), 1) if is_metric(value) else 0
    return f"<td><span class='bar{' baseline' if baseline else ''}' style='width:{width:.0f}px'></span></td></tr>"


def _draw_curves(lines: list[dict[str, Any]], config: Config) -> bytes:
    curves = [c for c in _CURVES if any(line["kind"] == c[0] for line in lines)]
    columns = 2
    figure = Figure(figsize=(11, 2.3 * -(-len(curves) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(curves) // columns), columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_visible(False)
    for axis, (kind, key, heading, unit) in zip(axes, curves, strict=False):
        points = [(line["epoch"], line[key]) for line in lines if line["kind"] == kind]
        scale = 100 if unit == "%" else 1
        marker = "o" if len(points) < 40 else None
        axis.plot([x for x, _ in points], [scale * y for _, y in points], color=ACCENT, marker=marker, markersize=3)
        if key == "projection_std":
            spread = config.model.projection_dim**-0.5
            axis.axhline(spread, color=GOOD, linestyle=":", label="evenly spread")
            axis.axhline(config.log.collapse_threshold * spread, color=BAD, linestyle=":", label="collapse warning")
            axis.legend(fontsize=8, frameon=False)
        if key in ("images_per_s", "wait_share", "projection_std"):
            axis.set_ylim(bottom=0)
        axis.set_visible(True)
        axis.set_title(f"{heading}{f' ({unit})' if unit else ''}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        axis.set_xlabel("epoch", fontsize=8)
    return to_png(figure)


def _pictures(config: Config, model: BYOL, root: str | None, say: Callable[[str], None]) -> str:
    """View grid and nearest neighbors; a data set that is gone by now costs the pictures, not the report."""
    parts: list[str] = []
    try:
        train = find_images(config.data, "train", root=root)
        parts.append(section("The two views", image(draw_views(config, train))))
        val = find_images(config.data, "val", root=root)
        check_splits(train, val)
        parts.append(section("Nearest neighbors", _neighbors(config, model, train, val, say)))
    except InputError as error:
        say(f"warning: the report lacks pictures: {error}")
    return "".join(parts)


def _neighbors(config: Config, model: BYOL, train: ImageSet, val: ImageSet, say: Callable[[str], None]) -> str:
    size, device = config.data.image_size_px, choose_device("auto")
    options = {
        "size": size,
        "device": device,
        "dtype": compute_dtype(config.precision, device),
        "threads": config.data.threads,
    }
    backbone = model.online.backbone.to(device=device, memory_format=torch.channels_last)
    bank, queries = train.subsample(config.knn.max_bank_images), val.subsample(_QUERIES)
    found = extract(backbone, bank, **options), extract(backbone, queries, **options)
    similarity, index = nearest(found[0].x, found[1].x, _NEIGHBORS)
    figure = Figure(figsize=(1.45 * (1 + _NEIGHBORS), 1.62 * len(index)), layout="constrained")
    grid = figure.subplots(len(index), 1 + _NEIGHBORS, squeeze=False)
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for images, features in ((bank, found[0]), (queries, found[1])):
        for k, reason in features.bad.items():
            say(printable(f"warning: the report's neighbors lack {images.location(k)}: {reason}"))
    asked, given = _kept(queries, found[1].bad), _kept(bank, found[0].bad)
    for row, (query, axes) in enumerate(zip(asked, grid, strict=True)):
        axes[0].imshow(_thumbnail(queries, query, size))
        axes[0].set_title(title(train.classes[queries.labels[query]]), fontsize=7)
        for k, axis in enumerate(axes[1:]):
            neighbor = given[int(index[row, k])]
            right = bank.labels[neighbor] == queries.labels[query]
            axis.imshow(_thumbnail(bank, neighbor, size))
            axis.add_patch(
                Rectangle(
                    (0, 0), 1, 1, transform=axis.transAxes, fill=False, linewidth=4, edgecolor=GOOD if right else BAD
                )
            )
            axis.set_title(f"{title(bank.classes[bank.labels[neighbor]])} {similarity[row, k]:.2f}", fontsize=7)
    note = "Left: a validation image. Right: its nearest training images by cosine similarity; a green frame is the same class."
    return f"{image(to_png(figure))}<p class=note>{note}</p>"


def _kept(folder: ImageSet, bad: dict[int, str]) -> list[int]:
    """Indices of the images that have features, in the order of the features."""
    return [i for i in range(len(folder)) if i not in bad]


def _thumbnail(folder: ImageSet, index: int, size: int) -> Any:
    one = folder.subset(np.array([index]))
    crops = center_crops(one, size=size, fraction=CENTER_FRACTION, batch_size=1, threads=1, bad={})
    images, _ = next(crops)
    return to_pixels(images[0])


def _environment(run: Path, warn: Callable[[str], None]) -> str:
    facts = read_json_or(run / ENVIRONMENT, warn)
    return section("Environment", table([(key, str(value)) for key, value in facts.items()])) if facts else ""
