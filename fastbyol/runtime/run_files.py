"""The files in a run's folder: their names, and what can be read of them without torch."""

import os
from pathlib import Path
from typing import Any

from fastbyol.errors import InputError
from fastbyol.runtime.files import read_json_or
from fastbyol.runtime.logging import logger
from fastbyol.runtime.results import is_metric

SUMMARY, ENVIRONMENT, CONFIG, CHECKPOINTS = "summary.json", "environment.json", "config.json", "checkpoints"
REPORT = "report.html"
STACKS = "stacks.txt"
_OPTIONAL_NUMBERS = (
    *("images_per_s", "wait_share", "loss", "knn_last", "knn_best"),
    *("rank_me", "alignment", "uniformity", "projection_std"),
)


def check_run_folder(run: Path, key: str) -> None:
    """Check that a path may be a run's folder.

    Args:
        run: the path.
        key: how messages name it, e.g. "--run x".

    Raises:
        InputError: it is not a folder, or the folder of a run's checkpoints.
    """
    if not run.is_dir():
        raise InputError(f"{key}: {'is not a folder' if os.path.lexists(run) else 'folder not found'}")
    if run.name == CHECKPOINTS and not (run / CHECKPOINTS).exists():
        raise InputError(f"{key}: is a folder of checkpoints; name the run's folder, {run.parent}")


def read_summary(run: Path) -> dict[str, Any] | None:
    """Return the content of summary.json; None if it is missing or damaged, with a warning if
    damaged.

    Numbers that the run did not measure are None or missing.
    """
    values = read_json_or(run / SUMMARY)
    if not values:
        return None
    counts = all(isinstance(values.get(key), int) for key in ("steps", "total_steps"))
    optional = all(values.get(key) is None or is_metric(values[key]) for key in _OPTIONAL_NUMBERS)
    if counts and optional and is_metric(values.get("seconds")) and isinstance(values.get("bad_images"), dict):
        return values
    logger.warning(f"{run / SUMMARY}: is not the summary of a run; it is left out")
    return None
