"""Result files under benchmarks/results: one CSV per benchmark, one row per measurement."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
Rounds = dict[str, dict[str, float]]
"""Contender -> round -> value."""


def write(path: Path, rows: list[dict[str, Any]], *, quiet: bool = False) -> None:
    """Write rows with equal keys atomically.

    Args:
        path: Result file; its folder is created if needed.
        rows: At least one row.
        quiet: Do not print the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    special = path.exists() and not path.is_file()  # such as /dev/stdout
    unfinished = path if special else path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
    if not quiet:
        print(f"wrote {path}")


def read(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """Return the rows of NAME.csv."""
    with open((folder or FOLDER) / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def machine(name: str, row: dict[str, str]) -> str:
    """Return the hardware that NAME.csv depends on: CPU, GPU, or both if the CPU loads images."""
    if not name.endswith("_cuda"):
        return row["cpu"]
    return f"{row['gpu']}; {row['cpu']}" if name in ("loader_cuda", "train_cuda") else row["gpu"]


def commits(rows: list[dict[str, str]]) -> str:
    """Return the commits of all rows, separated by commas."""
    return ", ".join(dict.fromkeys(row["fastbyol"].split()[-1] for row in rows))


def by_round(rows: list[dict[str, str]], column: str, round_column: str = "round") -> Rounds:
    """Group the values of a column by contender and round."""
    values: Rounds = {}
    for row in rows:
        values.setdefault(row["contender"], {})[row[round_column]] = float(row[column])
    return values


def ratios(values: dict[str, float], others: dict[str, float]) -> list[float]:
    """Return value / other for every round that both have."""
    return [value / others[k] for k, value in values.items() if k in others]


def spread(values: list[float], digits: int) -> str:
    """Format the median and range, or a single value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]], note: str) -> str:
    """Format a table with a note below it. Lines that are shorter than the header are padded."""
    rows = [[*line, *[""] * (len(header) - len(line))] for line in (header, *lines)]
    text = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([text[0], "|---" * len(header) + "|", *text[1:], "", note]) + "\n"
