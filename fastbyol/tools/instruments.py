"""A training to measure: its loop without logs and evaluation, and a clock on its spans."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import nn

from fastbyol.build import Training, build_training, find_training_images, with_batch_size
from fastbyol.config import Config
from fastbyol.data.batch import Batch
from fastbyol.kernels.cpu.jit_cache import compile_cpu_kernels
from fastbyol.optim import moves_target
from fastbyol.runtime import cores
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.distributed import ProcessGroup, world_from_environment
from fastbyol.runtime.logging import logger, muted
from fastbyol.spans import AUGMENT, BACKWARD, COPY, ONLINE, TARGET, UPDATE, WAIT, recording
from fastbyol.tools.clock import REST, Clock

EXCHANGE = "gradient exchange"
_WARM_UP = {"cpu": 2, "cuda": 15}  # steps, in addition to those that empty the loader's ring


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
    """The loop of loop.py without logs and evaluation, on endless data."""

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
        """Run steps until everything is compiled and all earlier prefetched batches are used."""
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
