"""Draws benchmarks/results/loader.csv as benchmarks/results/loader.png; reads nothing else."""

import csv
import statistics
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    with open(RESULTS / "loader.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = sorted({int(row["size_px"]) for row in rows})
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if "1 thread" not in name]
    figure = Figure(figsize=(4.2 * len(sizes), 0.42 * len(names) + 1.2), layout="constrained")
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True).flat, sizes, strict=True):
        for y, name in enumerate(names):
            rates = [float(r["images_per_s"]) for r in rows if r["contender"] == name and int(r["size_px"]) == size]
            middle = statistics.median(rates)
            colour = "#1f6feb" if name.startswith("fastbyol") else "#9aa5b1"
            spread = [[middle - min(rates)], [max(rates) - middle]]
            axis.barh(y, middle, color=colour, xerr=spread, error_kw={"linewidth": 1})
            axis.text(middle, y, f" {middle:.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{size} px", fontsize=10)
        axis.set_xlabel("images/s, two views each", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.savefig(RESULTS / "loader.png", dpi=120)


if __name__ == "__main__":
    main()
