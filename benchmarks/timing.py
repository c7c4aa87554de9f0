"""One way to time a contender: warm up, then rounds of a few calls each, with the device's work waited for."""

from collections.abc import Callable

import torch
from pytest_benchmark.fixture import BenchmarkFixture


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
    calls = 20 if device == "cuda" else 1

    def run() -> None:
        for _ in range(calls):
            call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(
        {"round": turn, "set": set_name, "contender": contender, "device": device, "calls": calls, "bytes": moved}
    )
    benchmark.pedantic(run, warmup_rounds=2, rounds=7, iterations=1)
