"""Instrumented steps under torch's profiler: operators, host syncs, and memory over time."""

import bisect
import gc
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from fastbyol.tools.instruments import Instruments, Loop

K = TypeVar("K")
TRACED_STEPS = 2
KERNELS = 25  # rows of the table


def trace(loop: Loop, instruments: Instruments, out: Path | None) -> dict[str, Any]:
    """Trace two instrumented steps; write the Chrome trace to `out`, if given."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it reports a missing GPU as an error
    device, parts = loop.training.device, instruments.parts
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    loop.synchronize()
    gc.collect()
    base = torch.cuda.memory_allocated(device) if cuda else 0
    clock = instruments.clock(name_ranges=True)
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, instruments.recording(clock):
        for _ in range(TRACED_STEPS):
            loop()
        clock.close()
        loop.synchronize()
    if out is not None:
        profiler.export_chrome_trace(str(out))
    events = [e for e in profiler.events() if e.name != "[memory]" and not e.name.startswith("ProfilerStep")]
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    operators = list(_operators(on_host, set(parts), cuda=cuda))
    if cuda:
        on_device = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name not in parts)
        kernels = _add_up((e.name, e.time_range.elapsed_us()) for e in on_device)
    else:
        kernels = _add_up((name, own) for _, name, own in operators)
    by_part: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for (part, name), (ms, calls) in _add_up(((part, name), own) for part, name, own in operators).items():
        by_part[part].append({"name": name, "ms": ms, "calls": calls})
    total = sum(ms for ms, _ in kernels.values())
    # After the last part, we and the profiler synchronize.
    last = max(e.time_range.end for e in on_host if e.name in parts)
    syncs = sum(_is_sync(e.name) and e.time_range.start < last for e in on_host)
    return {
        "kernels": [
            {"name": name, "ms": ms, "calls": calls, "share": ms / total}
            for name, (ms, calls) in list(kernels.items())[:KERNELS]
        ],
        "kernels_ms": total,
        "operators": by_part,
        "host_syncs_per_step": syncs / TRACED_STEPS,
        "memory": _memory_timeline(profiler, set(parts), device, base),
    }


def _operators(events: list[Any], parts: set[str], *, cuda: bool) -> Iterator[tuple[str, str, float]]:
    """Yield for every operator: the part that called it, its name, its own microseconds (on a GPU
    those of its kernels).
    """
    spans = sorted((e.time_range.start, e.name) for e in events if e.name in parts)
    begins = [begin for begin, _ in spans]
    for event in events:
        k = bisect.bisect_right(begins, event.time_range.start) - 1
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if k >= 0 and own > 0 and not (cuda and event.name in parts):
            yield spans[k][1], "numba kernels, Python" if event.name in parts else event.name, own


def _add_up(rows: Iterable[tuple[K, float]]) -> dict[K, tuple[float, float]]:
    """Return ms and calls per step by key, longest first, from (key, microseconds) of each call."""
    found: dict[K, list[float]] = defaultdict(list)
    for key, microseconds in rows:
        found[key].append(microseconds)
    sums = {key: (sum(values) / 1e3 / TRACED_STEPS, len(values) / TRACED_STEPS) for key, values in found.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def _is_sync(name: str) -> bool:
    return name == "aten::_local_scalar_dense" or (name.startswith("cuda") and name.endswith("Synchronize"))


def _memory_timeline(profiler: Any, parts: set[str], device: torch.device, base: int) -> dict[str, Any]:
    """Return the allocator's bytes over the traced steps, and when the parts begin.

    On a CPU bytes count from the first step.
    """
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
