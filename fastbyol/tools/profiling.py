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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from fastbyol.build import Training, build_training, find_training_images, with_batch_size
from fastbyol.config import Config
from fastbyol.data import native
from fastbyol.data.batch import Batch
from fastbyol.errors import InputError
from fastbyol.kernels.cpu.jit_cache import compile_cpu_kernels
from fastbyol.optim import moves_target
from fastbyol.runtime import cores, environment
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.distributed import ProcessGroup, world_from_environment
from fastbyol.runtime.files import make_folder, write_json
from fastbyol.runtime.logging import logger, muted
from fastbyol.spans import AUGMENT, BACKWARD, COPY, ONLINE, TARGET, UPDATE, WAIT, recording
from fastbyol.tools.clock import REST, Clock, spread
from fastbyol.tools.roofline import Peaks, Work, count_step, measure_peaks, units
from fastbyol.tools.trace import trace

EXCHANGE = "gradient exchange"
WINDOW = {"cpu": 5, "cuda": 20}  # steps of a plain measurement, and of an instrumented one
PROFILE = "profile"  # .json, .html
TRACE = "trace.json.gz"
_WARM_UP = {"cpu": 2, "cuda": 15}  # steps, in addition to those that empty the loader's ring
_LOADER_IMAGES = 256
_WORKER_STAGES = {  # method of data.rendering.Worker -> stage
    "__call__": "total",
    "decode": "decode",
    "decode_reduced": "decode",
    "crop": "crop",
    "augment": "augment",
}


@contextmanager
def open_training(config: Config, check: Callable[[], None]) -> Iterator[Training]:
    """Context manager: build a training with random weights, on every rank.

    Rank 0 logs what is measured.

    Args:
        check: called on rank 0 before anything is built; may raise InputError.

    Raises:
        InputError: from `check`, or the config does not fit the data or the machine.
    """
    cores.respect_quota()
    world = world_from_environment()
    device = choose_device(config.device, world.local_rank)
    with ProcessGroup(world, config.distributed, device), muted(not world.is_main_process):
        with world.sync_errors():
            if world.is_main_process:
                check()
        images = find_training_images(config, world)
        compile_cpu_kernels()
        config = with_batch_size(config, images, device, world)
        training = build_training(config, world, device, images)
        logger.info(f"measuring {training.describe()}")
        with closing(training.step):
            yield training


class Loop:
    """The loop of train.py without logs and evaluation, on endless data."""

    def __init__(self, training: Training) -> None:
        self.training, self._done = training, 0
        self._batches = training.batches(0, 10**9)

    def __call__(self) -> None:
        """Wait for a batch and run a step on it."""
        self.step(self._next())

    def step(self, batch: Batch) -> None:
        """Run a step on a given batch."""
        step = self.training.step
        step(min(self._done, step.total_steps - 1), batch)
        self._done += 1

    def skip(self) -> None:
        """Wait for a batch and drop it."""
        self._next()

    def cached_batch(self) -> Batch:
        """Return a copy of the next batch, which stays valid."""
        batch = self._next()
        view1, view2 = (torch.empty_like(view).copy_(view) for view in batch.views)
        return Batch((view1, view2), batch.labels.clone(), batch.indices.clone())

    def warm_up(self) -> None:
        """Run steps until everything is compiled and no batch is left that was prefetched
        before.
        """
        config, device = self.training.config.data, self.training.device
        for _ in range(_WARM_UP[device.type] + config.prefetch_batches + 1):
            self()
        self.synchronize()

    def timed(self, calls: int, call: Callable[[], object] | None = None) -> float:
        """Return the seconds of `calls` calls, by default of whole steps.

        Synchronizes the GPU before and after.
        """
        self.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            (call or self)()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.training.device.type == "cuda":
            torch.cuda.synchronize(self.training.device)

    def close(self) -> None:
        """Stop the loader."""
        self._batches.close()

    def _next(self) -> Batch:
        return next(self._batches)[1]


class Instruments:
    """Records the parts of a training's steps with a clock."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self.update = "LARS + target" if moves_target(training.step.optimizer) else "optimizer + target"
        self.parts = [WAIT, COPY, AUGMENT, TARGET, ONLINE, BACKWARD, EXCHANGE, self.update, REST]

    def clock(self, *, name_ranges: bool = False) -> Clock:
        """Return a clock for this training's parts."""
        return Clock(self._training.device, {UPDATE: self.update}, name_ranges=name_ranges)

    @contextmanager
    def recording(self, clock: Clock) -> Iterator[None]:
        """Context manager: `clock` records all steps."""
        with ExitStack() as stack:
            stack.enter_context(self._training.step.instrumented())
            stack.enter_context(recording(clock))
            if self._training.world.size > 1:
                stack.enter_context(self._mark_last_gradient(clock))
            yield

    @contextmanager
    def _mark_last_gradient(self, clock: Clock) -> Iterator[None]:
        """Context manager: the part "gradient exchange" begins when all of this rank's own
        gradients are ready.
        """
        trained = [p for p in self._training.model.parameters() if p.requires_grad]
        ready = 0

        def count(p: nn.Parameter) -> None:
            nonlocal ready
            ready += 1
            if ready % len(trained) == 0:
                clock.mark(EXCHANGE, name_range=self._training.device.type == "cpu")

        handles = [p.register_post_accumulate_grad_hook(count) for p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


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
