"""LARS and the target's moving average, in one call over all tensors.

Formulas, per tensor and in float32 (w online weight, g gradient, m momentum buffer, t target weight):

    u  = g + wd w
    r  = eta |w| / |u|        1 where either norm is 0, and for biases and norm-layer parameters (wd is 0 there too)
    m <- mu m + r u
    w <- w - lr m
    t <- t + (1 - tau) (w - t)    with the new w; for weights that have a target

Source: You et al. 2017 (arXiv 1708.03888) as in `byol/utils/optimizers.py` of google-deepmind/deepmind-research, and
Grill et al. 2020, equation 1. Others differ: |g| + wd |w| + eps below the line is a different optimiser.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def lars_ema_reference(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    target: Tensor | None,
    *,
    lr: Tensor,
    tau: Tensor,
    weight_decay: float,
    momentum: float,
    trust_coefficient: float | None,
) -> None:
    """One tensor's update, in place, without a host sync.

    Args:
        weight, momentum_buffer: float32, any one shape; overwritten.
        grad: the same shape, any float dtype.
        target: the same shape, overwritten; None where the weight has no target (the predictor).
        lr, tau: scalars on the tensors' device.
        trust_coefficient: eta; None fixes the trust ratio at 1.
    """
    update = grad.float() + weight_decay * weight
    if trust_coefficient is not None:
        weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
        usable = (weight_norm > 0) & (update_norm > 0)
        update *= torch.where(usable, trust_coefficient * weight_norm / update_norm, 1.0)
    momentum_buffer.mul_(momentum).add_(update)
    weight.sub_(lr * momentum_buffer)
    if target is not None:
        target.add_((1 - tau) * (weight - target))


@torch.no_grad()
def ema_update_(pairs: Iterable[tuple[Tensor, Tensor]], tau: Tensor) -> None:
    """t <- t + (1 - tau) (w - t) in place for all pairs (w, t), for optimisers that do not move the target."""
    weights, targets = zip(*pairs, strict=True)
    torch._foreach_lerp_(targets, weights, 1 - tau)
