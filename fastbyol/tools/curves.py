"""Training curves by epoch: of one run, or of several runs on the same axes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from fastbyol.tools.plots import to_png

_COLUMNS = 2
_MAX_MARKERS = 40  # curves of fewer points show each of them


class Curve(NamedTuple):
    """A value of metrics.jsonl to plot."""

    kind: str  # of its lines
    key: str
    title: str
    unit: str = ""
    from_zero: bool = False  # the axis begins at 0

    @property
    def heading(self) -> str:
        """Title with the unit."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


class Level(NamedTuple):
    """A horizontal line to read a curve against."""

    value: float
    label: str
    color: str


class RunLines(NamedTuple):
    """The lines of a run's metrics.jsonl, and how its curves look."""

    metrics: Sequence[Mapping[str, Any]]
    style: Mapping[str, Any]  # keyword arguments of Axes.plot


def draw_curves(
    runs: Sequence[RunLines], curves: Sequence[Curve], levels: Mapping[str, Sequence[Level]]
) -> bytes | None:
    """Plot metrics by epoch, a panel for each curve that a run has lines of.

    Args:
        runs: One or more runs.
        curves: What to plot.
        levels: Key of a curve -> its levels.

    Returns:
        The figure as PNG; None if no run has a line of a curve.
    """
    shown = [curve for curve in curves if any(_points(run, curve) for run in runs)]
    if not shown:
        return None
    rows = -(-len(shown) // _COLUMNS)
    figure = Figure(figsize=(11, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    for axis, curve in zip(axes, shown, strict=False):
        for run in runs:
            if points := _points(run, curve):
                marker = "o" if len(points) < _MAX_MARKERS else None
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, **run.style)
        for level in levels.get(curve.key, ()):
            axis.axhline(level.value, color=level.color, linestyle=":", label=level.label)
        if curve.key in levels:
            axis.legend(fontsize=8, frameon=False)
        if curve.from_zero:
            axis.set_ylim(bottom=0)
        axis.set_title(curve.heading, fontsize=10, loc="left")
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def _points(run: RunLines, curve: Curve) -> list[tuple[float, float]]:
    """Return (epoch, value) of the lines of a curve."""
    scale = 100 if curve.unit == "%" else 1
    lines = (line for line in run.metrics if line["kind"] == curve.kind and curve.key in line)
    return [(line["epoch"], scale * line[curve.key]) for line in lines]
