"""torchrun's world: the process group, statistics and gradients over ranks, and how all ranks stop together.

`torchrun --nproc-per-node N -m fastbyol train ...` starts N processes that find each other through the environment (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR). One process without torchrun is a world of one, with no process group at all.

CUDA tensors travel by NCCL, CPU tensors by gloo, in the same group.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from fastbyol.config import DistributedConfig
from fastbyol.errors import FastbyolError, InputError, PeerFailure, RunError, first_line


@dataclass(frozen=True)
class World:
    """Who this process is among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine: the number of its GPU."""
    restarts: int = 0
    """How often torchrun has started the workers anew."""

    @property
    def is_main_process(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def shard(self, batch_size: int, micro_batches: int) -> NDArray[np.int64]:
        """The positions of a global batch that are this rank's: of every micro-batch N / R neighboring ones.

        A micro-batch is thus the same set of images for any number of ranks, and so are its BatchNorm statistics.
        """
        places = np.arange(batch_size).reshape(micro_batches, self.size, -1)
        return places[:, self.rank].reshape(-1)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over all ranks; every rank must call it."""
        return x if self.size == 1 else mean_over_ranks(x, dist.group.WORLD, self.size)

    def maximum(self, x: Tensor) -> Tensor:
        """The element-wise maximum over all ranks; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(x := x.clone(), dist.ReduceOp.MAX)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any picklable), by rank; every rank must call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """All ranks get past the block, or none does: the first rank with an error raises it, the others leave quietly."""
        error = None
        try:
            yield
        except FastbyolError as caught:
            error = caught
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if failed:
            raise error if error is not None and failed[0] == self.rank else PeerFailure()


def world_from_environment() -> World:
    """What torchrun says; a world of one without it.

    Raises:
        InputError: the variables are incomplete or no numbers.
    """
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        rank, size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE is set but RANK, WORLD_SIZE and LOCAL_RANK are not all numbers ({error}): start with "
            "`torchrun --nproc-per-node N -m fastbyol train ...`, or unset WORLD_SIZE"
        ) from None
    if not 0 <= rank < size:
        raise InputError(
            f"RANK={rank} does not lie in 0..WORLD_SIZE-1={size - 1}: start with torchrun, or unset WORLD_SIZE"
        )
    return World(rank, size, local, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))


_groups = itertools.count()


class ProcessGroup:
    """Context: the default process group of a world, left when the run ends; nothing for a world of one.

    When a rank fails, exactly one of them says why: the first that reaches the store which all share. A rank that only
    notices that another is gone leaves quietly if that one has spoken.

    Raises (on leaving):
        RunError: this rank failed first, or lost another one that could say nothing (it was killed, or its machine died).
        StoppedByAnother: another rank has said why the run ends.
    """

    def __init__(self, world: World, config: DistributedConfig, device: torch.device) -> None:
        self._world, self._timeout, self._device = world, timedelta(seconds=config.timeout_s), device

    def __enter__(self) -> None:
        if self._world.size == 1:
            return
        shared, rank, size = next(dist.rendezvous("env://", timeout=self._timeout))
        # Addresses that an earlier group of this process, or an earlier attempt, has left in the store are stale.
        self._store = dist.PrefixStore(f"fastbyol/{self._world.restarts}/{next(_groups)}", shared)
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        bound = {"device_id": self._device} if self._device.type == "cuda" else {}
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=self._timeout, **bound)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._world.size == 1:
            return
        if error is None:
            dist.destroy_process_group()
            return  # after an error the others may be gone: leaving the group would wait for them
        if isinstance(error, PeerFailure) or not isinstance(error, FastbyolError | RuntimeError):
            return
        if not self._speaks_first():
            raise PeerFailure from None
        if isinstance(error, FastbyolError):
            raise type(error)(f"rank {self._world.rank}: {error}") from None
        if _is_lost_contact(error):
            raise RunError(
                f"rank {self._world.rank} lost contact with another rank, which was killed or whose machine failed "
                f"({first_line(error)}); restart with --resume auto"
            ) from None

    def _speaks_first(self) -> bool:
        """Whether no other rank has claimed the one message of this attempt."""
        me = str(self._world.rank)
        try:
            return self._store.compare_set("failed", "", me).decode() == me
        except RuntimeError:
            return True  # the store has died with its machine: nobody else can have said it


def _is_lost_contact(error: BaseException) -> bool:
    """Whether a RuntimeError is a collective's: torch has a class of its own for some of them only."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(w in text for w in ("gloo", "nccl", "connection closed by peer"))


class StopConsensus:
    """Lets all ranks leave their loop after the same step when any of them wants to, without waiting for each other.

    Every step starts an exchange of one byte between the hosts and looks at the result of the one before.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._flag, self._work = torch.zeros(1, dtype=torch.uint8), None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._work is not None and error is None:
            self._work.wait()

    def agree(self, stop: bool) -> bool:
        """Whether any rank wanted to stop at its last call (of a world of one: wants to now); equal on all ranks."""
        if self._world.size == 1:
            return stop
        if self._work is not None:
            self._work.wait()
        wanted = bool(self._flag.item())
        self._flag = torch.tensor([stop], dtype=torch.uint8)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return wanted


class _MeanOverRanks(torch.autograd.Function):
    """y = mean over ranks of x. Its gradient is the mean over ranks of dy: every rank's y depends on every rank's x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, ranks: int) -> Tensor:
        ctx.group, ctx.ranks = group, ranks
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group)) / ranks

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _MeanOverRanks.apply(dy, ctx.group, ctx.ranks), None, None


def mean_over_ranks(x: Tensor, group: Any, ranks: int) -> Tensor:
    """The mean of `x` over the `ranks` members of `group`; differentiable, and a compiler can trace it."""
    return _MeanOverRanks.apply(x, group, ranks)
