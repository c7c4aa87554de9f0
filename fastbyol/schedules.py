"""Schedules of the learning rate and of the target's decay: pure functions of the optimiser step.

Source: Grill et al. 2020, appendix B, and `byol/utils/schedules.py` of google-deepmind/deepmind-research
(commit 4822a45). Steps count optimiser steps from 0; the value at step k is used by update k.
"""

import math


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
