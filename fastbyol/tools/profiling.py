"""Where the milliseconds of a training step go: `fastbyol profile`.

Steps are timed in two ways that take turns: as a run carries them out, and with marks where one part ends and the next begins. On a CPU a mark
reads the clock; on a GPU it is an event on the stream, so that a part lasts as long as the GPU works on it or waits in it. The marks are put
around the methods of the objects of a run and taken away again: a run that is not profiled has nothing of them. Whole-network compilation
leaves nothing between target and online network to mark, so with marks they are two graphs; the sum of the parts beside the step as a run
has it says what that costs.

Parts, in the order of a step:
    wait for data       the loop has nothing to do until the batch is there
    copy                on a GPU: what of the copy from pinned memory is not hidden behind the step before
    augmentation        on a GPU with DALI: crops and both views, from decoded images. Elsewhere loader threads do it: see `loader_threads`
    target forward, online forward (with the loss), backward
    gradient exchange   over several ranks: what of it is not hidden behind the backward pass, after the last gradient is there
    LARS + target       new weights and the moved target, in one pass (other optimizers: two)
    rest                cast, scalars, bookkeeping
"""

import bisect
import copy
import dataclasses
import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from fastbyol import batch_size
from fastbyol.config import Config
from fastbyol.data import ImageSet, build_loader, choose_backend, find_images, native
from fastbyol.data.batch import Batch, Loader
from fastbyol.errors import InputError
from fastbyol.kernels import dispatch
from fastbyol.model import BYOL, build_model
from fastbyol.runtime import cores, environment
from fastbyol.runtime.distributed import ProcessGroup, World, world_from_environment
from fastbyol.runtime.files import make_folder, write_json
from fastbyol.step import TrainStep, choose_device
from fastbyol.tools.roofline import BACKWARD, ONLINE, TARGET, Peaks, Work, count_step, measure_peaks, units
from fastbyol.tools.roofline import UPDATE as _UPDATE_WORK

K = TypeVar("K")
WAIT, COPY, AUGMENT, EXCHANGE, REST = "wait for data", "copy", "augmentation", "gradient exchange", "rest"
WINDOW = {"cpu": 5, "cuda": 20}  # steps of a measurement without marks, and of one with them
TRACED_STEPS = 2
KERNELS = 25  # rows of the table
PROFILE = "profile"  # .json, .html
TRACE = "trace.json.gz"
_WARM_UP = {"cpu": 2, "cuda": 15}  # steps beside those that empty the loader's ring
_LOADER_IMAGES = 256
_WORKER_STAGES = {  # method of data.rendering.Worker -> stage
    "__call__": "total",
    "decode": "decode",
    "decode_reduced": "decode",
    "crop": "crop",
    "augment": "augment",
}


@dataclass
class Training:
    """The parts of a run, put together as train.py does, without a folder."""

    config: Config
    world: World
    device: torch.device
    images: ImageSet
    model: BYOL
    step: TrainStep
    loader: Loader

    def describe(self) -> str:
        """What runs where, in a line."""
        model, backend = self.config.model, choose_backend(self.config.data, self.images, self.device)[0]
        return (
            f"{model.backbone} (width {model.width:g}) at {self.config.data.image_size_px} px, batch {self.config.data.batch_size} on "
            f"{self.world.size} x {self.device}, {str(self.step.dtype).removeprefix('torch.')}, step {self.step.mode}, "
            f"images by {backend}"
        )


def build(config: Config, world: World, device: torch.device, say: Callable[[str], None]) -> Training:
    """A run's parts, with random weights.

    Raises:
        InputError: the config does not fit the data or the machine.
    """
    with world.sync_errors():
        images = find_images(config.data, "train")
        dispatch.compile_cpu_kernels(say)
        fits = batch_size.find_batch_size(config, device, world) if config.data.batch_size == "auto" else 0
    if fits:
        size = batch_size.global_batch_size(fits, images, config, world)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))
    with world.sync_errors():
        model = build_model(config.model, config.data.image_size_px, config.seed)
        model = model.to(device=device, memory_format=torch.channels_last)
        step = TrainStep(model, config, max(len(images) // config.data.batch_size, 1), device, world)
        loader = build_loader(
            config.data,
            images,
            seed=config.seed,
            device=device,
            dtype=step.dtype,
            shard=world.shard(config.data.batch_size, config.step.micro_batches),
        )
    return Training(config, world, device, images, model, step, loader)


@contextmanager
def opened(config: Config, check: Callable[[], None], say: Callable[[str], None]) -> Iterator[Training]:
    """Context: a run's parts, on every rank where torchrun has started several; the first says what is measured.

    Args:
        check: called by the first rank before anything is built; raises InputError where nothing should be.

    Raises:
        InputError: `check` does, or the config does not fit the data or the machine.
    """
    cores.respect_quota()
    world = world_from_environment()
    device = choose_device(config.device, world.local_rank)
    with ProcessGroup(world, config.distributed, device):
        with world.sync_errors():
            if world.is_main_process:
                check()
        training = build(config, world, device, say if world.is_main_process else lambda text: None)
        if world.is_main_process:
            say(f"measuring {training.describe()}")
        with closing(training.step):
            yield training


class Loop:
    """The loop of train.py without logs and evaluation; data never ends."""

    def __init__(self, training: Training) -> None:
        self.training, self._done = training, 0
        self._batches: Any = training.loader.batches(0, 10**9)

    def __call__(self, clock: "Clock | None" = None) -> None:
        """Waits for a batch and does a step on it."""
        if clock is not None:
            clock.mark(WAIT)
        batch = next(self._batches)
        if clock is not None:
            clock.mark(REST)
        self.step(batch)

    def step(self, batch: Batch) -> None:
        """A step on a given batch."""
        step = self.training.step
        step(min(self._done, step.total_steps - 1), batch)
        self._done += 1

    def skip(self) -> None:
        """Waits for a batch and drops it."""
        next(self._batches)

    def resident_batch(self) -> Batch:
        """A copy of the next batch, which stays."""
        batch = next(self._batches)
        view1, view2 = (torch.empty_like(view).copy_(view) for view in batch.views)
        return Batch((view1, view2), batch.labels.clone(), batch.indices.clone())

    def warm_up(self) -> None:
        """Steps until everything is compiled and no batch is left that was made before."""
        config, device = self.training.config.data, self.training.device
        for _ in range(_WARM_UP[device.type] + config.prefetch_batches + 1):
            self()
        self.synchronize()

    def timed(self, steps: int, call: Callable[[], object] | None = None) -> float:
        """Seconds of so many calls, by default whole steps; the GPU is waited for before and after."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            (call or self)()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Waits for the GPU, if there is one."""
        if self.training.device.type == "cuda":
            torch.cuda.synchronize(self.training.device)

    def close(self) -> None:
        """Stops the loader."""
        self._batches.close()


class Clock:
    """Notes where a part of a step ends and the next begins.

    Args:
        names_ranges: also give the parts' names to torch's profiler, and on a GPU to Nsight (NVTX).
    """

    def __init__(self, device: torch.device, *, names_ranges: bool = False) -> None:
        self._cuda, self._names_ranges = device.type == "cuda", names_ranges
        self._marks: list[tuple[str, Any]] = []
        self._range: Any = None

    def mark(self, part: str, *, here: bool = True) -> None:
        """`part` begins. `here`: in the thread that made the other marks."""
        if self._names_ranges and here:
            self._name(part)
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter_ns()))

    def close(self) -> None:
        """The last part ends."""
        self.mark(REST)
        if self._range is not None:
            self._range.__exit__(None, None, None)
            if self._cuda:
                torch.cuda.nvtx.range_pop()

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds by part, of every step; on a GPU after its queue has been waited for."""
        found: list[dict[str, float]] = []
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part == WAIT:
                found.append(defaultdict(float))
            found[-1][part] += begin.elapsed_time(end) if self._cuda else (end - begin) / 1e6
        return found

    def _name(self, part: str) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            if self._cuda:
                torch.cuda.nvtx.range_pop()
        self._range = torch.profiler.record_function(part)
        self._range.__enter__()
        if self._cuda:
            torch.cuda.nvtx.range_push(part)


class Marks:
    """Puts a clock's marks around the methods of a run's objects.

    Where the run has one compiled graph, or one captured graph, the parts are compiled graphs of their own, made once.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        model, step = training.model, training.step
        self._whole = training.world.size == 1 and step.mode != "eager"  # one graph in a run
        self._targets, self._predict = model.targets, model.predict
        if self._whole:
            self._targets = torch.compile(model.targets, fullgraph=True, dynamic=False)
            self._predict = torch.compile(model.predict, fullgraph=True, dynamic=False)
        self.update = "LARS + target" if getattr(step.optimizer, "moves_target", False) else "optimizer + target"
        self.parts = [WAIT, COPY, AUGMENT, TARGET, ONLINE, BACKWARD, EXCHANGE, self.update, REST]

    @contextmanager
    def on(self, clock: Clock) -> Iterator[None]:
        """While this is entered, steps are marked."""
        model, step, loader = self._training.model, self._training.step, self._training.loader
        step.drop_graph()  # its memory is as large as that of the steps that follow

        def around(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def marked(*args: Any, **kwargs: Any) -> Any:
                clock.mark(part)
                result = call(*args, **kwargs)
                clock.mark(REST)
                return result

            return marked

        with ExitStack() as stack:

            def put(where: Any, name: str, value: Any) -> None:
                stack.enter_context(patch.object(where, name, value))

            put(model, "targets", around(TARGET, self._targets))
            put(model, "predict", around(ONLINE, self._predict))
            put(step, "_backward", around(BACKWARD, step._backward))
            put(step, "_update", around(self.update, step._update))
            if self._whole:
                put(step, "_forward", model.forward)
                put(step, "mode", "compile")
            if hasattr(loader, "_render"):  # DALI on a GPU
                put(loader, "_render", around(AUGMENT, loader._render))
            if self._training.device.type == "cuda":
                put(native.DeviceSlots, "fill", _method(around, COPY, native.DeviceSlots.fill))
            if self._training.world.size > 1:
                stack.enter_context(self._last_gradient(clock))
            yield

    @contextmanager
    def _last_gradient(self, clock: Clock) -> Iterator[None]:
        """Marks the exchange when every parameter's own gradient is there."""
        trained = [p for p in self._training.model.parameters() if p.requires_grad]
        there = 0

        def count(p: nn.Parameter) -> None:
            nonlocal there
            there += 1
            if there % len(trained) == 0:
                clock.mark(EXCHANGE, here=self._training.device.type == "cpu")

        handles = [p.register_post_accumulate_grad_hook(count) for p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _method(around: Callable[..., Any], part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A marked function that a class binds to its objects, as it did with `method`."""

    def bound(self: Any, *args: Any) -> Any:
        return around(part, method)(self, *args)

    return bound


def profile(config: Config, *, steps: int, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Profiles a run's step and writes profile.json, profile.html and trace.json.gz into `out`.

    Under torchrun every rank calls this; rank 0 writes and speaks, of its own step.

    Args:
        steps: with marks; as many without, in turn.

    Returns:
        what profile.json holds.

    Raises:
        InputError: the config does not fit the data or the machine, or `out` cannot be written.
        RunError: `out` could not be written in the end.
    """
    if steps < 1:
        raise InputError(f"--steps {steps}: must be at least 1")
    with opened(config, lambda: _make_folder(out), say) as training:
        world = training.world
        loop, marks = Loop(training), Marks(training)
        try:
            timed = _time(loop, marks, steps)
            traced = _trace(loop, marks, out / TRACE if world.is_main_process else None)
        finally:
            loop.close()
        result = {"what": training.describe(), "steps": steps} | timed
        result["loader_threads"] = loader_threads(training)
        result["roofline"] = _roofline(training, timed, marks)
        result |= traced
        result["counts"] = counts(result)
        result |= {"config": training.config.to_dict(), "environment": environment.describe()}
    if world.is_main_process:
        from fastbyol.tools.profile_page import (
            write_profile_page,  # and with it matplotlib, for which bench need not wait
        )

        write_json(out / f"{PROFILE}.json", result, f"--out {out}")
        for line in lines(result):
            say(line)
        say(f"wrote {write_profile_page(out, result)} and {out / TRACE} (chrome://tracing, ui.perfetto.dev)")
    return result


def _make_folder(out: Path) -> None:
    try:
        make_folder(out)
        (out / f"{PROFILE}.json").touch()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None


def _time(loop: Loop, marks: Marks, steps: int) -> dict[str, Any]:
    """Windows of steps without and with marks, in turn."""
    device, batch = loop.training.device, loop.training.config.data.batch_size
    loop.warm_up()
    with marks.on(Clock(device)):
        loop.warm_up()
    plain: list[float] = []
    with_marks: list[float] = []
    found: list[dict[str, float]] = []
    compiled = _compilations()
    while len(found) < steps:
        n = min(WINDOW[device.type], steps - len(found))
        if loop.training.step.mode == "cuda_graph":
            loop()  # captures the graph anew
        plain.append(1e3 * loop.timed(n) / n)
        clock = Clock(device)
        with marks.on(clock):
            for _ in range(n):
                loop(clock)
        clock.close()
        loop.synchronize()
        found += clock.steps()
        with_marks.append(sum(sum(step.values()) for step in found[-n:]) / n)
    totals = [sum(step.values()) for step in found]
    rows = []
    for part in marks.parts:
        values = [step.get(part, 0.0) for step in found]
        rows.append({"part": part, **_spread(values), "share": sum(values) / sum(totals)})
    ratios = [b / a for a, b in zip(plain, with_marks, strict=True)]
    return {
        "images_per_s": 1e3 * batch / median(plain),
        "step_ms": {"p50": median(plain), "least": min(plain), "most": max(plain)},
        "marked_step_ms": _spread(totals),
        "parts": rows,
        "parts_over_step": {"p50": median(ratios), "least": min(ratios), "most": max(ratios)},
    } | _compiler(loop.training.step.mode, compiled)


def _compiler(mode: str, before: int) -> dict[str, int | None]:
    """Graph breaks of this process, and graphs compiled since there were `before`; None of an eager step, which has no graphs."""
    if mode == "eager":
        return {"graph_breaks": None, "recompilations": None}
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return {"graph_breaks": breaks, "recompilations": _compilations() - before}


def _compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _spread(values: list[float]) -> dict[str, float]:
    p20, p50, p95 = (float(v) for v in np.percentile(values, (20, 50, 95)))
    return {"mean_ms": float(np.mean(values)), "p20_ms": p20, "p50_ms": p50, "p95_ms": p95}


def _trace(loop: Loop, marks: Marks, out: Path | None) -> dict[str, Any]:
    """Two marked steps under torch's profiler: operators by time, host syncs, memory over time; the trace goes to `out`."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports CPU-only machines as errors
    device = loop.training.device
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    loop.synchronize()
    gc.collect()
    base = torch.cuda.memory_allocated(device) if cuda else 0
    clock = Clock(device, names_ranges=True)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, marks.on(clock):
        for _ in range(TRACED_STEPS):
            loop(clock)
        clock.close()
        loop.synchronize()
    if out is not None:
        profiler.export_chrome_trace(str(out))
    events = [e for e in profiler.events() if e.name != "[memory]" and not e.name.startswith("ProfilerStep")]
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    operators = list(_operators(on_host, set(marks.parts), cuda=cuda))
    if cuda:
        on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in marks.parts)
        kernels = _add_up((e.name, e.time_range.elapsed_us()) for e in on_device)
    else:
        kernels = _add_up((name, own) for _, name, own in operators)
    by_part: dict[str, list[dict[str, Any]]] = {part: [] for part in marks.parts}
    for (part, name), (ms, calls) in _add_up(((part, name), own) for part, name, own in operators).items():
        by_part[part].append({"name": name, "ms": ms, "calls": calls})
    total = sum(ms for ms, _ in kernels.values())
    # After the last part we synchronize, and so does the profiler.
    last = max(e.time_range.end for e in on_host if e.name in marks.parts)
    syncs = sum(_is_sync(e.name) and e.time_range.start < last for e in on_host)
    return {
        "kernels": [
            {"name": name, "ms": ms, "calls": calls, "share": ms / total}
            for name, (ms, calls) in list(kernels.items())[:KERNELS]
        ],
        "kernels_ms": total,
        "operators": by_part,
        "host_syncs_per_step": syncs / TRACED_STEPS,
        "memory": _memory_timeline(profiler, set(marks.parts), device, base),
    }


def _operators(events: list[Any], parts: set[str], *, cuda: bool) -> Iterator[tuple[str, str, float]]:
    """Part during which the host called it, name, and microseconds of its own; on a GPU those of the kernels that it started."""
    spans = sorted((e.time_range.start, e.name) for e in events if e.name in parts)
    begins = [begin for begin, _ in spans]
    for event in events:
        k = bisect.bisect_right(begins, event.time_range.start) - 1
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if k >= 0 and own > 0 and not (cuda and event.name in parts):
            yield spans[k][1], "numba kernels, Python" if event.name in parts else event.name, own


def _add_up(rows: Iterable[tuple[K, float]]) -> dict[K, tuple[float, float]]:
    """Key -> ms and calls a step, longest first, from microseconds of every call in the traced steps."""
    found: dict[K, list[float]] = defaultdict(list)
    for key, microseconds in rows:
        found[key].append(microseconds)
    sums = {key: (sum(values) / 1e3 / TRACED_STEPS, len(values) / TRACED_STEPS) for key, values in found.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def _is_sync(name: str) -> bool:
    return name == "aten::_local_scalar_dense" or (name.startswith("cuda") and name.endswith("Synchronize"))


def _memory_timeline(profiler: Any, parts: set[str], device: torch.device, base: int) -> dict[str, Any]:
    """Bytes that torch's allocator holds over the traced steps, above those at their beginning on a CPU, and when parts begin."""
    events = profiler.profiler.kineto_results.events()
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    spans = sorted((e.start_ns(), e.duration_ns(), e.name()) for e in events if e.name() in parts and e.duration_ns())
    begin = spans[0][0]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == kind)
    held = base + np.cumsum([size for _, size in changes])
    return {
        "ms": [round((at - begin) / 1e6, 3) for at, _ in changes],
        "bytes": [int(value) for value in held],
        "parts": [{"part": name, "ms": (at - begin) / 1e6, "length_ms": length / 1e6} for at, length, name in spans],
        "base_bytes": base,
    }


def loader_threads(training: Training) -> dict[str, float] | None:
    """Measure the milliseconds per image that loader threads spend on read, decode, crop, augment and the rest.

    Crop and augment are those of both views. Reading is wall time of a reader, the others are CPU time of a worker.

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
    """Return a subclass of a loader's worker that adds up the CPU time of each stage; its objects are added to `workers`."""

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


def _roofline(training: Training, timed: dict[str, Any], marks: Marks) -> dict[str, Any]:
    """Counted work beside measured peaks and times."""
    images = training.config.data.batch_size // training.world.size
    counted = count_step(training.config, images, training.step.dtype)
    peaks = measure_peaks(training.device, training.step.dtype)
    counted[marks.update] = counted.pop(_UPDATE_WORK)
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
    """What must not happen in a step, as text."""
    graphs = "not compiled"
    if result["graph_breaks"] is not None:
        graphs = f"graph breaks: {result['graph_breaks']}; recompilations after warm-up: {result['recompilations']}"
    return f"host syncs a step: {result['host_syncs_per_step']:g}; {graphs}"


def lines(result: dict[str, Any]) -> list[str]:
    """The profile as text."""
    step, ratio, roof = result["step_ms"], result["parts_over_step"], result["roofline"]
    text = [f"{'':<18}   mean ms       %      p20      p50      p95"]
    for row in result["parts"]:
        values = "".join(f"{row[key]:9.2f}" for key in ("p20_ms", "p50_ms", "p95_ms"))
        text.append(f"{row['part']:<18}{row['mean_ms']:10.2f}{100 * row['share']:8.1f}{values}")
    total = result["marked_step_ms"]
    values = "".join(f"{total[key]:9.2f}" for key in ("p20_ms", "p50_ms", "p95_ms"))
    text.append(f"{'sum':<18}{total['mean_ms']:10.2f}{100:8.1f}{values}")
    text.append(
        f"a step without marks: {step['p50']:.2f} ms ({step['least']:.2f}-{step['most']:.2f}), {result['images_per_s']:.1f} images/s; "
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
