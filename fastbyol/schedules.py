"""Schedules of the learning rate and of the target's decay: pure functions of the optimizer step.

Source: Grill et al. 2020, appendix B, and `byol/utils/schedules.py` of google-deepmind/deepmind-research
(commit 4822a45). Steps count optimizer steps from 0; the value at step k is used by update k.
"""

import math

from fastbyol.config import OptimConfig


class Schedule:
    """Learning rate and tau of a run's steps.

    Args:
        optim: of the run.
        batch_size: images per optimizer step.
        steps_per_epoch: optimizer steps in an epoch.
    """

    def __init__(self, optim: OptimConfig, batch_size: int, steps_per_epoch: int) -> None:
        self.total_steps = optim.epochs * steps_per_epoch
        self._warmup_steps = round(optim.warmup * steps_per_epoch)
        self._peak, self._constant = scaled_lr(optim.base_lr, batch_size), optim.schedule == "constant"
        self._tau_base = optim.tau_base

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`."""
        return learning_rate(
            step,
            peak=self._peak,
            warmup_steps=self._warmup_steps,
            total_steps=self.total_steps,
            constant=self._constant,
        )

    def tau(self, step: int) -> float:
        """Target decay of optimizer step `step`."""
        return target_decay(step, base=self._tau_base, total_steps=self.total_steps)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Peak learning rate by the linear rule: base_lr * batch_size / 256."""
    return base_lr * batch_size / 256


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int, constant: bool = False) -> float:
    """Linear warm-up from 0 at step 0 to `peak` at `warmup_steps`, then a cosine to 0 at `total_steps`, or `peak` for ever."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if constant:
        return peak
    return peak * _cosine_decay(step - warmup_steps, total_steps - warmup_steps)


def target_decay(step: int, *, base: float, total_steps: int) -> float:
    """tau of the target update: 1 - (1 - base) * (cos(pi k / K) + 1) / 2, from `base` at 0 to 1 at `total_steps`."""
    return 1 - (1 - base) * _cosine_decay(step, total_steps)


def _cosine_decay(step: int, steps: int) -> float:
    """(cos(pi k / K) + 1) / 2, k clamped to K; 0 where there are no steps at all."""
    if steps <= 0:
        return 0.0
    return (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
