"""LARS and the target's moving average, in one call over all tensors.

Formulas, per tensor and in float32 (w online weight, g gradient, s loss scale, m momentum buffer, t
target weight):

    u  = g / s + wd w
    r  = eta |w| / |u|        1 if either norm is 0, and for biases and norm-layer parameters,
                              which have wd = 0
    m <- mu m + r u
    w <- w - lr m
    t <- t + (1 - tau) (w - t)    with the new w; for weights that have a target

With a loss scale nothing is written if any value of any gradient is infinite or NaN (a skipped
step).

Source: You et al. 2017 (arXiv 1708.03888) as in `byol/utils/optimizers.py` of
google-deepmind/deepmind-research, and Grill et al. 2020, equation 1. Other versions of LARS divide
by |g| + wd |w| + eps: a different optimizer.

Two passes over all tensors, whatever their number and sizes, in chunks of a table of addresses:

    norms     |w|^2 and |u|^2 per chunk: reads w and g,
              8 bytes per parameter (6 with 16-bit gradients)
    update    reads w, g, m, t and writes w, m, t,
              28 bytes per parameter (26); 20 (18) without a target

Together 36 bytes per parameter with a target, the minimum of two passes: the update of a tensor's
first value needs the norms of the whole tensor. Tensors without a trust ratio skip the first pass.
Partial sums are added in a fixed order, so results are bit-identical between runs and for any
number of threads.

Implementations: cpu/lars_ema.py (numba) and triton/lars_ema.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastbyol.kernels.multi_tensor import Hyper  # noqa: F401 (re-exported)


def lars_update(device: torch.device) -> Callable[..., None]:
    """Return the fused LARS and target update for `device`: Triton on a GPU, numba on the CPU.

    Returns:
        A callable that updates many tensors in place, without a host sync, and caches its tables
        while their addresses stay the same:

        update(tensors, groups, hypers, tau, *, inv_scale=None, found_inf=None)

        tensors: (weight, gradient, momentum buffer, target or None) per parameter, float32;
            gradients may also be bfloat16 or float16.
        groups: Index into `hypers` per parameter.
        hypers: `Hyper` per parameter group.
        tau: Scalar on the tensors' device.
        inv_scale: Scalar, 1 / loss scale; requires `found_inf`.
        found_inf: Scalar float32, set to 1 if any gradient is not finite. If it is not 0, nothing
            is updated.

        It raises a ValueError for mismatched shapes or devices and a TypeError for unsupported
        dtypes.

    Raises:
        ModuleNotFoundError: A GPU without Triton, which is part of torch's CUDA builds.
    """
    if device.type == "cuda":
        from fastbyol.kernels.triton.lars_ema import LarsEma
    else:
        from fastbyol.kernels.cpu.lars_ema import LarsEma
    return LarsEma()


def ema_update(device: torch.device) -> Callable[..., None]:
    """Return the target update alone, for optimizers other than LARS.

    Returns:
        update(pairs, tau): t <- t + (1 - tau) (w - t) in place for all pairs (w, t) of float32
        tensors on `device`. Errors as in `lars_update`.

    Raises:
        ModuleNotFoundError: A GPU without Triton, which is part of torch's CUDA builds.
    """
    if device.type == "cuda":
        from fastbyol.kernels.triton.lars_ema import EmaUpdate
    else:
        from fastbyol.kernels.cpu.lars_ema import EmaUpdate
    return EmaUpdate()


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
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Update one tensor in place, without a host sync, in any float dtype.

    Args:
        weight: Any shape; overwritten.
        grad: Like weight, in any float dtype.
        momentum_buffer: Like weight; overwritten.
        target: Like weight, overwritten; None for weights without a target (the predictor).
        lr: Scalar on the tensors' device.
        tau: Scalar on the tensors' device.
        weight_decay: wd.
        momentum: mu.
        trust_coefficient: eta; None fixes the trust ratio at 1.
        inv_scale: Scalar, 1 / s; None means 1.
        found_inf: Scalar, not 0 to skip the step because some tensor's gradient is not finite.
    """
    update = grad.to(weight.dtype) * (1.0 if inv_scale is None else inv_scale) + weight_decay * weight
    if trust_coefficient is not None:
        weight_norm, update_norm = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
        usable = (weight_norm > 0) & (update_norm > 0)
        update *= torch.where(usable, trust_coefficient * weight_norm / update_norm, 1.0)
    skip = torch.zeros((), dtype=torch.bool, device=weight.device) if found_inf is None else found_inf != 0
    new_momentum = momentum * momentum_buffer + update
    momentum_buffer.copy_(torch.where(skip, momentum_buffer, new_momentum))
    weight.copy_(torch.where(skip, weight, weight - lr * momentum_buffer))
    if target is not None:
        target.copy_(torch.where(skip, target, target + (1 - tau) * (weight - target)))
