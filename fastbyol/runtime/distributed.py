"""Processes started by torchrun: the process group, collectives, errors on one rank, and stopping
all ranks at the same step.

`torchrun --nproc-per-node N -m fastbyol train ...` starts N processes, which find each other
through RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR. A process without torchrun is a world of size
1 without a process group.

One group sends CUDA tensors with NCCL and CPU tensors with gloo.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from fastbyol.config import DistributedConfig
from fastbyol.errors import FastbyolError, InputError, PeerFailure, RunError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank of the process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Index among the processes of this machine, and of the GPU."""
    restarts: int = 0
    """Number of times torchrun has restarted the workers."""
    local_size: int = 1
    """Number of processes on this machine."""

    @property
    def is_main_process(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0

    def shard(self, batch_size: int, micro_batches: int) -> NDArray[np.int64]:
        """Return this rank's positions in a global batch: N / R consecutive ones of every
        micro-batch.

        A micro-batch therefore holds the same images, and has the same BatchNorm statistics, for
        any number of ranks.
        """
        positions = np.arange(batch_size).reshape(micro_batches, self.size, -1)
        return positions[:, self.rank].reshape(-1)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over all ranks. Every rank must call this."""
        return x if self.size == 1 else mean_over_ranks(x, dist.group.WORLD, self.size)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks. Every rank must call this."""
        return x if self.size == 1 else self.sum_(x.clone(memory_format=torch.contiguous_format))

    def sum_(self, x: Tensor) -> Tensor:
        """As `sum`, in place; `x` is contiguous."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def maximum(self, x: Tensor) -> Tensor:
        """Return the element-wise maximum over all ranks. Every rank must call this."""
        if self.size > 1:
            dist.all_reduce(x := x.clone(), dist.ReduceOp.MAX)
        return x

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` (picklable), by rank. Every rank must call this."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def gather_tensors(self, x: Tensor) -> Tensor:
        """Return every rank's `x`, of equal shapes, stacked by rank. Every rank must call this."""
        if self.size == 1:
            return x[None]
        values = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(values, x.contiguous())
        return torch.stack(values)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Context manager: if the block raises on any rank, it ends on all.

        The first such rank raises its error, the others PeerFailure.
        """
        error = None
        try:
            yield
        except FastbyolError as caught:
            error = caught
        failed = [rank for rank, bad in enumerate(self.gather(error is not None)) if bad]
        if failed:
            raise error if error is not None and failed[0] == self.rank else PeerFailure()

    def first_on_machine(self, function: Callable[[], T]) -> T:
        """Return function(), called on one rank of a machine before the others.

        That rank makes what the others then find in a cache. Every rank must call this.

        Raises:
            FastbyolError: what the function raised, on one rank.
        """
        results: list[T] = []
        for own_turn in (self.local_rank == 0, self.local_rank != 0):
            with self.sync_errors():
                if own_turn:
                    results.append(function())
        return results[0]


def world_from_environment() -> World:
    """Return the world that torchrun's variables describe, a world of size 1 without them.

    Raises:
        InputError: a variable is missing or not a number.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1" and "LOCAL_RANK" not in os.environ:
        return World()
    try:
        rank, size, local = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except (KeyError, ValueError) as error:
        raise InputError(
            f"WORLD_SIZE is set but RANK, WORLD_SIZE and LOCAL_RANK are not all numbers ({error}): start with "
            "`torchrun --nproc-per-node N -m fastbyol ...`, or unset WORLD_SIZE"
        ) from None
    if not 0 <= rank < size:
        raise InputError(
            f"RANK={rank} does not lie in 0..WORLD_SIZE-1={size - 1}: start with torchrun, or unset WORLD_SIZE"
        )
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return World(rank, size, local, restarts, local_size)


_groups = itertools.count()


class ProcessGroup:
    """Context manager: the default process group. Does nothing for a world of size 1.

    Args:
        remedy: what the user can do if a peer is lost.

    If ranks fail, exactly one of them reports why: the first to reach the shared store. The others
    raise PeerFailure, which suppresses the duplicate error.

    Raises (on exit):
        RunError: this rank failed first, or lost a peer that could not report (it was killed, or
            its machine failed).
        PeerFailure: another rank reports why the run ends.
    """

    def __init__(
        self,
        world: World,
        config: DistributedConfig,
        device: torch.device,
        *,
        remedy: str = "restart with --resume auto",
    ) -> None:
        self._world, self._timeout, self._device = world, timedelta(seconds=config.timeout_s), device
        self._remedy = remedy

    def __enter__(self) -> None:
        if self._world.size == 1:
            return
        shared, rank, size = next(dist.rendezvous("env://", timeout=self._timeout))
        # The store may hold stale addresses of an earlier group or attempt: use a new prefix.
        self._store = dist.PrefixStore(f"fastbyol/{self._world.restarts}/{next(_groups)}", shared)
        backend = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
        bound = {"device_id": self._device} if self._device.type == "cuda" else {}
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=self._timeout, **bound)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._world.size == 1:
            return
        if error is None:
            dist.destroy_process_group()
            return  # after an error peers may be gone, and destroying the group would wait for them
        if isinstance(error, PeerFailure) or not isinstance(error, FastbyolError | RuntimeError):
            return
        if not self._reports_first():
            raise PeerFailure from None
        if isinstance(error, FastbyolError):
            raise type(error)(f"rank {self._world.rank}: {error}") from None
        if _is_lost_contact(error):
            raise RunError(
                f"rank {self._world.rank} lost contact with another rank, which was killed or whose machine failed "
                f"({first_line(error)}); {self._remedy}"
            ) from None

    def _reports_first(self) -> bool:
        """Return True if no other rank reports the failure of this attempt."""
        me = str(self._world.rank)
        try:
            return self._store.compare_set("failed", "", me).decode() == me
        except RuntimeError:
            return True  # the store died with its machine


def _is_lost_contact(error: BaseException) -> bool:
    """Return True if a collective raised the error; torch has a class for only some of these."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(w in text for w in ("gloo", "nccl", "connection closed by peer"))


class StopConsensus:
    """Lets all ranks leave their loop after the same step if any of them wants to, without waiting
    for each other.

    Every step starts an asynchronous all-reduce of one byte on the hosts and reads the result of
    the step before.
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
        """Return True, on all ranks, if any rank wanted to stop at its last call (a single rank: at
        this call).
        """
        if self._world.size == 1:
            return stop
        if self._work is not None:
            self._work.wait()
        wanted = bool(self._flag.item())
        self._flag = torch.tensor([stop], dtype=torch.uint8)
        self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        return wanted


class _MeanOverRanks(torch.autograd.Function):
    """y = mean over ranks of x.

    The gradient is the mean over ranks of dy, since every rank's y depends on every rank's x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, ranks: int) -> Tensor:
        ctx.group, ctx.ranks = group, ranks
        return collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group)) / ranks

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _MeanOverRanks.apply(dy, ctx.group, ctx.ranks), None, None


def mean_over_ranks(x: Tensor, group: Any, ranks: int) -> Tensor:
    """Return the mean of `x` over the `ranks` members of `group`.

    Differentiable and traceable by the compiler.
    """
    return _MeanOverRanks.apply(x, group, ranks)
