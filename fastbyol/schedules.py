"""Schedules of the learning rate and the target decay tau: pure functions of the optimizer step.

Source: Grill et al. 2020, appendix B, and `byol/utils/schedules.py` of
google-deepmind/deepmind-research (commit 4822a45). Steps are optimizer steps, counted from 0.
Update k uses the value at step k.
"""

import math
from fractions import Fraction
from numbers import Rational

import numpy as np

from fastbyol.config import OptimConfig


class Schedule:
    """Learning rate, tau and epoch of all steps of a run.

    E epochs of N images in batches of B take floor(E N / B) steps, as in the authors' code: batches
    are full, and the remainder of an epoch counts towards the next one. `optim.epochs` and the
    warm-up follow this rule.

    Args:
        batch_size: B, images per optimizer step.
        steps_per_epoch: N / B as a fraction, at least 1.
    """

    def __init__(self, optim: OptimConfig, batch_size: int, steps_per_epoch: Rational) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps(optim.epochs, steps_per_epoch)
        self.warmup_steps = total_steps(optim.warmup, steps_per_epoch)
        self._peak, self._constant = scaled_lr(optim.base_lr, batch_size), optim.schedule == "constant"
        self._tau_base = optim.tau_base

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return learning_rate(
            step,
            peak=self._peak,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            constant=self._constant,
        )

    def tau(self, step: int) -> float:
        """Return the target decay of a step."""
        return target_decay(step, base=self._tau_base, total_steps=self.total_steps)

    def epoch(self, done: int) -> int:
        """Return the number of complete epochs after `done` steps."""
        return math.ceil((done + 1) / self.steps_per_epoch) - 1

    def ends_epoch(self, done: int) -> bool:
        """Return True if an epoch is complete after `done` steps, but not a step before."""
        return self.epoch(done) > self.epoch(done - 1)


def total_steps(epochs: float, steps_per_epoch: Rational) -> int:
    """Return the steps of a number of epochs, rounded down.

    An `epochs` such as 0.29 counts as the decimal number, not as the nearest binary fraction.
    """
    return math.floor(Fraction(str(epochs)) * steps_per_epoch)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the peak learning rate by the linear scaling rule: base_lr * batch_size / 256."""
    return base_lr * batch_size / 256


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, constant: bool = False) -> float:
    """Return the rate of a linear warm-up from 0 to `peak` at `warmup_steps`, then of a cosine to 0
    at `total_steps`.

    With `constant`, the rate stays at `peak` after the warm-up.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if constant:
        return peak
    return peak * _cosine_decay(step - warmup_steps, total_steps - warmup_steps)


def target_decay(step: int, *, base: float, total_steps: int) -> float:
    """Return tau = 1 - (1 - base) * (cos(pi k / K) + 1) / 2: from `base` at step 0 to 1."""
    return 1 - (1 - base) * _cosine_decay(step, total_steps)


def _cosine_decay(step: int, steps: int) -> float:
    """Return (cos(pi k / K) + 1) / 2 with k clamped to K, 0 if there are no steps."""
    if steps <= 0:
        return 0.0
    return (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def step_seed(*numbers: int) -> int:
    """Return one 63-bit seed from several numbers, such as the run's seed, step and rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
