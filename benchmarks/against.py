"""Summarize the comparisons with other trainers and loaders as one table and one bar chart.

    python benchmarks/against.py --results runs/bench [--device cuda]

Reads result files, measures nothing. Prints the table and writes it to DIR/against_DEVICE.md, and
the chart to DIR/against_DEVICE.svg. docs/performance.md shows those of the CPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from results_csv import FOLDER, Rounds, by_round, commits, machine, markdown_table, ratios, read, spread

PICTURE = FOLDER.parent.parent / "docs" / "images" / "against_cpu.svg"
PEERS = (
    "lightly",
    "byol-pytorch",
    "stable-pretraining",
    "plain torch",
    "plain torch compiled",
    "torchvision v2",
    "DALI CPU",
    "kornia",
)
OURS = "fastbyol"
_WIDTH, _NAME, _BAR, _ROW = 860, 150, 480, 18  # of the chart, its columns and rows, in pixels


@dataclass(frozen=True)
class Comparison:
    """One task that fastbyol and its peers were measured on."""

    title: str
    unit: str
    values: Rounds
    """Results in `unit`."""
    times: Rounds
    """Times for equal work, in any unit."""
    source: str
    """File, machine and commit."""

    def slowdowns(self, peer: str) -> list[float]:
        """Return a peer's time relative to fastbyol's, for every round."""
        return ratios(self.times[peer], self.times[OURS])


def comparisons(folder: Path = FOLDER, device: str = "cpu") -> list[Comparison]:
    """Return the comparisons of all result files of a device in `folder`."""
    found = []
    for name, take in _FILES[device].items():
        if (folder / f"{name}.csv").exists():
            found += take(name, read(name, folder))
    return found


def _source(name: str, rows: list[dict[str, str]]) -> str:
    first, rounds = rows[0], len({row.get("round", row.get("seed")) for row in rows})
    return f"{name}.csv ({machine(name, first)}; torch {first['torch']}; commit {commits(rows)}; {rounds} rounds)"


def _throughput(rows: list[dict[str, str]], title: str, source: str) -> Comparison:
    """Compare the column images_per_s. Slowdowns come from the column ms, if there is one."""
    rates = by_round(rows, "images_per_s")
    if "ms" in rows[0]:
        return Comparison(title, "images/s", rates, by_round(rows, "ms"), source)
    seconds = {who: {k: 1 / rate for k, rate in values.items()} for who, values in rates.items()}
    return Comparison(title, "images/s", rates, seconds, source)


def _loader(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    size = max((row["size_px"] for row in rows), key=int)
    own = [row for row in rows if row["size_px"] == size]
    return [_throughput(own, f"loader, {size} px", _source(name, own))]


def _sets(title: str) -> Callable[[str, list[dict[str, str]]], list[Comparison]]:
    def take(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
        found = []
        for work in dict.fromkeys(row["set"] for row in rows):
            own = [row for row in rows if row["set"] == work]
            found.append(_throughput(own, f"{title}, {work}", _source(name, own)))
        return found

    return take


def _accuracy(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    seconds = by_round(rows, "seconds", "seed")
    title = f"training run, Fashion-MNIST, {rows[0]['epochs']} epochs"
    return [Comparison(title, "s", seconds, seconds, _source(name, rows))]


def _update(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    return [_kernel("LARS + EMA update, R50", name, [row for row in rows if row["set"] == "R50"])]


def _augment(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    return [_kernel(f"augmentation, {rows[0]['set']}", name, rows)]


def _kernel(title: str, name: str, rows: list[dict[str, str]]) -> Comparison:
    times = by_round(rows, "ms")
    return Comparison(title, "ms", times, times, _source(name, rows))


_FILES: dict[str, dict[str, Callable[[str, list[dict[str, str]]], list[Comparison]]]] = {
    "cpu": {
        "loader": _loader,
        "step_cpu": _sets("step"),
        "train_cpu": _sets("end-to-end training"),
        "accuracy": _accuracy,
        "lars_ema_cpu": _update,
        "augment_cpu": _augment,
    },
    "cuda": {
        "step_cuda": _sets("step"),
        "train_cuda": _sets("end-to-end training"),
        "lars_ema_cuda": _update,
        "augment_cuda": _augment,
    },
}


def table(found: list[Comparison], folder: str = "benchmarks/results") -> str:
    """Return the table of fastbyol's results and the slowdown of each peer as markdown."""
    peers = [peer for peer in PEERS if any(peer in each.times for each in found)]
    lines = []
    for each in found:
        own = f"{_figure(median(each.values[OURS].values()))} {each.unit}"
        slowdowns = (spread(each.slowdowns(peer), 2) if peer in each.times else "" for peer in peers)
        lines.append([each.title, own, *slowdowns])
    sources = "; ".join(dict.fromkeys(each.source for each in found))
    note = f"Slowdown: median (range) of the ratios within each round. Sources, in {folder}: {sources}."
    return markdown_table(["", "fastbyol", *peers], lines, note)


def _figure(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1}f}"


def picture(found: list[Comparison]) -> str:
    """Return the bar chart as SVG: per comparison, the speed of each peer relative to fastbyol."""
    shapes, y = [], 8
    for each in found:
        y += 16
        shapes.append(f'<text x="8" y="{y}" font-weight="bold">{escape(each.title)}</text>')
        y += 6
        for name in (OURS, *(peer for peer in PEERS if peer in each.times)):
            slowdown = 1.0 if name == OURS else median(each.slowdowns(name))
            label = f"{_figure(median(each.values[name].values()))} {each.unit}"
            label += "" if name == OURS else f", {slowdown:.2f}x the time"
            baseline, bar = y + _ROW - 5, _BAR / slowdown
            color = "#1f6feb" if name == OURS else "#9aa5b1"
            shapes.append(f'<text x="{_NAME - 8}" y="{baseline}" text-anchor="end">{name}</text>')
            shapes.append(f'<rect x="{_NAME}" y="{y + 2}" width="{bar:.1f}" height="{_ROW - 4}" fill="{color}"/>')
            shapes.append(f'<text x="{_NAME + bar + 6:.1f}" y="{baseline}">{label}</text>')
            y += _ROW
        y += 6
    style = 'font-family="sans-serif" font-size="12" fill="#24292f"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 8}" viewBox="0 0 {_WIDTH} {y + 8}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *shapes, "</svg>"]) + "\n"


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    options.add_argument("--device", choices=list(_FILES), default="cpu")
    return options


def main() -> None:
    args = parser().parse_args()
    found = comparisons(args.results, args.device)
    if not found:
        parser().exit(2, f"error: --results {args.results}: contains none of {', '.join(_FILES[args.device])}\n")
    page, image = (args.results / f"against_{args.device}.{ending}" for ending in ("md", "svg"))
    text = table(found, str(args.results))
    page.write_text(f"![speed relative to fastbyol]({image.name})\n\n{text}")
    image.write_text(picture(found))
    print(f"{text}\nwrote {page} and {image}")


if __name__ == "__main__":
    main()
