"""Result files of evaluations, eval_TASK_KEY.json, in a run's folder."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastbyol.runtime.files import read_json_or
from fastbyol.runtime.logging import logger

PREFIX = "eval_"
TASK_ORDER = ("knn", "linear", "finetune", "fewshot", "robustness", "segmentation", "detection")
"""Order of the tasks in reports and model cards."""
BYOL_ROW, UNTRAINED_ROW, PIXELS_ROW = "BYOL", "untrained network", "raw pixels"
"""Titles of a result's rows."""
SELECTION = ("base_lr", "held_out_top1")
"""Values of a row that tell how the learning rate was selected."""


def read_results(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return all results in a run's folder, ordered by task, data set and checkpoint.

    Damaged files are logged and skipped.
    """
    found = []
    for path in sorted(run.glob(f"{PREFIX}*.json")):
        result = read_json_or(path)
        if not result:
            continue
        if is_result(result):
            found.append((path, result))
        else:
            logger.warning(f"{path}: not a result of `fastbyol eval`; skipped")

    def key(item: tuple[Path, dict[str, Any]]) -> tuple[int, str, str]:
        task = item[1]["protocol"]
        position = TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER)
        return position, item[1]["root"], item[1]["checkpoint"]

    return sorted(found, key=key)


def is_result(values: dict[str, Any]) -> bool:
    """Return True if a JSON object has the fields of a result, with the expected types."""
    rows = values.get("rows")
    return (
        all(isinstance(values.get(key), str) for key in ("protocol", "checkpoint", "root"))
        and {"train_images", "val_images", "classes"} <= values.keys()
        and isinstance(values.get("settings"), dict)
        and isinstance(values.get("splits", []), list)
        and isinstance(rows, dict)
        and all(isinstance(row, dict) for row in rows.values())
    )


def metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the metrics in the rows of a result, the most important first."""
    names = dict.fromkeys(key for row in rows for key, value in row.items() if is_metric(value))
    return [name for name in names if name not in SELECTION]


def is_metric(value: object) -> bool:
    """Return True if a row's value is a number within the range of float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
