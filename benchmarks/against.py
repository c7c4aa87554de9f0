"""Everything that was measured against other people's trainers and loaders, as one table and one picture; reads result files alone.

    python benchmarks/against.py --results runs/bench [--device cuda]

Prints the table and writes it to DIR/against_DEVICE.md, the picture to DIR/against_DEVICE.svg. docs/performance.md has those of the CPU.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

from results_csv import FOLDER, Rounds, by_round, machine, ratios, read, spread

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
_WIDTH, _NAME, _BAR, _ROW = 860, 150, 480, 18  # of the picture, in pixels


@dataclass(frozen=True)
class Comparison:
    """One thing that several do, in turn."""

    title: str
    unit: str
    values: Rounds
    """In `unit`."""
    times: Rounds
    """Of the same work; only their ratios count."""
    source: str
    """File, machine and commit."""

    def times_ours(self, peer: str) -> list[float]:
        """How many times as long as fastbyol's a peer's takes, in every round."""
        return ratios(self.times[peer], self.times[OURS])


def comparisons(folder: Path = FOLDER, device: str = "cpu") -> list[Comparison]:
    """Of every result file of a device that is there."""
    found = []
    for name, take in _FILES[device].items():
        if (folder / f"{name}.csv").exists():
            found += take(name, read(name, folder))
    return found


def _source(name: str, rows: list[dict[str, str]]) -> str:
    first, commits = rows[0], dict.fromkeys(row["fastbyol"].split()[-1] for row in rows)
    rounds = len({row.get("round", row.get("seed")) for row in rows})
    return f"{name}.csv ({machine(name, first)}; torch {first['torch']}; commit {', '.join(commits)}; {rounds} rounds)"


def _rated(rows: list[dict[str, str]], title: str, source: str) -> Comparison:
    """Of rows with images/s, and milliseconds of a step where there are steps."""
    rates = by_round(rows, "images_per_s")
    if "ms" in rows[0]:
        return Comparison(title, "images/s", rates, by_round(rows, "ms"), source)
    seconds = {who: {k: 1 / rate for k, rate in values.items()} for who, values in rates.items()}
    return Comparison(title, "images/s", rates, seconds, source)


def _loader(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    size = max((row["size_px"] for row in rows), key=int)
    own = [row for row in rows if row["size_px"] == size]
    return [_rated(own, f"loader, {size} px", _source(name, own))]


def _sets(title: str) -> Callable[[str, list[dict[str, str]]], list[Comparison]]:
    def take(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
        found = []
        for work in dict.fromkeys(row["set"] for row in rows):
            own = [row for row in rows if row["set"] == work]
            found.append(_rated(own, f"{title}, {work}", _source(name, own)))
        return found

    return take


def _accuracy(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    seconds = by_round(rows, "seconds", "seed")
    title = f"run to kNN accuracy, Fashion-MNIST, {rows[0]['epochs']} epochs"
    return [Comparison(title, "s", seconds, seconds, _source(name, rows))]


def _update(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    return [_kernel("LARS + target, R50 pair", name, [row for row in rows if row["set"] == "R50"])]


def _augment(name: str, rows: list[dict[str, str]]) -> list[Comparison]:
    return [_kernel(f"augmentation, {rows[0]['set']}", name, rows)]


def _kernel(title: str, name: str, rows: list[dict[str, str]]) -> Comparison:
    times = by_round(rows, "ms")
    return Comparison(title, "ms", times, times, _source(name, rows))


_FILES: dict[str, dict[str, Callable[[str, list[dict[str, str]]], list[Comparison]]]] = {
    "cpu": {
        "loader": _loader,
        "step_cpu": _sets("step"),
        "train_cpu": _sets("whole training"),
        "accuracy": _accuracy,
        "lars_ema_cpu": _update,
        "augment_cpu": _augment,
    },
    "cuda": {
        "step_cuda": _sets("step"),
        "train_cuda": _sets("whole training"),
        "lars_ema_cuda": _update,
        "augment_cuda": _augment,
    },
}


def table(found: list[Comparison], folder: str = "benchmarks/results") -> str:
    """fastbyol's own figure, and how many times as long as fastbyol each peer takes."""
    peers = [peer for peer in PEERS if any(peer in each.times for each in found)]
    lines = ["| | fastbyol | " + " | ".join(peers) + " |", "|---" * (len(peers) + 2) + "|"]
    for each in found:
        own = median(each.values[OURS].values())
        cells = (spread(each.times_ours(peer), 2) if peer in each.times else "" for peer in peers)
        lines.append(f"| {each.title} | {_figure(own)} {each.unit} | " + " | ".join(cells) + " |")
    sources = "; ".join(dict.fromkeys(each.source for each in found))
    return (
        "\n".join([*lines, "", f"Median (range) of the ratios within a round. Sources, in {folder}: {sources}."]) + "\n"
    )


def _figure(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1}f}"


def picture(found: list[Comparison]) -> str:
    """SVG: a block of bars per comparison, the speed of each beside fastbyol's."""
    shapes, y = [], 8
    for each in found:
        y += 16
        shapes.append(f'<text x="8" y="{y}" font-weight="bold">{escape(each.title)}</text>')
        y += 6
        for name in (OURS, *(peer for peer in PEERS if peer in each.times)):
            times = 1.0 if name == OURS else median(each.times_ours(name))
            label = f"{_figure(median(each.values[name].values()))} {each.unit}"
            label += "" if name == OURS else f", {times:.2f} times as long"
            middle, bar = y + _ROW - 5, _BAR / times
            color = "#1f6feb" if name == OURS else "#9aa5b1"
            shapes.append(f'<text x="{_NAME - 8}" y="{middle}" text-anchor="end">{name}</text>')
            shapes.append(f'<rect x="{_NAME}" y="{y + 2}" width="{bar:.1f}" height="{_ROW - 4}" fill="{color}"/>')
            shapes.append(f'<text x="{_NAME + bar + 6:.1f}" y="{middle}">{label}</text>')
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
        parser().exit(2, f"error: --results {args.results}: none of {', '.join(_FILES[args.device])} is there\n")
    page, image = (args.results / f"against_{args.device}.{ending}" for ending in ("md", "svg"))
    text = table(found, str(args.results))
    page.write_text(f"![speed beside others]({image.name})\n\n{text}")
    image.write_text(picture(found))
    print(f"{text}\nwrote {page} and {image}")


if __name__ == "__main__":
    main()
