"""BatchNorm per view in torch operations, for `torch.compile` on the CPU and other dtypes.

Formulas and shapes: kernels/batch_norm.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Mean of a tensor over the ranks of a group; differentiable."""


class Norm(NamedTuple):
    """Parameters and running statistics of one BatchNorm."""

    weight: Tensor  # (C,) float32
    bias: Tensor  # (C,) float32
    eps: float
    running_mean: Tensor | None = None  # (C,) float32; None: no running statistics to update
    running_var: Tensor | None = None
    batches: Tensor | None = None  # scalar int64: counts views
    momentum: float = 0.0


def synchronize(mean: Tensor, var: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return mean and variance (V, C) over all ranks, with one call of `reduce`."""
    wide = mean.double()
    first, second = reduce(torch.stack([wide, var.double() + wide.square()], 1)).unbind(1)
    return first.to(mean.dtype), (second - first.square()).clamp_min(0).to(var.dtype)


def to_channels_last(x: Tensor) -> Tensor:
    """Return x dense in channels-last memory format."""
    return x.contiguous() if x.ndim == 2 else x.contiguous(memory_format=torch.channels_last)


def batch_norm_composite(x, residual, weight, bias, views, eps, relu, reduce=None):
    """Implement `batch_norm` with torch operations, on any device and in any floating-point dtype.

    In eager mode sums run over d = x - f, where f is the value at the view's first position, so
    statistics are exact for any mean. Compiled code uses x itself: its kernels would load f for
    every value.
    """
    return _Composite.apply(x, residual, weight, bias, views, eps, relu, reduce)


def _by_view(x: Tensor, views: int) -> Tensor:
    """Return x as (V, R, C) float32 (float64); a view of x if it has that dtype."""
    rows = x.movedim(1, -1).reshape(views, -1, x.shape[1])
    return rows.to(torch.promote_types(x.dtype, torch.float32))


def _deviations(x: Tensor, views: int) -> tuple[Tensor, Tensor | None]:
    """Return d (V, R, C) and f (V, C); under a compiler x itself and None."""
    rows = _by_view(x, views)
    return (rows, None) if torch.compiler.is_compiling() else (rows - rows[:, :1], rows[:, 0])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """Return (V, R, C) in the shape, dtype and memory format of x."""
    return rows.to(x.dtype).reshape(x.movedim(1, -1).shape).movedim(-1, 1)


class _Composite(torch.autograd.Function):
    """The backward pass is explicit.

    That of autograd, through the reference, moves 25 % more bytes in a compiled ResNet-50. With
    ReLU, y is saved: the following convolution saves it anyway.
    """

    @staticmethod
    def forward(ctx, x, residual, weight, bias, views, eps, relu, reduce):
        d, first = _deviations(x, views)
        var, delta = torch.var_mean(d, 1, correction=0)
        mean = delta if first is None else first + delta
        if reduce is not None:
            mean, var = synchronize(mean, var, reduce)
            delta = mean if first is None else mean - first
        invstd = torch.rsqrt(var + eps)
        y = (d - delta[:, None]) * (weight * invstd)[:, None] + bias
        if residual is not None:
            y = y + _by_view(residual, views)
        y = _like(y, x)
        # Not a view: the next operation could not modify one in place. A compiler fuses the copy.
        y = torch.relu(y) if relu else y.clone()
        ctx.save_for_backward(x, y if relu else None, delta, invstd, weight)
        ctx.views, ctx.reduce, ctx.has_residual = views, reduce, residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        x, y, delta, invstd, weight = ctx.saved_tensors
        g = dy if y is None else torch.where(y <= 0, 0.0, dy)  # NaN in y passes dy, as in torch's ReLU
        (d, _), wide = _deviations(x, ctx.views), _by_view(g, ctx.views)
        xhat = (d - delta[:, None]) * invstd[:, None]
        mean_g, mean_gx = wide.mean(1), (wide * xhat).mean(1)
        dw, db = mean_gx.sum(0) * d.shape[1], mean_g.sum(0) * d.shape[1]
        if ctx.reduce is not None:
            mean_g, mean_gx = ctx.reduce(torch.stack([mean_g, mean_gx], 1)).unbind(1)
        dx = (weight * invstd)[:, None] * (wide - mean_g[:, None] - xhat * mean_gx[:, None])
        return _like(dx, x), g if ctx.has_residual else None, dw, db, None, None, None, None
