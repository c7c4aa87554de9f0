"""BatchNorm over the views of one batch, with an optional residual and ReLU behind it: forward and backward.

Formulas, per view v and channel c, over the R = N H W positions of the view's N images:

    m = mean x,  s2 = mean (x - m)^2 (biased),  i = 1 / sqrt(s2 + eps),  xhat = (x - m) i
    y = relu(xhat w + b + residual)

    g  = dy where y > 0, else 0             (dy itself without ReLU)
    dw = sum g xhat,  db = sum g            over all views
    dx = w i (g - mean g - xhat mean(g xhat))
    dresidual = g

Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); statistics per view, since BYOL sends its views through the network one by one
(Grill et al. 2020) and one batch of both is otherwise the same computation.

In eager mode statistics are exact whatever the mean: sums run over d = x - f, where f is the value of the view's first position,
with delta = mean d and s2 = mean d^2 - delta^2; y = d (w i) + (b - delta w i). A mean of 1000 with a standard deviation of 1
costs no digit. Torch's kernels (`native`) and compiled code use x itself.

Synchronized statistics: `reduce` gives the mean of a tensor over the ranks of a group, all with equal batch sizes. It is given m
and s2 + m^2 of this rank in float64, so that s2 can be had back from their means: in float32 a mean of ten standard deviations
costs two digits, which a training of twenty steps shows. Backward reduces mean g and mean(g xhat); dw and db stay this rank's.

Four passes, in numba (CPU; bfloat16 and float32), and the bytes that they move a value of bfloat16 (twice as many of float32):
    moments    reads x                                     2
    apply      reads x (and residual), writes y            4 (6)
    sums       reads x and dy                              4      with residual and ReLU reads y too, and writes g: 8
    gradient   reads x and dy or g, writes dx              6
For backward x and statistics are kept; y with residual and ReLU alone: without a residual its sign follows from x.

Shapes: V views, N images of each, C channels; x is (V N, C) or (V N, C, H, W), rows [v N, (v + 1) N) are view v's. Here "rows"
are the V R positions with C values each, which lie one behind the other in channels-last memory.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels.cpu import openmp as threads
from fastbyol.kernels.cpu.simd import ROWS, bfloat16_at, double_of, doubles, floats, over_rows

Reduce = Callable[[Tensor], Tensor]


def batch_norm_reference(
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
    """The formulas in plain torch, differentiable and traceable; arguments, results and errors as of `batch_norm`.

    Statistics are float32, or float64 for a float64 x.
    """
    _check(x, residual, weight, bias, views)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.movedim(1, -1)  # channels last, (V N, C) or (V N, H, W, C)
    by_view = rows.reshape(views, -1, x.shape[1]).to(wide)
    var, mean = torch.var_mean(by_view, 1, correction=0)
    if reduce is not None:
        mean, var = _synchronized(mean, var, reduce)
    scale = weight * torch.rsqrt(var + eps)
    y = (by_view - mean[:, None]) * scale[:, None] + bias
    y = y.reshape(rows.shape).movedim(-1, 1)
    if residual is not None:
        y = y + residual
    if relu:
        y = torch.relu(y)
    return y.to(x.dtype), mean.detach(), var.detach()


def _synchronized(mean: Tensor, var: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """(V, C) mean and variance of the views on all ranks, from those on this one."""
    wide = mean.double()
    first, second = reduce(torch.stack([wide, var.double() + wide.square()], 1)).unbind(1)
    return first.to(mean.dtype), (second - first.square()).clamp_min(0).to(var.dtype)


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
    """y = relu(BatchNorm(x) + residual) with the statistics of every view's own images.

    numba on the CPU for bfloat16 and float32; torch's own BatchNorm kernels on a GPU, unless statistics are synchronized; elsewhere
    operations of torch, which a compiler fuses.

    Args:
        x: (V N, C) or (V N, C, H, W); used in channels-last memory, copied where it lies otherwise.
        residual: like x, or None.
        weight, bias: (C,) float32 (float64 for a float64 x).
        views: V. At least two positions a view are the caller's duty, as one has no variance.
        reduce: mean over the ranks of a group, differentiable; None: this rank's statistics.

    Returns:
        y like x, channels-last; mean and biased variance (V, C), float32 (float64), without gradient.

    Raises:
        ValueError: shapes that do not fit, an empty x, a dtype that is not meant.
    """
    _check(x, residual, weight, bias, views)
    options: dict[str, Any] = {"views": views, "eps": eps, "relu": relu}
    if torch.compiler.is_compiling():
        return in_torch(x, residual, weight, bias, reduce=reduce, **options)
    has_memory = type(x) is Tensor and x.is_cpu  # unlike a FakeTensor
    if has_memory and x.dtype in (torch.bfloat16, torch.float32):
        return in_numba(x, residual, weight, bias, reduce=reduce, **options)
    if x.is_cuda and reduce is None:
        return native(x, residual, weight, bias, **options)
    return in_torch(x, residual, weight, bias, reduce=reduce, **options)


def _check(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    views: int,
) -> None:
    if x.ndim not in (2, 4) or 0 in x.shape:
        raise ValueError(f"x must be (V N, C) or (V N, C, H, W) and not empty, not {tuple(x.shape)}")
    if views < 1 or x.shape[0] % views:
        raise ValueError(f"the {x.shape[0]} rows of x {tuple(x.shape)} do not divide into {views} views")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype, not {x.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(f"the residual is {_described(residual)}, but x is {_described(x)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != x.shape[1:2] or t.dtype != wide or t.device != x.device:
            raise ValueError(
                f"{name} must be ({x.shape[1]},) {wide} on {x.device} for x {tuple(x.shape)}, not {_described(t)}"
            )


def _described(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"


# --- the autograd function over the passes in numba ---

# Rows of the forward table (6, V, C): w i is SCALE, b - delta w i is OFFSET.
MEAN, VAR, DELTA, INVSTD, SCALE, OFFSET = range(6)
# Rows of the backward table (4, V, C): dx = SCALE g + SLOPE d + CONSTANT.
MEAN_G, MEAN_GX, SLOPE, CONSTANT = range(4)


def in_numba(
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
    """`batch_norm` by the passes of `OnCPU`; the arguments have been checked."""
    x, residual = _dense(x), None if residual is None else _dense(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    arguments = x, residual, weight, bias, views, eps, relu, reduce
    inputs = (x, weight, bias) if residual is None else (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _BatchNorm.apply(*arguments)
    y, table = _forward(*arguments)
    return y, table[MEAN], table[VAR]


def _dense(x: Tensor) -> Tensor:
    return x.contiguous() if x.ndim == 2 else x.contiguous(memory_format=torch.channels_last)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    views: int,
    eps: float,
    relu: bool,
    reduce: Reduce | None,
) -> tuple[Tensor, Tensor]:
    table = ON_CPU.moments(x, views, weight, bias, eps)
    if reduce is not None:
        first = table[MEAN] - table[DELTA]
        mean, var = _synchronized(table[MEAN], table[VAR], reduce)
        table[MEAN], table[VAR], table[DELTA] = mean, var, mean - first
        ON_CPU.affine(table, weight, bias, eps)
    return ON_CPU.apply(x, residual, table, relu), table


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        views: int,
        eps: float,
        relu: bool,
        reduce: Reduce | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, table = _forward(x, residual, weight, bias, views, eps, relu, reduce)
        ctx.save_for_backward(x, y if relu and residual is not None else None, table)
        ctx.relu, ctx.reduce, ctx.has_residual = relu, reduce, residual is not None
        mean, var = table[MEAN], table[VAR]
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        x, y, table = ctx.saved_tensors
        g, back, parameters = ON_CPU.sums(_dense(dy), x, y, table, ctx.relu)
        if ctx.reduce is not None:
            back[: MEAN_GX + 1] = ctx.reduce(back[: MEAN_GX + 1].transpose(0, 1).contiguous()).transpose(0, 1)
            ON_CPU.slopes(back, table)
        dx = ON_CPU.gradient(g, x, table, back, ctx.relu and y is None) if ctx.needs_input_grad[0] else None
        dw, db = parameters.unbind()
        return dx, g if ctx.has_residual else None, dw, db, None, None, None, None


# --- torch ---


def _by_view(x: Tensor, views: int) -> Tensor:
    """(V, R, C) float32 (float64) of a dense x, or a view of it where it has that dtype."""
    rows = x.movedim(1, -1).reshape(views, -1, x.shape[1])
    return rows.to(torch.promote_types(x.dtype, torch.float32))


def _deviations(x: Tensor, views: int) -> tuple[Tensor, Tensor | None]:
    """d (V, R, C) and f (V, C); under a compiler x itself and None: its kernels would load f for every value."""
    rows = _by_view(x, views)
    return (rows, None) if torch.compiler.is_compiling() else (rows - rows[:, :1], rows[:, 0])


def _as(rows: Tensor, x: Tensor) -> Tensor:
    """(V, R, C) in the shape, dtype and memory order of x."""
    return rows.to(x.dtype).reshape(x.movedim(1, -1).shape).movedim(-1, 1)


def in_torch(
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
    """`batch_norm` in operations of torch, on any device and in any floating dtype; what torch.compile is given."""
    return _InTorch.apply(x, residual, weight, bias, views, eps, relu, reduce)


class _InTorch(torch.autograd.Function):
    """The backward pass is written out: autograd's through the reference moves a quarter more bytes in a compiled ResNet-50 step.

    y is kept where there is a ReLU, since the convolution behind it keeps it anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        views: int,
        eps: float,
        relu: bool,
        reduce: Reduce | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        d, first = _deviations(x, views)
        var, delta = torch.var_mean(d, 1, correction=0)
        mean = delta if first is None else first + delta
        if reduce is not None:
            mean, var = _synchronized(mean, var, reduce)
            delta = mean if first is None else mean - first
        invstd = torch.rsqrt(var + eps)
        y = (d - delta[:, None]) * (weight * invstd)[:, None] + bias
        if residual is not None:
            y = y + _by_view(residual, views)
        y = _as(y, x)
        # No view: an activation behind it could not change one in place. A compiler fuses both.
        y = torch.relu(y) if relu else y.clone()
        ctx.save_for_backward(x, y if relu else None, delta, invstd, weight)
        ctx.views, ctx.reduce, ctx.has_residual = views, reduce, residual is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, y, delta, invstd, weight = ctx.saved_tensors
        g = dy if y is None else torch.where(y <= 0, 0.0, dy)  # NaN in y lets dy through, as torch's ReLU does
        (d, _), wide = _deviations(x, ctx.views), _by_view(g, ctx.views)
        xhat = (d - delta[:, None]) * invstd[:, None]
        mean_g, mean_gx = wide.mean(1), (wide * xhat).mean(1)
        dw, db = mean_gx.sum(0) * d.shape[1], mean_g.sum(0) * d.shape[1]
        if ctx.reduce is not None:
            mean_g, mean_gx = ctx.reduce(torch.stack([mean_g, mean_gx], 1)).unbind(1)
        dx = (weight * invstd)[:, None] * (wide - mean_g[:, None] - xhat * mean_gx[:, None])
        return _as(dx, x), g if ctx.has_residual else None, dw, db, None, None, None, None


# --- eager on a GPU: torch's kernels, view by view ---


def native(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, views: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm` by torch's own BatchNorm kernels, one call a view; for a GPU without a compiler, on any device by test.

    They move about as many bytes as torch's BatchNorm2d, where `in_torch` without a compiler moves several times as many.
    """
    residual = None if residual is None else _dense(residual)
    return _Native.apply(_dense(x), residual, weight.contiguous(), bias.contiguous(), views, eps, relu)


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        views: int,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        mean, invstd = torch.empty(2, views, x.shape[1], dtype=weight.dtype, device=x.device)
        for v, (x_v, y_v) in enumerate(zip(x.chunk(views), y.chunk(views), strict=True)):
            torch.ops.aten.native_batch_norm.out(
                x_v, weight, bias, None, None, True, 0.0, eps, out=y_v, save_mean=mean[v], save_invstd=invstd[v]
            )
        if residual is not None:
            y += residual
        if relu:
            y.relu_()
        ctx.save_for_backward(x, y if relu else None, mean, invstd, weight)
        ctx.views, ctx.eps, ctx.has_residual = views, eps, residual is not None
        var = (invstd**-2 - eps).clamp_min(0)
        mean = mean.clone()  # an output of its own: what is kept for backward must not be one that can be written to
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        x, y, mean, invstd, weight = ctx.saved_tensors
        g = _dense(dy)
        if y is not None:
            g = torch.ops.aten.threshold_backward(g, y, 0)
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                g_v, x_v, weight, None, None, mean[v], invstd[v], True, ctx.eps, [True, True, True]
            )
            for v, (g_v, x_v) in enumerate(zip(g.chunk(ctx.views), x.chunk(ctx.views), strict=True))
        ]
        dx, dw, db = zip(*parts, strict=True)
        return torch.cat(dx), g if ctx.has_residual else None, sum(dw), sum(db), None, None, None


# --- the CPU: numba, threads over pieces of views ---

_F32 = ir.FloatType()


def _moments_rows(*, bfloat16: bool) -> Callable[..., Any]:
    """Makes f(x, rows, channels, stride, first, sums, squares): adds d and d^2 to the (C,) sums; all but sizes are addresses."""

    @intrinsic
    def moments(typing_context, x, rows, channels, stride, first, sums, squares):
        def generate(context, builder, signature, arguments):
            x, rows, channels, stride, first, sums, squares = arguments

            def body(tile) -> None:
                f = tile.channels(first, bfloat16=bfloat16)
                d = [tile.minus(value, f) for value in tile.load(x, bfloat16=bfloat16)]
                tile.add_to(sums, d)
                tile.add_to(squares, [tile.times(value, value) for value in d])

            over_rows(builder, rows, channels, stride, body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return moments


def _apply_rows(*, bfloat16: bool, residual: bool) -> Callable[..., Any]:
    """Makes f(x, rows, channels, stride, first, scale, offset, floor, other, y); the floor of ReLU is 0, without -inf."""

    @intrinsic
    def apply(typing_context, x, rows, channels, stride, first, scale, offset, floor, other, y):
        def generate(context, builder, signature, arguments):
            x, rows, channels, stride, first, scale, offset, floor, other, y = arguments

            def body(tile) -> None:
                f = tile.channels(first, bfloat16=bfloat16)
                w, b = tile.channels(scale), tile.channels(offset)
                out = [tile.plus(tile.times(tile.minus(value, f), w), b) for value in tile.load(x, bfloat16=bfloat16)]
                if residual:
                    out = [tile.plus(*pair) for pair in zip(out, tile.load(other, bfloat16=bfloat16), strict=True)]
                tile.store(tile.at_least(out, tile.splat(floor)), y, bfloat16=bfloat16)

            over_rows(builder, rows, channels, stride, body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float32, types.int64, types.int64), generate

    return apply


def _sums_rows(*, bfloat16: bool, kept: bool) -> Callable[..., Any]:
    """Makes f(x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products): adds g and g d to (C,) sums.

    kept: the mask is y's, and g is written; otherwise it follows from x.
    """

    @intrinsic
    def sums(typing_context, x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products):
        def generate(context, builder, signature, arguments):
            x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products = arguments

            def body(tile) -> None:
                f = tile.channels(first, bfloat16=bfloat16)
                d = [tile.minus(value, f) for value in tile.load(x, bfloat16=bfloat16)]
                if kept:
                    out = tile.load(y, bfloat16=bfloat16)
                else:
                    w, b = tile.channels(scale), tile.channels(offset)
                    out = [tile.plus(tile.times(value, w), b) for value in d]
                masked = tile.above(out, tile.splat(floor), tile.load(dy, bfloat16=bfloat16))
                if kept:
                    tile.store(masked, g, bfloat16=bfloat16)
                tile.add_to(sums, masked)
                tile.add_to(products, [tile.times(*pair) for pair in zip(masked, d, strict=True)])

            over_rows(builder, rows, channels, stride, body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float32, *[types.int64] * 5), generate

    return sums


def _gradient_rows(*, bfloat16: bool, masked: bool) -> Callable[..., Any]:
    """Makes f(x, rows, channels, stride, first, scale, offset, slope, constant, g, dx); masked: g is yet to be, as x tells."""

    @intrinsic
    def gradient(typing_context, x, rows, channels, stride, first, scale, offset, slope, constant, g, dx):
        def generate(context, builder, signature, arguments):
            x, rows, channels, stride, first, scale, offset, slope, constant, g, dx = arguments

            def body(tile) -> None:
                f, w = tile.channels(first, bfloat16=bfloat16), tile.channels(scale)
                d = [tile.minus(value, f) for value in tile.load(x, bfloat16=bfloat16)]
                gs = tile.load(g, bfloat16=bfloat16)
                if masked:
                    b, zero = tile.channels(offset), tile.splat(ir.Constant(_F32, 0.0))
                    gs = tile.above([tile.plus(tile.times(value, w), b) for value in d], zero, gs)
                k, c = tile.channels(slope), tile.channels(constant)
                out = [
                    tile.plus(tile.times(gv, w), tile.plus(tile.times(dv, k), c)) for gv, dv in zip(gs, d, strict=True)
                ]
                tile.store(out, dx, bfloat16=bfloat16)

            over_rows(builder, rows, channels, stride, body)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 11), generate

    return gradient


_moments_f32, _moments_bf16 = (_moments_rows(bfloat16=b) for b in (False, True))
_apply_f32, _apply_bf16 = (_apply_rows(bfloat16=b, residual=False) for b in (False, True))
_apply_residual_f32, _apply_residual_bf16 = (_apply_rows(bfloat16=b, residual=True) for b in (False, True))
_sums_f32, _sums_bf16 = (_sums_rows(bfloat16=b, kept=False) for b in (False, True))
_sums_kept_f32, _sums_kept_bf16 = (_sums_rows(bfloat16=b, kept=True) for b in (False, True))
_gradient_f32, _gradient_bf16 = (_gradient_rows(bfloat16=b, masked=False) for b in (False, True))
_gradient_masked_f32, _gradient_masked_bf16 = (_gradient_rows(bfloat16=b, masked=True) for b in (False, True))

# Words of every kernel: how the tensors are cut, where they are (0: there is none), and two numbers.
_BYTES, _VIEWS, _ROWS, _CHANNELS, _PIECE_ROWS, _PIECE_CHANNELS = range(6)  # _BYTES: 2 for bfloat16, 4 for float32
_X, _OTHER, _Y, _DY, _G, _DX, _TABLE, _BACK, _SCRATCH, _WEIGHT, _BIAS, _PARAMETERS, _EPS, _RELU = range(6, 20)

_JIT = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}  # error_model: a division raises nothing
_INF = np.float32(np.inf)


@njit(**_JIT)
def _piece(unit, words):
    """Of unit `unit`: view, rows, first channel, channels, number of its row range; the address of the view's first row of x at
    that channel; and how many bytes into a tensor of x's size the piece begins.
    """
    across = -(-words[_CHANNELS] // words[_PIECE_CHANNELS])
    down = -(-words[_ROWS] // words[_PIECE_ROWS])
    piece, channel = unit // across, unit % across * words[_PIECE_CHANNELS]
    view, row = piece // down, piece % down * words[_PIECE_ROWS]
    rows = min(words[_PIECE_ROWS], words[_ROWS] - row)
    channels = min(words[_PIECE_CHANNELS], words[_CHANNELS] - channel)
    begin = words[_BYTES] * (view * words[_ROWS] * words[_CHANNELS] + channel)
    return view, rows, channel, channels, piece, words[_X] + begin, begin + words[_BYTES] * row * words[_CHANNELS]


@njit(**_JIT)
def _table(words, which, row, view, channel):
    """Address of a number in the forward or backward table."""
    return words[which] + 4 * ((row * words[_VIEWS] + view) * words[_CHANNELS] + channel)


@njit(**_JIT)
def _partial(words, piece, which, channel):
    """Address of one of a piece's two partial sums; two rows of float64 totals lie before them."""
    return words[_SCRATCH] + 4 * ((4 + 2 * piece + which) * words[_CHANNELS] + channel)


@njit(**_JIT)
def _clear(address, n):
    values = floats(address)
    for i in range(n):
        values[i] = np.float32(0)


@threads.kernel(**_JIT)
def _moments(unit, words):
    """Partial sums of d and d^2 over a piece."""
    _, rows, channel, channels, piece, first, place = _piece(unit, words)
    stride, size, x = words[_CHANNELS], words[_BYTES], words[_X] + place
    sums, squares = _partial(words, piece, 0, channel), _partial(words, piece, 1, channel)
    _clear(sums, channels)
    _clear(squares, channels)
    if size == 2:
        _moments_bf16(x, rows, channels, stride, first, sums, squares)
    else:
        _moments_f32(x, rows, channels, stride, first, sums, squares)


@njit(**_JIT)
def _totals(view, words):
    """The float64 totals of a view's partial sums, added in the order of the pieces: two arrays (C,)."""
    n = words[_CHANNELS]
    down = -(-words[_ROWS] // words[_PIECE_ROWS])
    one, two = doubles(words[_SCRATCH]), doubles(words[_SCRATCH] + 8 * n)
    for c in range(n):
        one[c] = 0.0
        two[c] = 0.0
    for piece in range(view * down, (view + 1) * down):
        a, b = floats(_partial(words, piece, 0, 0)), floats(_partial(words, piece, 1, 0))
        for c in range(n):
            one[c] += a[c]
        for c in range(n):
            two[c] += b[c]
    return one, two


@njit(**_JIT)
def _affine_of(view, words):
    """INVSTD, SCALE and OFFSET of a view."""
    weight, bias, eps = floats(words[_WEIGHT]), floats(words[_BIAS]), np.float32(double_of(words[_EPS]))
    var, delta = floats(_table(words, _TABLE, VAR, view, 0)), floats(_table(words, _TABLE, DELTA, view, 0))
    invstd = floats(_table(words, _TABLE, INVSTD, view, 0))
    scale, offset = floats(_table(words, _TABLE, SCALE, view, 0)), floats(_table(words, _TABLE, OFFSET, view, 0))
    for c in range(words[_CHANNELS]):
        invstd[c] = np.float32(1) / np.sqrt(var[c] + eps)
    for c in range(words[_CHANNELS]):
        scale[c] = weight[c] * invstd[c]
        offset[c] = bias[c] - delta[c] * scale[c]


@threads.kernel(**_JIT)
def _finish_moments(unit, words):
    """The forward table from the partial sums."""
    for view in range(words[_VIEWS]):
        sums, squares = _totals(view, words)
        mean, var = floats(_table(words, _TABLE, MEAN, view, 0)), floats(_table(words, _TABLE, VAR, view, 0))
        delta = floats(_table(words, _TABLE, DELTA, view, 0))
        first = words[_X] + words[_BYTES] * view * words[_ROWS] * words[_CHANNELS]
        share = 1.0 / words[_ROWS]
        for c in range(words[_CHANNELS]):
            d = sums[c] * share
            rest = squares[c] * share - d * d
            var[c] = 0.0 if rest < 0 else rest  # NaN stays NaN
            delta[c] = d
        if words[_BYTES] == 2:
            for c in range(words[_CHANNELS]):
                mean[c] = bfloat16_at(first, c) + delta[c]
        else:
            for c in range(words[_CHANNELS]):
                mean[c] = floats(first)[c] + delta[c]
        _affine_of(view, words)


@threads.kernel(**_JIT)
def _affine(unit, words):
    """INVSTD, SCALE and OFFSET of view `unit`."""
    _affine_of(unit, words)


@threads.kernel(**_JIT)
def _apply(unit, words):
    """y of a piece."""
    view, rows, channel, channels, _, first, place = _piece(unit, words)
    stride, size = words[_CHANNELS], words[_BYTES]
    x, other, y = words[_X] + place, words[_OTHER] + place, words[_Y] + place
    scale, offset = _table(words, _TABLE, SCALE, view, channel), _table(words, _TABLE, OFFSET, view, channel)
    floor = np.float32(0) if words[_RELU] else -_INF
    if size == 2:
        if words[_OTHER]:
            _apply_residual_bf16(x, rows, channels, stride, first, scale, offset, floor, other, y)
        else:
            _apply_bf16(x, rows, channels, stride, first, scale, offset, floor, other, y)
    elif words[_OTHER]:
        _apply_residual_f32(x, rows, channels, stride, first, scale, offset, floor, other, y)
    else:
        _apply_f32(x, rows, channels, stride, first, scale, offset, floor, other, y)


@threads.kernel(**_JIT)
def _sums(unit, words):
    """Partial sums of g and g d over a piece, and g where y is given."""
    view, rows, channel, channels, piece, first, place = _piece(unit, words)
    stride, size = words[_CHANNELS], words[_BYTES]
    x, y, dy, g = words[_X] + place, words[_Y] + place, words[_DY] + place, words[_G] + place
    scale, offset = _table(words, _TABLE, SCALE, view, channel), _table(words, _TABLE, OFFSET, view, channel)
    floor = np.float32(0) if words[_RELU] else -_INF
    sums, products = _partial(words, piece, 0, channel), _partial(words, piece, 1, channel)
    _clear(sums, channels)
    _clear(products, channels)
    if size == 2:
        if words[_Y]:
            _sums_kept_bf16(x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products)
        else:
            _sums_bf16(x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products)
    elif words[_Y]:
        _sums_kept_f32(x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products)
    else:
        _sums_f32(x, rows, channels, stride, first, scale, offset, floor, dy, y, g, sums, products)


@njit(**_JIT)
def _slopes_of(view, words):
    """SLOPE and CONSTANT of a view."""
    delta, invstd = floats(_table(words, _TABLE, DELTA, view, 0)), floats(_table(words, _TABLE, INVSTD, view, 0))
    scale = floats(_table(words, _TABLE, SCALE, view, 0))
    mean_g, mean_gx = floats(_table(words, _BACK, MEAN_G, view, 0)), floats(_table(words, _BACK, MEAN_GX, view, 0))
    slope, constant = floats(_table(words, _BACK, SLOPE, view, 0)), floats(_table(words, _BACK, CONSTANT, view, 0))
    for c in range(words[_CHANNELS]):
        slope[c] = -scale[c] * invstd[c] * mean_gx[c]
    for c in range(words[_CHANNELS]):
        constant[c] = -scale[c] * mean_g[c] - slope[c] * delta[c]


@threads.kernel(**_JIT)
def _finish_sums(unit, words):
    """The backward table, dw and db from the partial sums."""
    n = words[_CHANNELS]
    dw, db = floats(words[_PARAMETERS]), floats(words[_PARAMETERS] + 4 * n)
    _clear(words[_PARAMETERS], 2 * n)
    for view in range(words[_VIEWS]):
        sums, products = _totals(view, words)
        delta, invstd = floats(_table(words, _TABLE, DELTA, view, 0)), floats(_table(words, _TABLE, INVSTD, view, 0))
        mean_g, mean_gx = floats(_table(words, _BACK, MEAN_G, view, 0)), floats(_table(words, _BACK, MEAN_GX, view, 0))
        share = 1.0 / words[_ROWS]
        for c in range(n):
            products[c] = (products[c] - delta[c] * sums[c]) * invstd[c]
        for c in range(n):
            mean_g[c], mean_gx[c] = sums[c] * share, products[c] * share
        for c in range(n):
            dw[c] += products[c]
            db[c] += sums[c]
        _slopes_of(view, words)


@threads.kernel(**_JIT)
def _slopes(unit, words):
    """SLOPE and CONSTANT of view `unit`."""
    _slopes_of(unit, words)


@threads.kernel(**_JIT)
def _gradient(unit, words):
    """dx of a piece."""
    view, rows, channel, channels, _, first, place = _piece(unit, words)
    stride, size = words[_CHANNELS], words[_BYTES]
    x, g, dx = words[_X] + place, words[_G] + place, words[_DX] + place
    scale, offset = _table(words, _TABLE, SCALE, view, channel), _table(words, _TABLE, OFFSET, view, channel)
    slope, constant = _table(words, _BACK, SLOPE, view, channel), _table(words, _BACK, CONSTANT, view, channel)
    if size == 2:
        if words[_RELU]:
            _gradient_masked_bf16(x, rows, channels, stride, first, scale, offset, slope, constant, g, dx)
        else:
            _gradient_bf16(x, rows, channels, stride, first, scale, offset, slope, constant, g, dx)
    elif words[_RELU]:
        _gradient_masked_f32(x, rows, channels, stride, first, scale, offset, slope, constant, g, dx)
    else:
        _gradient_f32(x, rows, channels, stride, first, scale, offset, slope, constant, g, dx)


KERNELS = (_moments, _finish_moments, _affine, _apply, _sums, _finish_sums, _slopes, _gradient)


_PIECE_VALUES = 1 << 14  # of x in a piece, at least: below, handing it out takes longer than the work
_PIECE_MIN_ROWS = 64  # partial sums are written and read once a piece
_PIECES = 32  # of a view's rows, at most
_PIECE_MAX_CHANNELS = 1024


@functools.cache
def _cut(shape: torch.Size, views: int) -> tuple[tuple[int, int, int, int, int], int, int]:
    """(V, R, C, rows and channels of a piece), how many pieces there are, and how many row ranges.

    By sizes alone, whatever the number of threads: partial sums are a piece's.
    """
    channels = shape[1]
    rows = shape.numel() // (channels * views)
    piece_channels = min(channels, _PIECE_MAX_CHANNELS)
    piece_rows = max(-(-_PIECE_VALUES // piece_channels), _PIECE_MIN_ROWS, -(-rows // _PIECES))
    piece_rows = -(-piece_rows // ROWS) * ROWS
    ranges = views * -(-rows // piece_rows)
    return (views, rows, channels, piece_rows, piece_channels), ranges * -(-channels // piece_channels), ranges


@functools.cache
def _bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class OnCPU:
    """The passes, for bfloat16 and float32 tensors on the CPU, dense in channels-last memory."""

    def moments(self, x: Tensor, views: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """The forward table (6, V, C)."""
        cut, units, ranges = _cut(x.shape, views)
        table, scratch = _numbers(6, views, x.shape[1]), _numbers(4 + 2 * ranges, x.shape[1])
        words = _words(x, cut, table=table, scratch=scratch, weight=weight, bias=bias, eps=eps)
        threads.run(_moments, units, words, _finish_moments)
        return table

    def affine(self, table: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
        """Fills INVSTD, SCALE and OFFSET of a table from its first rows."""
        _, views, channels = table.shape
        words = _words(None, (views, 0, channels, 0, 0), table=table, weight=weight, bias=bias, eps=eps)
        threads.run(_affine, views, words)

    def apply(self, x: Tensor, residual: Tensor | None, table: Tensor, relu: bool) -> Tensor:
        """y = relu(d SCALE + OFFSET + residual)."""
        cut, units, _ = _cut(x.shape, table.shape[1])
        y = torch.empty_like(x)
        threads.run(_apply, units, _words(x, cut, other=residual, y=y, table=table, relu=relu))
        return y

    def sums(self, dy: Tensor, x: Tensor, y: Tensor | None, table: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns g, the backward table (4, V, C), and (2, C) dw and db.

        Given y, g is a tensor of its own; without, dy is returned as it is and the mask follows from x.
        """
        views, channels = table.shape[1:]
        cut, units, ranges = _cut(x.shape, views)
        back, parameters = _numbers(4, views, channels), _numbers(2, channels)
        scratch = _numbers(4 + 2 * ranges, channels)
        g = dy if y is None else torch.empty_like(x)
        words = _words(
            x, cut, y=y, dy=dy, g=g, table=table, back=back, scratch=scratch, parameters=parameters, relu=relu
        )
        threads.run(_sums, units, words, _finish_sums)
        return g, back, parameters

    def slopes(self, back: Tensor, table: Tensor) -> None:
        """Fills SLOPE and CONSTANT of a backward table from its first rows."""
        _, views, channels = table.shape
        threads.run(_slopes, views, _words(None, (views, 0, channels, 0, 0), table=table, back=back))

    def gradient(self, g: Tensor, x: Tensor, table: Tensor, back: Tensor, relu: bool) -> Tensor:
        """dx; with `relu`, g is dy and has yet to be masked as x tells."""
        cut, units, _ = _cut(x.shape, table.shape[1])
        dx = torch.empty_like(x)
        threads.run(_gradient, units, _words(x, cut, g=g, dx=dx, table=table, back=back, relu=relu))
        return dx


def _numbers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _words(
    x: Tensor | None,
    cut: tuple[int, int, int, int, int],
    *,
    table: Tensor,
    other: Tensor | None = None,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    g: Tensor | None = None,
    dx: Tensor | None = None,
    back: Tensor | None = None,
    scratch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    parameters: Tensor | None = None,
    eps: float = 0.0,
    relu: bool = False,
) -> tuple[int, ...]:
    """The words of a kernel, in the order of their names above."""
    tensors = (x, other, y, dy, g, dx, table, back, scratch, weight, bias, parameters)
    return (0 if x is None else x.itemsize, *cut, *map(_at, tensors), _bits(eps), relu)


ON_CPU = OnCPU()
