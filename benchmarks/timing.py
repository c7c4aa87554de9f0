"""One way to time a contender: warm up, then rounds of a few calls each, with the device's work waited for."""

import time
from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture

MOST_CALLS = {"cpu": 1, "cuda": 20}  # of a round; a GPU's queue fills only where several are sent
ROUND_S = 0.2  # as many calls as fit, at least one: what takes long needs no second


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
    """Times `call`.

    Args:
        turn: number of this round.
        set_name: what it works on.
        moved: bytes that a call must read and write; of contenders that move more, what they would have to.
    """
    for _ in range(2):  # compiles, allocates
        seconds = _seconds(call, device)
    calls = calls_of_a_round(seconds, device)

    def run() -> None:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        {"round": turn, "set": set_name, "contender": contender, "device": device, "calls": calls, "bytes": moved}
    )
    benchmark.pedantic(run, warmup_rounds=1 if calls > 1 else 0, rounds=7, iterations=1)


def calls_of_a_round(seconds: float, device: str) -> int:
    """How many calls that take so long each."""
    return max(1, min(MOST_CALLS[device], int(ROUND_S / max(seconds, 1e-9))))


def _seconds(call: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
