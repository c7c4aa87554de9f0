"""Writes the README's tables from the committed result files.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- NAME: ... -->` and `<!-- end -->`; NAME is a function of this file. `--check` only says
whether the README is up to date (exit code 1 if not); the tests do the same.
"""

import csv
import re
import sys
from pathlib import Path
from statistics import mean

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
_MARK = re.compile(r"(<!-- (\w+):[^\n]*-->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name: str) -> list[dict[str, str]]:
    with open(HERE / "results" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def demo_seeds() -> str:
    rows = read("demo_seeds")
    lines = ["| | " + " | ".join(f"seed {row['seed']}" for row in rows) + " | mean |", "|---" * (len(rows) + 2) + "|"]
    for protocol, title in (("knn", "kNN"), ("linear", "linear probe")):
        for column, name in (
            ("BYOL", "BYOL"),
            ("untrained_network", "untrained network"),
            ("raw_pixels", "raw pixels"),
        ):
            values = [100 * float(row[f"{protocol}_top1_{column}"]) for row in rows]
            label = f"{title}, {name}"
            cells = " | ".join(f"**{v:.1f}**" if column == "BYOL" else f"{v:.1f}" for v in [*values, mean(values)])
            lines.append(f"| {label} | {cells} |")
    first = rows[0]
    seconds = ", ".join(f"{float(row['total_s']):.0f}" for row in rows)
    note = (
        f"{first['cpu']}; Python {first['python']}, torch {first['torch']}; commit {first['fastbyol'].split()[-1]}; training "
        f"and both evaluations took {seconds} s. Source: benchmarks/results/demo_seeds.csv."
    )
    return "\n".join([*lines, "", note]) + "\n"


TABLES = {"demo_seeds": demo_seeds}


def render(text: str) -> str:
    """The README's text with every table made anew."""
    return _MARK.sub(lambda match: match[1] + TABLES[match[2]]() + match[4], text)


def main() -> int:
    text = README.read_text()
    fresh = render(text)
    if "--check" in sys.argv:
        return int(fresh != text)
    README.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
