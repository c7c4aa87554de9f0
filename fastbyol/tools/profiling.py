"""`fastbyol profile`: where the time of a training step goes.

Interleaves plain and instrumented steps. Instrumented steps record the spans of fastbyol/spans.py,
which cost nothing when off. A step that compiles the whole network as one graph compiles target and
online network separately while instrumented; the sum of the parts over the plain step says what
that costs.

Parts, in the order of a step:
    wait for data       the loop has no batch
    copy                GPU: the copy from pinned memory that the step before did not hide
    augmentation        GPU with DALI: crops and both views. Elsewhere loader threads make them
    target forward
    online forward      with the loss
    backward
    gradient exchange   several ranks: what the backward pass does not hide of the exchange
    LARS + target       weights and target in one pass; two passes with other optimizers
    rest                cast, scalars, bookkeeping
"""

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastbyol.build import Training
from fastbyol.config import Config
from fastbyol.data import native
from fastbyol.errors import InputError
from fastbyol.runtime import environment
from fastbyol.runtime.files import make_folder, write_json
from fastbyol.runtime.logging import logger
from fastbyol.spans import UPDATE
from fastbyol.tools.clock import spread
from fastbyol.tools.instruments import Instruments, Loop, open_training
from fastbyol.tools.roofline import Peaks, Work, count_step, measure_peaks, units
from fastbyol.tools.trace import trace

WINDOW = {"cpu": 5, "cuda": 20}  # steps of a plain measurement, and of an instrumented one
PROFILE = "profile"  # .json, .html
TRACE = "trace.json.gz"
_LOADER_IMAGES = 256
_WORKER_STAGES = {  # method of data.rendering.Worker -> stage
    "__call__": "total",
    "decode": "decode",
    "decode_reduced": "decode",
    "crop": "crop",
    "augment": "augment",
}


def profile(config: Config, *, steps: int, out: Path) -> dict[str, Any]:
    """Profile a training step; write profile.json, profile.html and trace.json.gz into `out`.

    Under torchrun every rank calls this; rank 0 writes and logs its own step.

    Args:
        steps: instrumented steps. As many plain steps are timed as well.

    Returns:
        The content of profile.json.

    Raises:
        InputError: the config does not fit the data or the machine, or `out` cannot be written.
        RunError: writing `out` failed after the measurement.
    """
    if steps < 1:
        raise InputError(f"--steps {steps}: must be at least 1")
    with open_training(config, lambda: _make_folder(out)) as training:
        is_main_process = training.world.is_main_process
        loop, instruments = Loop(training), Instruments(training)
        try:
            timed = _time(loop, instruments, steps)
            traced = trace(loop, instruments, out / TRACE if is_main_process else None)
        finally:
            loop.close()
        result = {"what": training.describe(), "steps": steps} | timed
        result["loader_threads"] = loader_threads(training)
        result["roofline"] = _roofline(training, timed, instruments)
        result |= traced
        result["counts"] = counts(result)
        result |= {"config": training.config.to_dict(), "environment": environment.describe()}
    if is_main_process:
        from fastbyol.tools.profile_page import write_profile_page  # imports matplotlib, which bench does not need

        write_json(out / f"{PROFILE}.json", result, f"--out {out}")
        for line in lines(result):
            logger.info(line)
        logger.info(f"wrote {write_profile_page(out, result)} and {out / TRACE} (chrome://tracing, ui.perfetto.dev)")
    return result


def _make_folder(out: Path) -> None:
    try:
        make_folder(out)
        (out / f"{PROFILE}.json").touch()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None


def _time(loop: Loop, instruments: Instruments, steps: int) -> dict[str, Any]:
    """Time windows of plain and of instrumented steps, interleaved."""
    device, batch = loop.training.device, loop.training.config.data.batch_size
    loop.warm_up()
    with instruments.recording(instruments.clock()):
        loop.warm_up()
    plain: list[float] = []
    ratios: list[float] = []
    found: list[dict[str, float]] = []
    compiled = _compilations()
    while len(found) < steps:
        n = min(WINDOW[device.type], steps - len(found))
        if loop.training.step.mode == "cuda_graph":
            loop()  # captures the graph again
        plain.append(1e3 * loop.timed(n) / n)
        clock = instruments.clock()
        with instruments.recording(clock):
            for _ in range(n):
                loop()
        clock.close()
        loop.synchronize()
        found += clock.steps()
        ratios.append(sum(sum(step.values()) for step in found[-n:]) / n / plain[-1])
    totals = [sum(step.values()) for step in found]
    rows = []
    for part in instruments.parts:
        values = [step.get(part, 0.0) for step in found]
        rows.append({"part": part, **spread(values), "share": sum(values) / sum(totals)})
    return {
        "images_per_s": 1e3 * batch / median(plain),
        "step_ms": {"p50": median(plain), "least": min(plain), "most": max(plain)},
        "marked_step_ms": spread(totals),
        "parts": rows,
        "parts_over_step": {"p50": median(ratios), "least": min(ratios), "most": max(ratios)},
    } | _compiler(loop.training.step.mode, compiled)


def _compiler(mode: str, before: int) -> dict[str, int | None]:
    """Return graph breaks of this process, and graphs compiled since there were `before`.

    None in eager mode.
    """
    if mode == "eager":
        return {"graph_breaks": None, "recompilations": None}
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"graph_breaks": breaks, "recompilations": _compilations() - before}


def _compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def loader_threads(training: Training) -> dict[str, float] | None:
    """Measure the milliseconds per image that loader threads spend on read, decode, crop, augment
    and the rest.

    Crop and augment are those of both views. Reading is wall time of a reader, the others are CPU
    time of a worker.

    Returns:
        stage -> ms; None for a loader whose work is done by threads of other libraries.
    """
    if not isinstance(training.loader, native.NativeLoader):
        return None
    if training.device.type == "cuda" and hasattr(training.loader, "_render"):
        return None
    loader = copy.copy(training.loader)  # the run's own loader is not touched
    fetch, reads, workers = loader.fetch, list[float](), list[Any]()

    def timed_fetch(index: int) -> Any:
        start = time.perf_counter()
        data = fetch(index)
        reads.append(time.perf_counter() - start)
        return data

    loader.fetch = timed_fetch
    loader.worker_class = _timed_worker(loader.worker_class, workers)
    steps = max(1, -(-_LOADER_IMAGES // loader.batch_size))
    for _ in loader.batches(0, steps):
        pass
    images = steps * loader.batch_size
    seconds = {stage: sum(worker.seconds[stage] for worker in workers) for stage in set(_WORKER_STAGES.values())}
    ms = {stage: 1e3 * value / images for stage, value in (seconds | {"read": sum(reads)}).items()}
    stages = {stage: ms[stage] for stage in ("read", "decode", "crop", "augment")}
    return stages | {"rest": ms["total"] - ms["decode"] - ms["crop"] - ms["augment"]}


def _timed_worker(base: type[native.Worker], workers: list[Any]) -> type[native.Worker]:
    """Return a subclass of a loader's worker that adds up the CPU time of each stage; its objects
    are added to `workers`.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        self.seconds = defaultdict(float)
        workers.append(self)

    def timed(method: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            start = time.thread_time()
            try:
                return method(self, *args)
            finally:
                self.seconds[stage] += time.thread_time() - start

        return call

    methods = {name: timed(getattr(base, name), stage) for name, stage in _WORKER_STAGES.items()}
    return type("TimedWorker", (base,), methods | {"__init__": init})


def _roofline(training: Training, timed: dict[str, Any], instruments: Instruments) -> dict[str, Any]:
    """Return counted work next to measured peaks and times."""
    images = training.config.data.batch_size // training.world.size
    counted = count_step(training.config, images, training.step.dtype)
    peaks = measure_peaks(training.device, training.step.dtype)
    counted[instruments.update] = counted.pop(UPDATE)
    measured = {row["part"]: row["mean_ms"] for row in timed["parts"]}
    step_s = timed["step_ms"]["p50"] / 1e3
    flops = sum(work.flops for work in counted.values())
    return {
        "peak_flops_per_s": peaks.flops_per_s,
        "peak_bytes_per_s": peaks.bytes_per_s,
        "flops": flops,
        "bytes": sum(work.bytes for work in counted.values()),
        "units": units(counted),
        "mfu": flops / step_s / peaks.flops_per_s,
        "roofline_ms": sum(1e3 * work.roofline_s(peaks) for work in counted.values()),
        "parts": {name: _against(work, measured[name], peaks) for name, work in counted.items()},
    }


def _against(work: Work, measured_ms: float, peaks: Peaks) -> dict[str, float]:
    bound = 1e3 * work.roofline_s(peaks)
    return {
        "gflop": work.flops / 1e9,
        "gbyte": work.bytes / 1e9,
        "roofline_ms": bound,
        "measured_ms": measured_ms,
        "share_of_roofline": bound / measured_ms if measured_ms else 0.0,
    }


def counts(result: dict[str, Any]) -> str:
    """Return host syncs, graph breaks and recompilations as text; a good step has none."""
    graphs = "not compiled"
    if result["graph_breaks"] is not None:
        graphs = f"graph breaks: {result['graph_breaks']}; recompilations after warm-up: {result['recompilations']}"
    return f"host syncs a step: {result['host_syncs_per_step']:g}; {graphs}"


def lines(result: dict[str, Any]) -> list[str]:
    """Return the profile as text."""
    step, ratio, roof = result["step_ms"], result["parts_over_step"], result["roofline"]
    text = [f"{'':<18}   mean ms       %      p20      p50      p95"]
    for row in result["parts"]:
        values = "".join(f"{row[key]:9.2f}" for key in ("p20_ms", "p50_ms", "p95_ms"))
        text.append(f"{row['part']:<18}{row['mean_ms']:10.2f}{100 * row['share']:8.1f}{values}")
    total = result["marked_step_ms"]
    values = "".join(f"{total[key]:9.2f}" for key in ("p20_ms", "p50_ms", "p95_ms"))
    text.append(f"{'sum':<18}{total['mean_ms']:10.2f}{100:8.1f}{values}")
    text.append(
        f"plain step: {step['p50']:.2f} ms ({step['least']:.2f}-{step['most']:.2f}), {result['images_per_s']:.1f} images/s; "
        f"the parts add up to {100 * ratio['p50']:.1f} % of it ({100 * ratio['least']:.1f}-{100 * ratio['most']:.1f})"
    )
    if (threads := result["loader_threads"]) is not None:
        parts = ", ".join(f"{name} {ms:.3f}" for name, ms in threads.items())
        text.append(f"loader threads, ms of one thread an image: {parts}")
    text.append(
        f"{roof['flops'] / 1e9:.1f} GFLOP and {roof['bytes'] / 1e9:.2f} GB a step; peaks measured here: "
        f"{roof['peak_flops_per_s'] / 1e9:,.0f} GFLOP/s, {roof['peak_bytes_per_s'] / 1e9:.1f} GB/s; MFU {100 * roof['mfu']:.1f} %"
    )
    for name, part in roof["parts"].items():
        text.append(
            f"  {name:<16} {part['gflop']:9.1f} GFLOP {part['gbyte']:8.3f} GB  roofline {part['roofline_ms']:8.2f} ms = "
            f"{100 * part['share_of_roofline']:.0f} % of what it takes"
        )
    text.append(result["counts"])
    text.append(f"operators by their own time, of {result['kernels_ms']:.1f} ms a step:")
    for row in result["kernels"][:12]:
        text.append(f"  {row['ms']:9.2f} ms {100 * row['share']:5.1f} %  {row['calls']:7.1f} calls  {row['name']}")
    return text
