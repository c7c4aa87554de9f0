"""`fastbyol compare`: settings, curves, figures and evaluations of several runs on one page.

Reads the small files of the runs only: no checkpoint, no data set, no torch.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.evaluation.options import EVALUATIONS
from fastbyol.runtime.files import check_output, check_replaceable, read_json, read_json_or
from fastbyol.runtime.logging import logger
from fastbyol.runtime.results import BYOL_ROW, TASK_ORDER, is_metric, metric_names, read_results
from fastbyol.runtime.run_files import CONFIG, ENVIRONMENT, check_run_folder, read_summary
from fastbyol.runtime.run_log import read_metrics
from fastbyol.settings.base import flatten, leaves, nest
from fastbyol.settings.messages import BadSetting
from fastbyol.tools.curves import Curve, Level, RunLines, draw_curves
from fastbyol.tools.pages import HTML_START, format_setting, write_page
from fastbyol.tools.plots import INK, MUTED, line_style
from fastbyol.tools.result_tables import describe_checkpoint, describe_data, describe_settings, table_head, table_row

_MISSING = "\N{EN DASH}"
_NOT_COMPARED = ("name", "runs")  # they tell runs apart
_STD = "relative_std"  # projection_std * sqrt(projection_dim), so that runs of any dimension compare
_CURVES = (  # the results, then what explains them
    Curve("knn", "top1", "Online kNN top-1", "%"),
    Curve("quality", "rank_me", "Effective rank of the features (RankMe)"),
    Curve("train", "loss", "Loss"),
    Curve("train", _STD, "Std of normalized projections, relative to a uniform spread", "%", from_zero=True),
    Curve("train", "lr", "Learning rate"),
    Curve("train", "images_per_s", "Images per second", from_zero=True),
)
_IMAGES = (  # settings that choose the images of the online evaluation
    *("data.root", "data.train_split", "data.classes", "data.fraction", "data.images_per_class", "data.file_list"),
    *("data.subset_seed", "data.image_size_px", "knn.max_bank_images"),
)
_CAVEATS = (  # settings, and what does not compare if one of them differs
    (("model.loss", "model.hinge_margin", "model.contrastive_weight", "model.target"), "losses"),
    (("model.backbone", "model.width", *_IMAGES), "effective ranks"),
    (("data.val_split", "knn.k", "knn.temperature", *_IMAGES), "online kNN accuracies"),
)


@dataclass(frozen=True)
class _Run:
    """What is read of a run."""

    path: Path
    name: str
    settings: Mapping[str, Any]  # full name -> value
    unknown: tuple[str, ...]  # settings that this version does not know
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None
    results: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]

    def lines(self, kind: str) -> list[Mapping[str, Any]]:
        """Return the lines of a kind of metrics.jsonl."""
        return [line for line in self.metrics if line["kind"] == kind]

    @property
    def std_scale(self) -> float:
        """Factor that makes the std of the projections relative to a uniform spread."""
        dim = self.settings["model.projection_dim"]
        return math.sqrt(dim) if is_metric(dim) and dim > 0 else math.nan


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs.

    Damaged files of a run are logged as warnings and left out.

    Args:
        folders: The runs' folders, at least two different ones.
        out: The HTML file to write. Only an HTML page or an empty file is overwritten.

    Returns:
        The path of the page.

    Raises:
        InputError: A folder holds no run, fewer than two runs are given, or `out` cannot be
            written.
        RunError: Writing the page failed.
    """
    check_output(out, f"--out {out}")
    check_replaceable(out, f"--out {out}", HTML_START, "an HTML page")
    folders = _without_repeats(folders)
    if len(folders) < 2:
        raise InputError("name at least two runs to compare, such as: fastbyol compare runs/a runs/b")
    for folder in folders:
        check_run_folder(folder, str(folder))
        if not (folder / CONFIG).exists():
            raise InputError(f"{folder}: holds no run: it has no {CONFIG}")
    runs = _with_unique_names([_read(folder) for folder in folders])
    styles = [line_style(k) for k in range(len(runs))]
    shown = [{"name": run.name, "path": run.path, "style": style} for run, style in zip(runs, styles, strict=True)]
    head, rows = _summary_table(runs)
    recorded = [run for run in runs if run.environment]
    return write_page(
        out,
        "compare",
        runs=shown,
        summary={"head": head, "rows": list(zip(shown, rows, strict=True))},
        unfinished=[(run.name, _progress(run)) for run in runs if not _is_finished(run)],
        caveats=_caveats(runs),
        settings=_different([run.settings for run in runs]),
        unknown=[(run.name, run.unknown) for run in runs if run.unknown],
        names=[run.name for run in runs],
        curves=_draw(runs, styles),
        evaluations=_evaluations(runs),
        environment=_different([run.environment for run in recorded]),
        machines=[run.name for run in recorded],
    )


def _without_repeats(folders: Iterable[Path]) -> list[Path]:
    """Return the folders, each once; log those that are named again."""
    found: dict[str, Path] = {}
    for folder in folders:
        if (real := os.path.realpath(folder)) in found:
            logger.warning(f"{folder}: is named twice; the second time is ignored")
        found.setdefault(real, folder)
    return list(found.values())


def _read(folder: Path) -> _Run:
    """Raises InputError if the config cannot be read."""
    settings, unknown = _read_settings(folder / CONFIG)
    metrics, summary = read_metrics(folder), read_summary(folder)
    if summary is not None and metrics and metrics[-1]["step"] > summary["steps"]:
        summary = None  # of an earlier attempt: the run goes on
    return _Run(
        folder,
        settings["name"] if isinstance(settings["name"], str) else folder.name,
        settings,
        unknown,
        metrics,
        summary,
        [result for _, result in read_results(folder)],
        read_json_or(folder / ENVIRONMENT),
    )


def _read_settings(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a run's settings, full name -> value, and the names of those that this version does
    not know, or whose values it does not know.

    Settings of an older version have their current names. A setting that it did not have, or that
    derives its value from others, has the value that this means.

    Raises:
        InputError: the file cannot be read, or sets something twice.
    """
    try:
        values = flatten(Config.upgraded(read_json(path)))
        known = {name: values[name] for name, _, _ in leaves(Config) if name in values}
        config = _build(known)
    except BadSetting as error:
        raise InputError(f"{path}: {error}") from None
    unknown = {name: value for name, value in values.items() if name not in known}
    meant = {"optim.warmup_epochs": float(config.optim.warmup), "model.stem_channels": config.model.num_stem_channels}
    return flatten(config.to_dict()) | meant | unknown, tuple(unknown)


def _build(values: dict[str, Any]) -> Config:
    """Return the config of settings, full name -> value. Those with invalid values are removed.

    Raises:
        BadSetting: the others do not fit together.
    """
    while True:
        try:
            return Config.build(nest(values))
        except BadSetting as error:
            if error.key not in values:
                raise
            del values[error.key]


def _with_unique_names(runs: list[_Run]) -> list[_Run]:
    """Name runs of equal names by their folders."""
    counts = Counter(run.name for run in runs)
    return [run if counts[run.name] == 1 else replace(run, name=str(run.path)) for run in runs]


def _different(values: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the rows (name, text per run) of the keys whose values are not all equal."""
    names = dict.fromkeys(name for one in values for name in one if name not in _NOT_COMPARED)
    rows = [(name, [format_setting(one[name]) if name in one else _MISSING for one in values]) for name in names]
    return [(name, texts) for name, texts in rows if len(set(texts)) > 1]


def _caveats(runs: Sequence[_Run]) -> list[str]:
    """Return what does not compare between these runs, and why; one sentence each."""
    different = {name for name, _ in _different([run.settings for run in runs])}
    found = []
    for settings, what in _CAVEATS:
        if names := [name for name in settings if name in different]:
            found.append(
                f"The {what} do not compare directly: {', '.join(names)} differ{'s' if len(names) == 1 else ''}."
            )
    machines = {name for name, _ in _different([run.environment for run in runs if run.environment])}
    if machines & {"cpu", "gpu"}:
        found.append("Speeds do not compare directly: the machines differ.")
    return found


def _draw(runs: Sequence[_Run], styles: Sequence[Mapping[str, str]]) -> bytes | None:
    """Draw the curves of all runs; None if none has metrics."""
    lines = [
        RunLines(
            [
                line | {_STD: line["projection_std"] * run.std_scale} if line["kind"] == "train" else line
                for line in run.metrics
            ],
            style,
        )
        for run, style in zip(runs, styles, strict=True)
    ]
    levels = [Level(100, "uniform on the sphere", MUTED)]
    threshold, *others = [run.settings["log.collapse_threshold"] for run in runs]
    if is_metric(threshold) and all(other == threshold for other in others):
        levels.append(Level(100 * threshold, "collapse warning", INK))
    return draw_curves(lines, _CURVES, {_STD: levels})


def _is_finished(run: _Run) -> bool:
    return run.summary is not None and run.summary["steps"] >= run.summary["total_steps"]


def _progress(run: _Run) -> str:
    """Return how far a run is that has not finished."""
    if run.summary is not None:
        return f"stopped at step {run.summary['steps']} of {run.summary['total_steps']}"
    if not run.metrics:
        return "no metrics yet"
    return f"running, or killed after step {run.metrics[-1]['step']} (epoch {run.metrics[-1]['epoch']:.3g})"


class _Column(NamedTuple):
    """A column of the table of figures."""

    title: str
    format: Callable[[Any], str]
    is_ranked: bool = False  # the highest value is the best


_COLUMNS = {
    "steps": _Column("steps", str),
    "seconds": _Column("time", "{:.0f} s".format),
    "images_per_s": _Column("images/s", "{:.0f}".format, is_ranked=True),
    "wait_share": _Column("waiting for data", "{:.1%}".format),
    "loss": _Column("last loss", "{:.3f}".format),
    "knn_last": _Column("kNN, last", "{:.1%}".format, is_ranked=True),
    "knn_best": _Column("kNN, best", "{:.1%}".format, is_ranked=True),
    "rank_me": _Column("RankMe", "{:.1f}".format),
    "std": _Column("projection std, relative", "{:.0%}".format),
}


def _summary_table(runs: Sequence[_Run]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Return the table of the runs' figures, without columns that are empty for all of them.

    Returns:
        Titles; and for each run (text, whether it is the best of several) by column.
    """
    figures = [_figures(run) for run in runs]
    shown = {key: column for key, column in _COLUMNS.items() if any(row[key] is not None for row in figures)}
    best = {key: _best([row[key] for row in figures]) for key, column in shown.items() if column.is_ranked}
    rows = [
        [
            (_MISSING if row[key] is None else column.format(row[key]), k in best.get(key, ()))
            for key, column in shown.items()
        ]
        for k, row in enumerate(figures)
    ]
    return [column.title for column in shown.values()], rows


def _best(values: Sequence[Any]) -> list[int]:
    """Return the positions of the highest number; [] if there is no other one."""
    known = {value for value in values if is_metric(value)}
    return [k for k, value in enumerate(values) if value == max(known)] if len(known) > 1 else []


def _figures(run: _Run) -> dict[str, float | None]:
    """Return a run's figures by column: those of its summary, or else what its metrics say."""
    train, knn, quality = (run.lines(kind) for kind in ("train", "knn", "quality"))
    measured: dict[str, float | None] = dict.fromkeys(_COLUMNS)
    if run.metrics:
        measured["steps"] = run.metrics[-1]["step"]
    if train:
        measured |= {key: median(line[key] for line in train) for key in ("images_per_s", "wait_share")}
        std = train[-1]["projection_std"] * run.std_scale
        measured |= {"loss": train[-1]["loss"], "std": std if is_metric(std) else None}
    if knn:
        measured |= {"knn_last": knn[-1]["top1"], "knn_best": max(line["top1"] for line in knn)}
    if quality:
        measured["rank_me"] = quality[-1]["rank_me"]
    summary = run.summary or {}
    return measured | {key: summary[key] for key in _COLUMNS if summary.get(key) is not None}


def _evaluations(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """Return a table for each protocol and each choice of its settings and images."""
    groups: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for k, run in enumerate(runs):
        for result in run.results:
            same = ("protocol", "settings", "splits", "train_images", "val_images", "classes")
            key = json.dumps([result.get(name) for name in same], sort_keys=True)
            groups.setdefault(key, []).append((k, result))
    tables = [_evaluation(group, runs) for group in groups.values()]
    return sorted(tables, key=lambda table: (table["order"], -table["runs"]))


def _evaluation(group: Sequence[tuple[int, Mapping[str, Any]]], runs: Sequence[_Run]) -> dict[str, Any]:
    """Return the table of results of one protocol, settings and images: a row per run and
    checkpoint, then each baseline, once where it is equal for all runs.

    Args:
        group: (index of the run, result) each.
    """
    first = group[0][1]
    protocol = first["protocol"]
    metrics = metric_names(row for _, result in group for row in result["rows"].values())
    roots = list(dict.fromkeys(result["root"] for _, result in group))
    trained = [(k, result, row) for k, result in group if (row := result["rows"].get(BYOL_ROW)) is not None]
    best = _best([row.get(metrics[0]) for _, _, row in trained]) if metrics else []
    rows = [
        table_row(
            runs[k].name,
            row,
            metrics,
            best=position in best,
            detail=describe_checkpoint(result) + (f", {result['root']}" if len(roots) > 1 else ""),
            style=line_style(k),
        )
        for position, (k, result, row) in enumerate(trained)
    ]
    doc = EVALUATIONS[protocol].__doc__ if protocol in EVALUATIONS else None
    return {
        "title": doc.splitlines()[0].rstrip(".") if doc else protocol,
        "order": TASK_ORDER.index(protocol) if protocol in TASK_ORDER else len(TASK_ORDER),
        "runs": len({k for k, _ in group}),
        "source": describe_data(first, roots),
        "metrics": table_head(metrics),
        "rows": rows + _baselines(group, runs, metrics),
        "note": describe_settings(first),
    }


def _baselines(
    group: Sequence[tuple[int, Mapping[str, Any]]], runs: Sequence[_Run], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the rows of the baselines. One that is not equal for all runs has a row per value."""
    found: dict[str, dict[str, tuple[Mapping[str, Any], list[str]]]] = {}
    for k, result in group:
        for name, row in result["rows"].items():
            if name != BYOL_ROW:
                value = json.dumps([row.get(metric) for metric in metrics])
                _, names = found.setdefault(name, {}).setdefault(value, (row, []))
                names.append(runs[k].name)
    return [
        table_row(name, row, metrics, detail=", ".join(dict.fromkeys(names)) if len(values) > 1 else "")
        for name, values in found.items()
        for row, names in values.values()
    ]
