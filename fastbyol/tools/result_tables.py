"""Tables of evaluation results, for the pages of one run and of several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastbyol.runtime.results import is_metric

_BAR_PX = 120  # width of the bar of an accuracy of 100%


def table_row(name: str, row: Mapping[str, Any], metrics: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return a row of a table as the templates' macro `result_rows` reads it.

    Args:
        name: Of the network.
        row: Its metrics.
        metrics: Names of the metrics that have a column.
        **more: Further values of the row: `best`, `detail`, `style`.
    """
    value = row.get(metrics[0]) if metrics else None
    cells = [f"{row[metric]:.1%}" if is_metric(row.get(metric)) else "" for metric in metrics]
    bar_px = round(_BAR_PX * min(max(value, 0), 1)) if is_metric(value) else 0
    return {"name": name, "cells": cells, "bar_px": bar_px, "best": False, "detail": "", "style": None} | more


def table_head(metrics: Iterable[str]) -> list[str]:
    """Return the titles of the columns of metrics."""
    return [name.replace("_", " ") for name in metrics]


def describe_data(result: Mapping[str, Any], roots: Iterable[str]) -> str:
    """Return the data set of a result, which may lie at several places, and its splits."""
    splits = ", ".join(map(str, result.get("splits") or []))
    return " and ".join(roots) + (f" ({splits})" if splits else "")


def describe_checkpoint(result: Mapping[str, Any]) -> str:
    """Return the checkpoint of a result: file name and step."""
    name = result["checkpoint"].rpartition("/")[2]
    return name + (f", step {result['step']}" if "step" in result else "")


def describe_settings(result: Mapping[str, Any]) -> str:
    """Return the size of the data set of a result, and its settings."""
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items() if value not in (None, []))
    return (
        f"{result['train_images']} training and {result['val_images']} validation images, "
        f"{result['classes']} classes; {settings}"
    )
