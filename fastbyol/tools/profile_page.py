"""profile.html: what profiling.py measured, as a page."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastbyol.tools.pages import image, section, table, text, write_page
from fastbyol.tools.plots import to_png

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
_UPDATE = "#2e9e52"
_FLAMES = 6  # operators of a part that the bar shows
_OF = " / "


def write_profile_page(out: Path, result: dict[str, Any]) -> Path:
    """Writes OUT/profile.html.

    Returns:
        the file written.

    Raises:
        InputError: it cannot be written.
    """
    step, ratio, roof = result["step_ms"], result["parts_over_step"], result["roofline"]
    note = (
        f"{step['p50']:.2f} ms a step without marks ({step['least']:.2f}-{step['most']:.2f}), {result['images_per_s']:.1f} images/s. "
        f"The parts add up to {100 * ratio['p50']:.1f} % of it. {result['steps']} steps with marks, as many without, in turn."
    )
    measured = [(row["part"], row["mean_ms"]) for row in result["parts"]]
    bound = [(name, part["roofline_ms"]) for name, part in roof["parts"].items()]
    bars = _bar("measured", measured, sum(ms for _, ms in measured))
    bars += _bar("operators, in proportion", _flames(result), sum(ms for _, ms in measured))
    bars += _bar("roofline", bound, sum(ms for _, ms in measured))
    parts = [
        f"<h1>A training step</h1><p class=note>{text(result['what'])}</p>",
        section("Where the time goes", f"{bars}<p class=note>{note}</p>{_parts(result)}"),
        section("Distance from the roofline", _roofline(roof)),
        section("Loader threads", _loader(result["loader_threads"])) if result["loader_threads"] else "",
        section("Operators", _kernels(result)),
        section("Memory", image(_draw_memory(result["memory"]))) if result["memory"]["ms"] else "",
        section("Environment", table(list(result["environment"].items()))),
    ]
    return write_page(out / "profile.html", "profile", parts)


def _flames(result: dict[str, Any]) -> list[tuple[str, float]]:
    """The longest operators of every part, and the rest of it, scaled from the traced steps to the part's measured time."""
    found: list[tuple[str, float]] = []
    for row in result["parts"]:
        operators = result["operators"][row["part"]]
        scale = row["mean_ms"] / (sum(operator["ms"] for operator in operators) or 1)
        longest = operators[:_FLAMES]
        found += [(f"{row['part']}{_OF}{operator['name']}", scale * operator["ms"]) for operator in longest]
        found.append((f"{row['part']}{_OF}others", row["mean_ms"] - sum(scale * o["ms"] for o in longest)))
    return found


def _color(part: str) -> str:
    return _COLORS.get(part.partition(_OF)[0], _UPDATE)


def _bar(title: str, parts: list[tuple[str, float]], total: float) -> str:
    """Parts side by side, as wide as they take long; the whole width is `total`."""
    look = "color:#fff;overflow:hidden;white-space:nowrap;font-size:12px;padding:.5em 0;text-indent:.3em"
    cells = "".join(
        f'<div title="{text(name)}: {ms:.2f} ms" style="width:{100 * ms / total:.3f}%;background:{_color(name)};{look};'
        f'box-shadow:inset 1px 0 #fff">{text(name.rpartition(_OF)[2])}</div>'
        for name, ms in parts
        if ms > 0
    )
    return f"<div class=note>{title}</div><div style='display:flex;width:100%;background:#f4f6f8'>{cells}</div>"


def _grid(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    style = " style='text-align:right'"
    top = "".join(f"<th{style if k else ''}>{text(cell)}</th>" for k, cell in enumerate(head))
    body = "".join(
        f"<tr><td>{text(first)}</td>{''.join(f'<td class=number>{text(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _parts(result: dict[str, Any]) -> str:
    keys = ("mean_ms", "p20_ms", "p50_ms", "p95_ms")
    rows = [[row["part"], f"{100 * row['share']:.1f}", *(f"{row[key]:.2f}" for key in keys)] for row in result["parts"]]
    rows.append(["sum", "100.0", *(f"{result['marked_step_ms'][key]:.2f}" for key in keys)])
    return _grid(["part", "%", "mean ms", "p20", "p50", "p95"], rows)


def _roofline(roof: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{part['gflop']:.1f}",
            f"{part['gbyte']:.3f}",
            f"{part['roofline_ms']:.2f}",
            f"{part['measured_ms']:.2f}",
            f"{100 * part['share_of_roofline']:.0f}",
        ]
        for name, part in roof["parts"].items()
    ]
    note = (
        f"Peaks measured here: {roof['peak_flops_per_s'] / 1e12:.3f} TFLOP/s (matrix product), {roof['peak_bytes_per_s'] / 1e9:.1f} GB/s "
        f"(copy). MFU {100 * roof['mfu']:.1f} %. A step is {roof['units']:.2f} forward passes of one view. Work is counted operator by "
        "operator, the roofline of an operator is the larger of its flops and its bytes at peak rate."
    )
    head = ["part", "GFLOP", "GB", "roofline ms", "measured ms", "% of the roofline"]
    return _grid(head, rows) + f"<p class=note>{note}</p>"


def _loader(threads: dict[str, float]) -> str:
    return _grid(["ms of one thread, an image with both views", ""], [[k, f"{ms:.3f}"] for k, ms in threads.items()])


def _kernels(result: dict[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['ms']:.2f}", f"{100 * row['share']:.1f}", f"{row['calls']:.1f}"]
        for row in result["kernels"]
    ]
    note = text(result["counts"])
    return _grid(["by its own time", "ms a step", "%", "calls a step"], rows) + f"<p class=note>{note}</p>"


def _draw_memory(timeline: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(11, 3), layout="constrained")
    axis = figure.subplots()
    for span in timeline["parts"]:
        axis.axvspan(span["ms"], span["ms"] + span["length_ms"], color=_color(span["part"]), alpha=0.25, linewidth=0)
    axis.step(timeline["ms"], [size / 2**20 for size in timeline["bytes"]], where="post", color="#22262b", linewidth=1)
    held = "held" if timeline["base_bytes"] else "held more than at the beginning"
    axis.set_ylabel(f"MiB {held}", fontsize=8)
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return to_png(figure)
