"""profile.html: the result of `fastbyol profile` as a page."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastbyol.tools.pages import write_page
from fastbyol.tools.plots import GOOD, INK, to_png

_COLORS = {
    "wait for data": "#d1383d",
    "copy": "#e07b39",
    "augmentation": "#e3b341",
    "target forward": "#7fb2ff",
    "online forward": "#1f6feb",
    "backward": "#0b3d91",
    "gradient exchange": "#8957e5",
    "rest": "#b8c2cc",
}
_UPDATE_COLOR = GOOD  # the name of the update's part depends on the optimizer
_MAX_OPERATORS = 6  # per part, in the operators' bar


def write_profile_page(out: Path, result: dict[str, Any]) -> Path:
    """Write OUT/profile.html.

    Args:
        out: An existing folder.
        result: The content of profile.json.

    Returns:
        The path of the page.

    Raises:
        RunError: The page cannot be written.
    """
    memory = result["memory"]
    return write_page(
        out / "profile.html",
        "profile",
        result=result,
        bars=_bars(result),
        legend=[(row["part"], _color(row["part"])) for row in result["parts"] if row["mean_ms"] > 0],
        memory=_draw_memory(memory) if memory["ms"] else None,
    )


def _bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return stacked bars on one time scale: measured parts, operators, and roofline."""
    total_ms = sum(row["mean_ms"] for row in result["parts"])
    segments = {
        "Measured": [(row["part"], row["part"], row["mean_ms"]) for row in result["parts"]],
        "Operators, proportionally": _operator_segments(result),
        "Roofline": [(name, name, part["roofline_ms"]) for name, part in result["roofline"]["parts"].items()],
    }
    return [
        {
            "title": title,
            "segments": [
                {"part": part, "name": name, "ms": ms, "percent": 100 * ms / total_ms, "color": _color(part)}
                for part, name, ms in parts
                if ms > 0
            ],
        }
        for title, parts in segments.items()
    ]


def _operator_segments(result: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Return (part, operator, ms): the longest operators of each part, and "others".

    Traced steps are slower than timed steps: a part's operators are scaled to its measured time.
    """
    segments: list[tuple[str, str, float]] = []
    for row in result["parts"]:
        operators = result["operators"][row["part"]]
        scale = row["mean_ms"] / (sum(operator["ms"] for operator in operators) or 1)
        longest = [(row["part"], op["name"], scale * op["ms"]) for op in operators[:_MAX_OPERATORS]]
        others_ms = row["mean_ms"] - sum(ms for _, _, ms in longest)
        segments += [*longest, (row["part"], "others", others_ms)]
    return segments


def _color(part: str) -> str:
    return _COLORS.get(part, _UPDATE_COLOR)


def _draw_memory(timeline: dict[str, Any]) -> bytes:
    """Plot allocated memory over the traced steps, with the parts as colored background."""
    figure = Figure(figsize=(11, 3), layout="constrained")
    axis = figure.subplots()
    for span in timeline["parts"]:
        end = span["ms"] + span["length_ms"]
        axis.axvspan(span["ms"], end, color=_color(span["part"]), alpha=0.25, linewidth=0)
    mebibytes = [size / 2**20 for size in timeline["bytes"]]
    axis.step(timeline["ms"], mebibytes, where="post", color=INK, linewidth=1)
    # The CPU's profiler sees allocations, but not how much was allocated before.
    label = "allocated" if timeline["base_bytes"] else "allocated since the trace began"
    axis.set_ylabel(f"MiB {label}", fontsize=8)
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return to_png(figure)
