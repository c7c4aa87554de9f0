"""Timing of spans: a recorder for fastbyol.spans."""

import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch

from fastbyol.spans import WAIT

REST = "rest"


class Clock:
    """Recorder that measures how long each span takes, and the time between spans as "rest".

    On a CPU it reads the clock. On a GPU it records events on the stream, so that a part takes as
    long as the GPU works on it, or waits in it. A step begins with the span WAIT.

    Args:
        labels: span -> name of the part, where they differ.
        name_ranges: also pass the parts' names to torch's profiler, and on a GPU to Nsight Systems
            (NVTX).
    """

    def __init__(
        self, device: torch.device, labels: dict[str, str] | None = None, *, name_ranges: bool = False
    ) -> None:
        self._cuda, self._labels, self._name_ranges = device.type == "cuda", labels or {}, name_ranges
        self._marks: list[tuple[str, Any]] = []  # part, when it begins
        self._range: Any = None

    def begin(self, name: str) -> None:
        """A span begins."""
        self.mark(self._labels.get(name, name))

    def end(self, name: str) -> None:
        """A span ends."""
        self.mark(REST)

    def mark(self, part: str, *, name_range: bool = True) -> None:
        """A part begins and the one before ends.

        Args:
            name_range: False in another thread than the one that opens the spans.
        """
        if self._name_ranges and name_range:
            self._end_range()
            self._begin_range(part)
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter_ns()))

    def close(self) -> None:
        """End the last part."""
        self.mark(REST)
        self._end_range()

    def steps(self) -> list[dict[str, float]]:
        """Return the milliseconds of each part, for every step. On a GPU, synchronize first."""
        steps: list[dict[str, float]] = []
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if part == WAIT:
                steps.append(defaultdict(float))
            steps[-1][part] += begin.elapsed_time(end) if self._cuda else (end - begin) / 1e6
        return steps

    def _begin_range(self, part: str) -> None:
        self._range = torch.profiler.record_function(part)
        self._range.__enter__()
        if self._cuda:
            torch.cuda.nvtx.range_push(part)

    def _end_range(self) -> None:
        if self._range is None:
            return
        self._range.__exit__(None, None, None)
        self._range = None
        if self._cuda:
            torch.cuda.nvtx.range_pop()


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and percentiles of milliseconds."""
    p20, p50, p95 = (float(v) for v in np.percentile(values, (20, 50, 95)))
    return {"mean_ms": float(np.mean(values)), "p20_ms": p20, "p50_ms": p50, "p95_ms": p95}
