"""BatchNorm with statistics per view, fused with an optional residual and ReLU.

Formulas, per view v and channel c, over the R = N H W positions of the view's N images:

    m = mean x,  s2 = mean (x - m)^2 (biased),  i = 1 / sqrt(s2 + eps),  xhat = (x - m) i
    y = relu(xhat w + b + residual)

    g  = dy where y > 0, else 0             (dy unchanged without ReLU)
    dw = sum g xhat,  db = sum g            over all views
    dx = w i (g - mean g - xhat mean(g xhat))
    dresidual = g

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167). Statistics are per view because BYOL passes its
views through the network separately (Grill et al. 2020); one batch of both views is otherwise the
same computation.

Synchronized statistics: `reduce` returns the mean of a tensor over the ranks of a group, all with
equal batch sizes. It receives this rank's m and s2 + m^2 in float64, so that s2 can be recovered
from their means: in float32 a mean of ten standard deviations costs two digits, which is visible in
a training of twenty steps. Backward reduces mean g and mean(g xhat); dw and db stay local.

Implementations, chosen by `batch_norm`:

    batch_norm_cpu          cpu/batch_norm.py: bfloat16 and float32 on the CPU, in eager mode
    batch_norm_triton       triton/batch_norm.py: 16 bits and float32 on a GPU, eager and compiled
    batch_norm_composite    batch_norm_torch.py: everything else: under torch.compile on the CPU, in
                            other dtypes

`batch_norm_gpu` calls the second with everything that it can fuse: a normalized residual, the
stem's max-pool, running statistics, and an output for two consumers.

Shapes: V views, N images each, C channels; x is (V N, C) or (V N, C, H, W), with the images of
view v at v N .. (v + 1) N - 1.
"""

from typing import Any

import torch
from torch import Tensor

from fastbyol.kernels.batch_norm_torch import Norm, Reduce, batch_norm_composite, synchronize
from fastbyol.kernels.cpu.batch_norm import batch_norm_cpu


def batch_norm_reference(x, residual, weight, bias, *, views, eps, relu, reduce=None):
    """Compute the formulas in plain torch; differentiable and traceable.

    Arguments and errors as for `batch_norm`. Statistics are float32, or float64 for a float64 x.
    """
    _check(x, residual, weight, bias, views)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.movedim(1, -1)  # (V N, C) or (V N, H, W, C)
    by_view = rows.reshape(views, -1, x.shape[1]).to(wide)  # (V, R, C)
    var, mean = torch.var_mean(by_view, 1, correction=0)
    if reduce is not None:
        mean, var = synchronize(mean, var, reduce)
    scale = weight * torch.rsqrt(var + eps)
    y = (by_view - mean[:, None]) * scale[:, None] + bias
    y = y.reshape(rows.shape).movedim(-1, 1)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    return y.to(x.dtype), mean.detach(), var.detach()


def batch_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    views: int,
    eps: float,
    relu: bool,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = relu(BatchNorm(x) + residual), normalized with the statistics of each view.

    Args:
        x: (V N, C) or (V N, C, H, W); used in channels-last memory format, copied if necessary.
        residual: Like x, or None.
        weight: (C,) float32 (float64 for a float64 x).
        bias: Like weight.
        views: V. The caller guarantees at least two positions per view, since a single one has no
            variance.
        eps: Added to the variance.
        relu: Apply ReLU to the result.
        reduce: Differentiable mean over the ranks of a group; None uses this rank's statistics.

    Returns:
        y like x, channels-last; mean and biased variance, (V, C) float32 (float64), without
        gradient.

    Raises:
        ValueError: Mismatched shapes, an empty x, or an unsupported dtype.
    """
    if has_gpu_kernels(x):
        norm = Norm(weight, bias, eps)
        (y,), stats, _ = batch_norm_gpu(x, norm, residual, views=views, relu=relu, reduce=reduce)
        return y, *mean_and_var(stats)
    _check(x, residual, weight, bias, views)
    arguments = x, residual, weight, bias, views, eps, relu, reduce
    if torch.compiler.is_compiling():
        return batch_norm_composite(*arguments)
    has_memory = type(x) is Tensor and x.is_cpu  # unlike a FakeTensor
    if has_memory and x.dtype in (torch.bfloat16, torch.float32):
        return batch_norm_cpu(*arguments)
    return batch_norm_composite(*arguments)


def has_gpu_kernels(x: Tensor) -> bool:
    """Return True if `batch_norm_gpu` takes x."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def batch_norm_gpu(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    *,
    views: int,
    **options: Any,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """Check the arguments and call `batch_norm_triton`.

    Raises:
        ValueError: as `batch_norm`.
    """
    from fastbyol.kernels.triton.batch_norm import batch_norm_triton  # needs Triton: only torch's CUDA builds have it

    _check(x, residual, norm.weight, norm.bias, views)
    if residual_norm is not None:
        _check(residual, None, residual_norm.weight, residual_norm.bias, views)
    return batch_norm_triton(x, norm, residual, residual_norm, views=views, **options)


def batch_norm_gpu_statistics(x: Tensor, norm: Norm, *, views: int, reduce: Reduce | None = None) -> Tensor:
    """Return the statistics (3, V, C) of x, as `batch_norm_gpu` does.

    Raises:
        ValueError: as `batch_norm`.
    """
    from fastbyol.kernels.triton.batch_norm import statistics_over_ranks

    _check(x, None, norm.weight, norm.bias, views)
    return statistics_over_ranks(x, norm, views, reduce)


def mean_and_var(stats: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (V, C) from the statistics of `batch_norm_gpu`."""
    first, delta, var = stats.unbind(0)
    return first + delta, var


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, views: int) -> None:
    if x.ndim not in (2, 4) or 0 in x.shape:
        raise ValueError(f"x must be (V N, C) or (V N, C, H, W) and not empty, not {tuple(x.shape)}")
    if views < 1 or x.shape[0] % views:
        raise ValueError(f"the {x.shape[0]} rows of x {tuple(x.shape)} do not divide into {views} views")
    if not x.is_floating_point():
        raise ValueError(f"x must have a floating-point dtype, not {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(f"the residual is {_format_tensor(residual)}, but x is {_format_tensor(x)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != x.shape[1:2] or t.dtype != wide or t.device != x.device:
            raise ValueError(
                f"{name} must be ({x.shape[1]},) {wide} on {x.device} for x {tuple(x.shape)}, not {_format_tensor(t)}"
            )


def _format_tensor(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
