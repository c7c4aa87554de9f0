"""Timing of kernels with pytest-benchmark: warm-up, then repeated and synchronized calls."""

import time
from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture

MAX_CALLS = {"cpu": 1, "cuda": 20}  # per measurement; a single call does not fill a GPU's queue
TARGET_S = 0.2  # duration of a measurement


def measure(
    benchmark: BenchmarkFixture,
    call: Callable[[], object],
    *,
    device: str,
    turn: int,
    set_name: str,
    contender: str,
    moved: int,
) -> None:
    """Time `call` and record its row.

    Args:
        benchmark: Fixture of pytest-benchmark.
        call: The operation.
        device: "cpu" or "cuda".
        turn: Index of the round.
        set_name: Workload.
        contender: Implementation.
        moved: Minimum number of bytes that the operation reads and writes.
    """
    for _ in range(2):  # compiles and allocates
        seconds = _seconds(call, device)
    calls = calls_per_measurement(seconds, device)

    def run() -> None:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        {"round": turn, "set": set_name, "contender": contender, "device": device, "calls": calls, "bytes": moved}
    )
    benchmark.pedantic(run, warmup_rounds=1 if calls > 1 else 0, rounds=7, iterations=1)


def calls_per_measurement(seconds: float, device: str) -> int:
    """Return how many calls of the given duration make up one measurement."""
    return max(1, min(MAX_CALLS[device], int(TARGET_S / max(seconds, 1e-9))))


def _seconds(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
