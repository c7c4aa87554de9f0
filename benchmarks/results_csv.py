"""Result files: one CSV per benchmark under benchmarks/results/, one row per measurement."""

import csv
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows (all with the same keys) and says where."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
