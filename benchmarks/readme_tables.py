"""Writes the README's tables from the committed result files.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- NAME: ... -->` and `<!-- end -->`; NAME is a function of this file. `--check` only says
whether the README is up to date (exit code 1 if not); the tests do the same.
"""

import csv
import re
import sys
from pathlib import Path
from statistics import mean, median

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


def loader() -> str:
    rows = read("loader")
    sizes = sorted({int(row["size_px"]) for row in rows}, reverse=True)
    names = list(dict.fromkeys(row["contender"] for row in rows))

    def rates(name: str, size: int) -> list[float]:
        own = [r for r in rows if r["contender"] == name and int(r["size_px"]) == size]
        return [float(r["images_per_s"]) for r in sorted(own, key=lambda r: int(r["round"]))]

    def ratio(name: str, other: str, size: int) -> str:
        """Median over the rounds of the ratio within a round, and its range."""
        values = [a / b for a, b in zip(rates(name, size), rates(other, size), strict=True)]
        return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    lines = ["| images/s: median (range) | " + " | ".join(f"{size} px" for size in sizes) + " |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for name in names:
        cells = (
            f"{median(rates(name, size)):.0f} ({min(rates(name, size)):.0f}-{max(rates(name, size)):.0f})"
            for size in sizes
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    pairs = [("fastbyol", other) for other in ("decode only", "lightly", "torchvision v2", "DALI CPU")]
    pairs += [("fastbyol", "fastbyol 1 thread"), ("decode only", "decode only 1 thread")]
    for name, other in pairs:
        cells = " | ".join(ratio(name, other, size) for size in sizes)
        lines.append(f"| **{name} / {other}** | {cells} |")
    first = rows[0]
    versions = ", ".join(f"{key} {first[key]}" for key in ("torch", "torchvision", "lightly", "numba"))
    note = (
        f"{first['cpu']}; {versions}, DALI {first['nvidia-dali-cuda130']}, FFCV {first['ffcv']}; commit "
        f"{first['fastbyol'].split()[-1]}; {len(rates(names[0], sizes[0]))} rounds in turn, ratios within a round. "
        "Source: benchmarks/results/loader.csv (`make bench-loader`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def dct_scaling() -> str:
    rows = read("dct_scaling")
    lines = [
        "| size | images decoded smaller | mean difference of their views | 95 % of them below |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if float(row["share_reduced"]) == 0:
            lines.append(f"| {row['size_px']} px | none of {row['images']} | | |")
            continue
        share = f"{100 * float(row['share_reduced']):.0f} % of {row['images']}"
        differences = f"{row['mean_difference_255ths']}/255 | {row['p95_difference_255ths']}/255"
        lines.append(f"| {row['size_px']} px | {share} | {differences} |")
    note = f"Commit {rows[0]['fastbyol'].split()[-1]}. Source: benchmarks/results/dct_scaling.csv."
    return "\n".join([*lines, "", note]) + "\n"


def kernels() -> str:
    """Times on the CPU, and how many times as long as fastbyol's, in the same round."""
    sets = [
        (row["set"], f, row) for f in ("lars_ema_cpu", "augment_cpu") for row in {r["set"]: r for r in read(f)}.values()
    ]
    titles = {"R18": "LARS + target, R18 pair", "R50": "LARS + target, R50 pair"}
    lines = ["| | ms: median (range) | times fastbyol's: median (range) |", "|---|---|---|"]
    for name, file, _ in sets:
        rows = [row for row in read(file) if row["set"] == name]
        times: dict[str, dict[str, float]] = {}
        for row in rows:
            times.setdefault(row["contender"], {})[row["round"]] = float(row["ms"])
        lines.append(f"| **{titles.get(name, f'augmentation, {name}')}** | | |")
        for contender, by_round in times.items():
            ms, ratios = list(by_round.values()), [v / times["fastbyol"][k] for k, v in by_round.items()]
            ratio = "" if contender == "fastbyol" else f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            lines.append(f"| {contender} | {median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f}) | {ratio} |")
    commits = ", ".join(dict.fromkeys(row["fastbyol"].split()[-1] for _, _, row in sets))
    first = sets[0][2]
    note = (
        f"{first['cpu']}; torch {first['torch']}, numba {first['numba']}, lightly {first['lightly']}, kornia {first['kornia']}; "
        f"commit {commits}; contenders in turn, ratios within a round. Source: benchmarks/results/lars_ema_cpu.csv and "
        "augment_cpu.csv (`make bench-kernels`)."
    )
    return "\n".join([*lines, "", note]) + "\n"


TABLES = {"kernels": kernels, "dct_scaling": dct_scaling, "demo_seeds": demo_seeds, "loader": loader}


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
