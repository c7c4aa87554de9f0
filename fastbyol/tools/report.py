"""report.html of a run: summary, training curves, evaluations and settings on one page."""

from pathlib import Path
from typing import Any

from fastbyol.config import Config
from fastbyol.data import Images, find_images
from fastbyol.data.beton import SUFFIX as BETON
from fastbyol.data.decode import BadImage, decode
from fastbyol.data.folder import is_split_name
from fastbyol.data.storage import may_exist
from fastbyol.errors import InputError, StorageError, first_line
from fastbyol.evaluation.features import check_splits
from fastbyol.evaluation.run import TASKS
from fastbyol.model import BYOL
from fastbyol.runtime.files import check_output, read_json_or
from fastbyol.runtime.logging import logger
from fastbyol.runtime.results import BYOL_ROW, metric_names, read_results
from fastbyol.runtime.run_files import CONFIG, ENVIRONMENT, REPORT, check_run_folder, read_summary
from fastbyol.runtime.run_log import read_metrics
from fastbyol.tools.pages import format_setting, write_page
from fastbyol.tools.preview import draw_views
from fastbyol.tools.report_figures import draw_map, draw_neighbors, draw_run_curves
from fastbyol.tools.result_tables import describe_checkpoint, describe_data, describe_settings, table_head, table_row
from fastbyol.tools.verdict import Measured, judge, measured
from fastbyol.weights.load import load_checkpoint_model

_MAX_SKIPPED_IMAGES = 50
_PICTURES = {"views": "augmented views", "map": "map of the features", "neighbors": "nearest neighbors"}


def write_report(run: Path, *, root: str | None = None) -> Path:
    """Write RUN/report.html from the files of a run and of its evaluations.

    Damaged files are logged as warnings and left out.

    Args:
        run: The run's folder.
        root: The data set that images are drawn from. Default: the run's.

    Returns:
        The path of the report.

    Raises:
        InputError: `run` holds no run, or no file can be written there.
        RunError: Writing the report failed.
    """
    check_run_folder(run, f"--run {run}")
    if root is not None and not may_exist(root):
        raise InputError(f"--root {root}: data set not found")
    check_output(run / REPORT, str(run / REPORT))
    path, config, model, _ = load_checkpoint_model(run)
    metrics = read_metrics(run)
    images = _images(config, model, root)
    found = measured(metrics, config, features=model.num_features)
    return write_page(
        run / REPORT,
        "report",
        name=config.name,
        backbone=config.model.backbone,
        data_set=data_set_name(config.data.root),
        data_root=config.data.root,
        checkpoint=path.name,
        verdict=judge(found, config, classes=images["classes"]),
        summary=_summary(run),
        quality=_quality(found, config),
        curves=draw_run_curves(metrics, config),
        evaluations=[_evaluation(*result) for result in read_results(run)],
        settings=_settings(config),
        environment=read_json_or(run / ENVIRONMENT).items(),
        **images,
    )


def data_set_name(root: str | None) -> str | None:
    """Return a short name of the data set at `root`: its last folder or file that is no split."""
    if root is None:
        return None
    names = [name.removesuffix(BETON) for name in Path(root).parts if name != "/"]
    return next((name for name in reversed(names) if not is_split_name(name)), root)


def refresh_report(run_or_file: Path, *, root: str | None = None) -> None:
    """Update an existing report after an evaluation; do nothing if there is none.

    Args:
        run_or_file: The evaluated run or checkpoint. Only runs have reports.
        root: The data set of the evaluation. Images are drawn from it if the run's has been moved.
    """
    if not (run_or_file / REPORT).exists():
        return
    data = read_json_or(run_or_file / CONFIG, lambda text: None).get("data")
    own_root = data.get("root") if isinstance(data, dict) else None
    moved = isinstance(own_root, str) and not may_exist(own_root)
    none = isinstance(data, dict) and own_root is None
    logger.info(f"report: {write_report(run_or_file, root=root if moved or none else None)}")


def _summary(run: Path) -> dict[str, Any] | None:
    """Return the content of summary.json; None if it is missing or damaged.

    Returns:
        `cards`: (label, value, detail) each. `skipped`: (image, reason) each.
    """
    values = read_summary(run)
    if values is None:
        return None
    skipped = values["bad_images"]
    cards = [
        ("Steps", str(values["steps"]), f"of {values['total_steps']}"),
        ("Time", f"{values['seconds']:.0f} s", ""),
    ]
    if (speed := values.get("images_per_s")) is not None:
        cards.append(("Speed", f"{speed:.0f}", "images/s (median)"))
    if (waiting := values.get("wait_share")) is not None:
        cards.append(("Waiting for data", f"{waiting:.1%}", "of the time (median)"))
    if (loss := values.get("loss")) is not None:
        cards.append(("Last loss", f"{loss:.3f}", ""))
    last, best = values.get("knn_last"), values.get("knn_best")
    if last is not None and best is not None:
        cards.append(("Online kNN", f"{last:.1%}", f"top-1, best {best:.1%}"))
    cards.append(("Skipped images", str(len(skipped)), ""))
    return {"cards": cards, "skipped": list(skipped.items())[:_MAX_SKIPPED_IMAGES]}


def _evaluation(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the table of one evaluation: a row per network, a column per metric."""
    task, rows = TASKS.get(result["protocol"]), result["rows"]
    metrics = metric_names(rows.values())
    return {
        "title": task.title if task else result["protocol"],
        "source": f"{describe_data(result, [result['root']])}, checkpoint {describe_checkpoint(result)}",
        "metrics": table_head(metrics),
        "rows": [table_row(name, row, metrics, best=name == BYOL_ROW) for name, row in rows.items()],
        "note": describe_settings(result),
        "picture": _read_picture(path.with_suffix(".png")) if task and task.has_figure else None,
    }


def _read_picture(path: Path) -> bytes | None:
    """Return the figure of an evaluation; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        png = path.read_bytes()
        decode(png)
    except (OSError, BadImage) as error:
        logger.warning(f"{path}: {first_line(error)}; it is left out")
        return None
    return png


def _images(config: Config, model: BYOL, root: str | None) -> dict[str, Any]:
    """Draw augmented views, a map of the features and nearest neighbors.

    Map and neighbors need no labels. With a validation split of the same classes, they show its
    images; otherwise, those of the training split.

    Returns:
        The figures `views`, `map` and `neighbors`, None for those that the report lacks; the number
        of `classes`, None without that validation split; `left_out`: what is missing and why, "" if
        nothing is.
    """
    images: dict[str, Any] = dict.fromkeys(_PICTURES) | {"classes": None, "left_out": ""}
    try:
        train = find_images(config.data, "train", root=root)
        val = _open_val(config, train, root)
        images["classes"] = None if val is None else len(val.classes)
        images["views"] = draw_views(config, train)
        images["map"] = draw_map(config, model, train if val is None else val)
        images["neighbors"] = draw_neighbors(config, model, train, val)
    except (InputError, StorageError) as error:
        missing = ", ".join(title for name, title in _PICTURES.items() if images[name] is None)
        remedy = "; --root PATH takes images from another place" if root is None else ""
        images["left_out"] = f"the report lacks images ({missing}): {error}{remedy}"
        logger.warning(images["left_out"])
    return images


def _open_val(config: Config, train: Images, root: str | None) -> Images | None:
    """Return the validation split; None without one of the same classes."""
    try:
        val = find_images(config.data, "val", root=root)
        check_splits(train, val)
    except (InputError, StorageError):  # the run has logged why
        return None
    return val


def _quality(found: Measured, config: Config) -> list[tuple[str, str, str]]:
    """Return (measure, value, meaning) of what a run measured without labels."""
    rows = []
    if found.ranks:
        rows.append(
            (
                "Effective rank (RankMe)",
                f"{found.ranks[-1]:.1f} of at most {found.rank_limit}, {found.rank_share:.0%}",
                "How many independent directions the features use. It is 1 if the network sees no difference between "
                "images. Among runs of the same backbone on the same images, a higher rank often goes with a higher "
                f"accuracy. In this run it was {found.ranks[0]:.1f} at first and {max(found.ranks):.1f} at most.",
            )
        )
    if found.spread is not None:
        rows.append(
            (
                "Std of the projections",
                f"{found.std:.4f}, {found.spread:.0%} of a uniform spread",
                "How far apart the projections of different images lie. It is 0 if all images have the same one, which "
                f"is a collapse, and {found.uniform_std:.4f} if they are spread uniformly. The run warns below "
                f"{config.log.collapse_threshold * found.uniform_std:.4f}.",
            )
        )
    if found.alignment is not None:
        meaning = "Distance of two views of one image. Lower means that the features ignore the augmentation better."
        rows.append(("Alignment", f"{found.alignment:.3f}", meaning))
    if found.uniformity is not None:
        meaning = (
            "How close different images lie. It is 0 if all are equal; lower means more spread out. Compare it at an "
            "equal alignment."
        )
        rows.append(("Uniformity", f"{found.uniformity:.3f}", meaning))
    return rows


def _settings(config: Config) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (section, settings); the settings outside of sections come first, as "run"."""
    values = config.to_dict()
    sections = {"run": {key: value for key, value in values.items() if not isinstance(value, dict)}}
    sections |= {key: value for key, value in values.items() if isinstance(value, dict)}
    return [(name, [(key, format_setting(value)) for key, value in pairs.items()]) for name, pairs in sections.items()]
