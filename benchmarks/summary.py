"""The README's picture and table: the main figures of the result files, and whether each was
measured or estimated.

`python benchmarks/readme_tables.py` writes both. Reads committed CSV files and one header of
configs/; measures nothing.
"""

import re
from html import escape
from pathlib import Path
from statistics import mean, median

from results_csv import by_round, machine, ratios, read

_ROOT = Path(__file__).resolve().parent.parent
PICTURE = _ROOT / "docs" / "images" / "summary.svg"
CONFIG = _ROOT / "configs" / "imagenet_r50_300ep_h100_8gpu.yaml"
_PLAIN_GPU_STEP = {  # contender of step_cuda.csv -> label
    "plain torch compiled": "plain BYOL, bf16, compiled",
    "plain torch channels-last bf16": "plain BYOL, bf16, eager",
}
_CPU_STEP = {  # contender of step_cpu.csv -> label
    "fastbyol": "fastbyol, bf16",
    "plain torch channels-last bf16": "plain BYOL, bf16",
    "plain torch": "plain BYOL, fp32",
    "lightly": "lightly, fp32",
    "stable-pretraining": "stable-pretraining, fp32",
    "byol-pytorch": "byol-pytorch, fp32",
}
_WIDTH, _NAME, _BAR, _ROW = 860, 200, 480, 20  # pixels


def table() -> str:
    """Return the README's table as Markdown."""
    lines = ["| | hardware | fastbyol | compared with | status |", "|---|---|---|---|---|"]
    lines += [_gpu_step(), _gpu_loader(), *_cpu_steps(), _cpu_training(), _cpu_loader(), _demo(), _estimate()]
    return "\n".join(lines) + "\n"


def _row(what: str, hardware: str, ours: str, others: str, kind: str) -> str:
    return f"| {what} | {hardware} | {ours} | {others} | {kind} |"


def _measured(rows: list[dict[str, str]]) -> str:
    rounds = len({row["round"] for row in rows})
    return f"measured, {rounds} round{'s' if rounds > 1 else ''}"


def _slowdown(rows: list[dict[str, str]], column: str, names: dict[str, str]) -> str:
    """Return "NAME 3.21x slower, ..." from the median ratio within a round; `column` is a time."""
    times = by_round(rows, column)
    return ", ".join(
        f"{label} {median(ratios(times[name], times['fastbyol'])):.1f}x slower" for name, label in names.items()
    )


def _gpu_step() -> str:
    rows = read("step_cuda")
    rate = {row["contender"]: float(row["images_per_s"]) for row in rows}
    bound = float(next(row["bound_images_per_s"] for row in rows if row["contender"] == "fastbyol"))
    captured, compiled = _gpu_modes(rows)
    ours = f"{rate[compiled]:,.0f} images/s; {rate[captured]:,.0f} as a CUDA graph"
    others = f"plain compiled BYOL {rate['plain torch compiled']:,.0f}; bound (3/8 of supervised) {bound:,.0f}"
    return _row(f"training step, {_set(rows)}, no loading", _gpu(rows), ours, others, _measured(rows))


def _gpu_modes(rows: list[dict[str, str]]) -> tuple[str, str]:
    """Return the contenders that ran as a CUDA graph and compiled.

    `fastbyol` is the default mode, which was `compile` before `fastbyol compile` was a contender.
    """
    if any(row["contender"] == "fastbyol compile" for row in rows):
        return "fastbyol", "fastbyol compile"
    return "fastbyol cuda_graph", "fastbyol"


def _gpu_loader() -> str:
    rows = read("loader_cuda")
    rate = {row["contender"]: float(row["images_per_s"]) for row in rows}
    ours = (
        f"{rate['fastbyol native']:,.0f} images/s from JPEG; {rate['fastbyol native .beton raw']:,.0f} from raw pixels"
    )
    hardware = f"{rows[0]['cores']} CPU cores next to the {_gpu(rows)}"
    return _row(f"loader, {rows[0]['size_px']} px", hardware, ours, "", _measured(rows))


def _cpu_steps() -> list[str]:
    every = read("step_cpu")
    lines = []
    for name in dict.fromkeys(row["set"] for row in every):
        rows = [row for row in every if row["set"] == name]
        rate = median(by_round(rows, "images_per_s")["fastbyol"].values())
        others = _slowdown(rows, "ms", {"lightly": "lightly", "plain torch": "plain PyTorch"})
        lines.append(_row(f"training step, {_set(rows)}", "2 CPU cores", _images(rate), others, _measured(rows)))
    return lines


def _cpu_training() -> str:
    rows = read("train_cpu")
    rate = median(by_round(rows, "images_per_s")["fastbyol"].values())
    others = _slowdown(rows, "ms", {"lightly": "lightly"})
    return _row(f"training from JPEG, {_set(rows)}", "2 CPU cores", _images(rate), others, _measured(rows))


def _cpu_loader() -> str:
    rows = [row for row in read("loader") if row["size_px"] == "224"]
    rates = by_round(rows, "images_per_s")
    names = {"lightly": "lightly", "torchvision v2": "torchvision"}
    others = ", ".join(
        f"{label} {median(ratios(rates['fastbyol'], rates[name])):.1f}x slower" for name, label in names.items()
    )
    return _row("loader, 224 px", "2 CPU cores", _images(median(rates["fastbyol"].values())), others, _measured(rows))


def _demo() -> str:
    rows = read("demo_seeds")
    ours, untrained = (
        f"{100 * mean(float(row[f'knn_top1_{name}']) for row in rows):.1f} %" for name in ("BYOL", "untrained_network")
    )
    seconds = max(float(row["total_s"]) for row in rows)
    what = f"`make demo`: kNN top-1 after {seconds / 60:.0f} minutes"
    return _row(what, "2 CPU cores", ours, f"untrained network {untrained}", f"measured, {len(rows)} seeds")


def _estimate() -> str:
    """A whole run that nobody has done: the header of its config."""
    header = CONFIG.read_text()
    hours = re.search(r"^#   hours +([\d.]+) \(estimate", header, re.MULTILINE)
    hardware = re.search(r"^#   hardware +(.+)", header, re.MULTILINE)
    assert hours and hardware
    what = "ResNet-50, ImageNet, 300 epochs"
    return _row(what, hardware[1], f"{hours[1]} hours", "", "**estimated** by `fastbyol plan`; not run")


def _images(rate: float) -> str:
    return f"{rate:,.{0 if rate >= 100 else 1}f} images/s"


def _set(rows: list[dict[str, str]]) -> str:
    return re.sub(r"\bR(\d+)", r"ResNet-\1", rows[0]["set"])


def _gpu(rows: list[dict[str, str]]) -> str:
    return re.sub(r"NVIDIA (\S+) (\d+)GB.*", r"\1 \2 GB", rows[0]["gpu"])


def picture() -> str:
    """Return the SVG: training-step rates on a GPU and on a CPU, one bar per contender."""
    gpu, cpu = read("step_cuda"), [row for row in read("step_cpu") if row["set"] == "R50 224 px, batch 8"]
    bound = float(next(row["bound_images_per_s"] for row in gpu if row["contender"] == "fastbyol"))
    captured, compiled = _gpu_modes(gpu)
    names = {captured: "fastbyol, bf16, CUDA graph", compiled: "fastbyol, bf16, compiled"} | _PLAIN_GPU_STEP
    bars = {name: median(by_round(gpu, "images_per_s")[key].values()) for key, name in names.items()}
    shapes, y = _panel(f"Training step, {_set(gpu)}: {machine('step_cuda', gpu[0])}, {_measured(gpu)}", bars, 8, bound)
    rates = by_round(cpu, "images_per_s")
    bars = {name: median(rates[key].values()) for key, name in _CPU_STEP.items()}
    more, y = _panel(f"Training step, {_set(cpu)}: {machine('step_cpu', cpu[0])}, {_measured(cpu)}", bars, y + 10)
    style = 'font-family="sans-serif" font-size="12" fill="#24292f"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 8}" viewBox="0 0 {_WIDTH} {y + 8}" {style}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#ffffff"/>', *shapes, *more, "</svg>"]) + "\n"


def _panel(title: str, bars: dict[str, float], y: int, bound: float | None = None) -> tuple[list[str], int]:
    """Return the shapes of one panel of images/s and the y below it; `bound` is drawn as a dashed
    line.
    """
    longest = max([*bars.values(), bound or 0])
    y += 16
    shapes = [f'<text x="8" y="{y}" font-weight="bold">{escape(title)}</text>']
    y += 6
    top = y
    for name, rate in bars.items():
        middle, length = y + _ROW - 6, _BAR * rate / longest
        color = "#1f6feb" if name.startswith("fastbyol") else "#9aa5b1"
        shapes.append(f'<text x="{_NAME - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
        shapes.append(f'<rect x="{_NAME}" y="{y + 2}" width="{length:.1f}" height="{_ROW - 4}" fill="{color}"/>')
        shapes.append(f'<text x="{_NAME + length + 8:.1f}" y="{middle}">{_images(rate)}</text>')
        y += _ROW
    if bound is not None:
        x = _NAME + _BAR * bound / longest
        line = f'x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{y}" stroke="#cf222e" stroke-dasharray="4 3"'
        shapes.append(f"<line {line}/>")
        y += 14
        text = f"bound: 3/8 of the supervised rate, {_images(bound)}"
        shapes.append(f'<text x="{x:.1f}" y="{y}" text-anchor="end" fill="#cf222e">{text}</text>')
    return shapes, y + 4
