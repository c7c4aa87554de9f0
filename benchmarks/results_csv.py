"""Result files: one CSV per benchmark under benchmarks/results/, one row per measurement; and what tables make of their rows."""

import csv
import os
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
Rounds = dict[str, dict[str, float]]
"""Contender -> round -> value."""


def write(path: Path, rows: list[dict[str, Any]], *, quiet: bool = False) -> None:
    """Writes the rows (all with the same keys) and says where, unless quiet; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    special = path.exists() and not path.is_file()  # /dev/stdout
    unfinished = path if special else path.with_name(f".{path.name}.{os.getpid()}")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)
    if not quiet:
        print(f"wrote {path}")


def read(name: str, folder: Path | None = None) -> list[dict[str, str]]:
    """The rows of NAME.csv."""
    with open((folder or FOLDER) / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def machine(name: str, row: dict[str, str]) -> str:
    """What NAME.csv was measured on: the processor, of a GPU's file the card, and both where the processor's cores load images."""
    if not name.endswith("_cuda"):
        return row["cpu"]
    return f"{row['gpu']}; {row['cpu']}" if name in ("loader_cuda", "train_cuda") else row["gpu"]


def by_round(rows: list[dict[str, str]], column: str, round_: str = "round") -> Rounds:
    """Values of a column; `round_` names the column that says which rows were measured beside each other."""
    values: Rounds = {}
    for row in rows:
        values.setdefault(row["contender"], {})[row[round_]] = float(row[column])
    return values


def ratios(values: dict[str, float], others: dict[str, float]) -> list[float]:
    """value / other's value, within every round that both have."""
    return [value / others[k] for k, value in values.items() if k in others]


def spread(values: list[float], digits: int) -> str:
    """Median and range; of one value, the value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"
