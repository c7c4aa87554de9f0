"""BatchNorm per view on the CPU, for bfloat16 and float32 tensors, in four numba passes.

Formulas and shapes: kernels/batch_norm.py. Statistics are exact for any mean, since sums run over
d = x - f, where f is the value at the view's first position:

    delta = mean d,  s2 = mean d^2 - delta^2,  y = d (w i) + (b - delta w i)

A mean of 1000 with a standard deviation of 1 costs no digit.

Passes, and bytes moved per value of bfloat16 (twice as many for float32):

    moments     reads x                                     2
    apply       reads x (and residual), writes y            4 (6)
    sums        reads x and dy                              4
                with residual and ReLU: also y, writes g    8
    gradient    reads x and dy or g, writes dx              6

x and the statistics are saved for backward, and y only with both residual and ReLU: without a
residual the sign of y follows from x.

A view is a matrix of R rows (positions) and C channels, contiguous in memory. Passes over x are
split into blocks of rows and channels, one task each.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels.batch_norm_torch import synchronize, to_channels_last
from fastbyol.kernels.cpu import openmp, simd
from fastbyol.kernels.cpu.intrinsics import specialize

# Rows of the forward statistics (6, V, C): SCALE is w i, OFFSET is b - delta w i.
MEAN, VAR, DELTA, INVSTD, SCALE, OFFSET = range(6)
# Rows of the backward statistics (4, V, C): dx = SCALE g + SLOPE d + CONSTANT.
MEAN_G, MEAN_GX, SLOPE, CONSTANT = range(4)


# --- autograd ---


def batch_norm_cpu(x, residual, weight, bias, views, eps, relu, reduce=None):
    """Implement `batch_norm` with the passes below. The caller has checked the arguments."""
    x, residual = to_channels_last(x), None if residual is None else to_channels_last(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    arguments = x, residual, weight, bias, views, eps, relu, reduce
    inputs = (x, weight, bias) if residual is None else (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _BatchNorm.apply(*arguments)
    y, stats = _forward(*arguments)
    return y, stats[MEAN], stats[VAR]


def _forward(x, residual, weight, bias, views, eps, relu, reduce):
    """Return y and the forward statistics."""
    stats = compute_moments(x, views, weight, bias, eps)
    if reduce is not None:
        first = stats[MEAN] - stats[DELTA]
        mean, var = synchronize(stats[MEAN], stats[VAR], reduce)
        stats[MEAN], stats[VAR], stats[DELTA] = mean, var, mean - first
        _update_affine(stats, weight, bias, eps)
    return _apply(x, residual, stats, relu), stats


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, views, eps, relu, reduce):
        y, stats = _forward(x, residual, weight, bias, views, eps, relu, reduce)
        ctx.save_for_backward(x, y if relu and residual is not None else None, stats)
        ctx.relu, ctx.reduce, ctx.has_residual = relu, reduce, residual is not None
        mean, var = stats[MEAN], stats[VAR]
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 8
        x, y, stats = ctx.saved_tensors
        g, backward_stats, dw_db = _compute_sums(to_channels_last(dy), x, y, stats, ctx.relu)
        if ctx.reduce is not None:
            means = backward_stats[: MEAN_GX + 1]
            backward_stats[: MEAN_GX + 1] = ctx.reduce(means.transpose(0, 1).contiguous()).transpose(0, 1)
            _update_slopes(backward_stats, stats)
        masked = ctx.relu and y is None
        dx = _gradient(g, x, stats, backward_stats, masked) if ctx.needs_input_grad[0] else None
        dw, db = dw_db.unbind()
        return dx, g if ctx.has_residual else None, dw, db, None, None, None, None


# --- the passes ---


def compute_moments(x: Tensor, views: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return the forward statistics (6, V, C)."""
    shape, blocks, row_ranges = split_into_blocks(x.shape, views)
    stats, scratch = _empty(6, views, x.shape[1]), _empty(4 + 2 * row_ranges, x.shape[1])
    args = _pack_args(x, shape, stats=stats, scratch=scratch, weight=weight, bias=bias, eps=eps)
    openmp.run(_moments_kernel, blocks, args, _finish_moments_kernel)
    return stats


def _update_affine(stats: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    """Recompute INVSTD, SCALE and OFFSET from the other forward statistics."""
    _, views, channels = stats.shape
    args = _pack_args(None, (views, 0, channels, 0, 0), stats=stats, weight=weight, bias=bias, eps=eps)
    openmp.run(_affine_kernel, views, args)


def _apply(x: Tensor, residual: Tensor | None, stats: Tensor, relu: bool) -> Tensor:
    """Return y = relu(d SCALE + OFFSET + residual)."""
    shape, blocks, _ = split_into_blocks(x.shape, stats.shape[1])
    y = torch.empty_like(x)
    openmp.run(_apply_kernel, blocks, _pack_args(x, shape, residual=residual, y=y, stats=stats, relu=relu))
    return y


def _compute_sums(dy: Tensor, x: Tensor, y: Tensor | None, stats: Tensor, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return g, the backward statistics (4, V, C), and dw and db as (2, C).

    With y, g is a new tensor. Without it, g is dy itself, and the mask of ReLU follows from x.
    """
    views, channels = stats.shape[1:]
    shape, blocks, row_ranges = split_into_blocks(x.shape, views)
    backward_stats, dw_db = _empty(4, views, channels), _empty(2, channels)
    scratch = _empty(4 + 2 * row_ranges, channels)
    g = dy if y is None else torch.empty_like(x)
    tensors = {"y": y, "dy": dy, "g": g, "scratch": scratch, "dw_db": dw_db}
    args = _pack_args(x, shape, stats=stats, backward_stats=backward_stats, relu=relu, **tensors)
    openmp.run(_sums_kernel, blocks, args, _finish_sums_kernel)
    return g, backward_stats, dw_db


def _update_slopes(backward_stats: Tensor, stats: Tensor) -> None:
    """Recompute SLOPE and CONSTANT from the other backward statistics."""
    _, views, channels = stats.shape
    args = _pack_args(None, (views, 0, channels, 0, 0), stats=stats, backward_stats=backward_stats)
    openmp.run(_slopes_kernel, views, args)


def _gradient(g: Tensor, x: Tensor, stats: Tensor, backward_stats: Tensor, relu: bool) -> Tensor:
    """Return dx; with `relu`, g is dy and the kernel masks it."""
    shape, blocks, _ = split_into_blocks(x.shape, stats.shape[1])
    dx = torch.empty_like(x)
    args = _pack_args(x, shape, g=g, dx=dx, stats=stats, backward_stats=backward_stats, relu=relu)
    openmp.run(_gradient_kernel, blocks, args)
    return dx


_MIN_BLOCK_VALUES = 1 << 14  # smaller blocks take longer to schedule than to compute
_MIN_BLOCK_ROWS = 64  # partial sums are written and read once per block
_MAX_ROW_RANGES = 32  # per view
_MAX_BLOCK_CHANNELS = 1024


@functools.cache
def split_into_blocks(shape: torch.Size, views: int) -> tuple[tuple[int, int, int, int, int], int, int]:
    """Split x into blocks of rows and channels.

    The split depends on sizes only, not on the number of threads, since every range of rows has its
    partial sums.

    Returns:
        (V, R, C, rows per block, channels per block); the number of blocks; the number of row
        ranges.
    """
    channels = shape[1]
    rows = shape.numel() // (channels * views)
    block_channels = min(channels, _MAX_BLOCK_CHANNELS)
    block_rows = max(-(-_MIN_BLOCK_VALUES // block_channels), _MIN_BLOCK_ROWS, -(-rows // _MAX_ROW_RANGES))
    block_rows = -(-block_rows // simd.TILE_ROWS) * simd.TILE_ROWS
    row_ranges = views * -(-rows // block_rows)
    return (views, rows, channels, block_rows, block_channels), row_ranges * -(-channels // block_channels), row_ranges


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


# Arguments of every kernel: the item size of x (2: bfloat16, 4: float32), sizes, addresses (0: no
# tensor), two numbers.
_ITEM_SIZE, _VIEWS, _ROWS, _CHANNELS, _BLOCK_ROWS, _BLOCK_CHANNELS = range(6)
_X, _RESIDUAL, _Y, _DY, _G, _DX, _STATS, _BACKWARD_STATS, _SCRATCH, _WEIGHT, _BIAS, _DW_DB, _EPS, _RELU = range(6, 20)


def _pack_args(
    x: Tensor | None,
    shape: tuple[int, int, int, int, int],
    *,
    stats: Tensor,
    residual: Tensor | None = None,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    g: Tensor | None = None,
    dx: Tensor | None = None,
    backward_stats: Tensor | None = None,
    scratch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dw_db: Tensor | None = None,
    eps: float = 0.0,
    relu: bool = False,
) -> tuple[int, ...]:
    """Return the kernel arguments in the order above."""
    tensors = (x, residual, y, dy, g, dx, stats, backward_stats, scratch, weight, bias, dw_db)
    return (0 if x is None else x.itemsize, *shape, *map(_address, tensors), _float64_bits(eps), relu)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@functools.cache
def _float64_bits(value: float) -> int:
    return struct.unpack("q", struct.pack("d", value))[0]


# --- vectorized loops over a block ---

_F32 = ir.FloatType()


def _block_loop(body: Callable[..., None]) -> Callable[..., Any]:
    """Return an intrinsic f(bfloat16, flag, block, operands, floor): `body` on a block's tiles.

    Code is emitted for all four combinations of the booleans bfloat16 and flag, with the branches
    outside the loops.

    Args:
        body: body(tile, bfloat16, flag, x, first, operands, floor) emits the code of one tile; both
            booleans are Python's. The intrinsic's block is the tuple of int64 (x, rows, channels,
            stride, first), where x is the address of the block and first that of f; operands is a
            tuple of addresses; floor is a float32.
    """

    @intrinsic
    def loop(typing_context, bfloat16, flag, block, operands, floor):
        def generate(context, builder, signature, arguments):
            is_bfloat16, is_flagged, block, operands, floor = arguments
            x, rows, channels, stride, first = cgutils.unpack_tuple(builder, block)
            operands = cgutils.unpack_tuple(builder, operands)

            def emit(bfloat16: bool, flag: bool) -> None:
                def tile_body(tile) -> None:
                    body(tile, bfloat16, flag, x, first, operands, floor)

                simd.for_each_tile(builder, rows, channels, stride, tile_body)

            specialize(builder, (is_bfloat16, is_flagged), emit)
            return context.get_dummy_value()

        i64, boolean = types.int64, types.boolean
        tuples = types.UniTuple(i64, 5), types.UniTuple(i64, len(operands))
        return types.void(boolean, boolean, *tuples, types.float32), generate

    return loop


def _deviations(tile, x, first, bfloat16) -> list[ir.Value]:
    """Emit d = x - f."""
    f = tile.load_channels(first, bfloat16=bfloat16)
    return [tile.sub(value, f) for value in tile.load(x, bfloat16=bfloat16)]


@_block_loop
def _moments_loop(tile, bfloat16, flag, x, first, operands, floor):
    """Add d and d^2 to the (C,) sums."""
    sums, squares = operands
    d = _deviations(tile, x, first, bfloat16)
    tile.accumulate(sums, d)
    tile.accumulate(squares, [tile.mul(value, value) for value in d])


@_block_loop
def _apply_loop(tile, bfloat16, has_residual, x, first, operands, floor):
    """Write y; `floor` is 0 with ReLU, -inf without."""
    scale, offset, residual, y = operands
    f = tile.load_channels(first, bfloat16=bfloat16)
    w, b = tile.load_channels(scale), tile.load_channels(offset)
    out = [tile.add(tile.mul(tile.sub(value, f), w), b) for value in tile.load(x, bfloat16=bfloat16)]
    if has_residual:
        out = [tile.add(*pair) for pair in zip(out, tile.load(residual, bfloat16=bfloat16), strict=True)]
    tile.store(tile.maximum(out, tile.splat(floor)), y, bfloat16=bfloat16)


@_block_loop
def _sums_loop(tile, bfloat16, has_y, x, first, operands, floor):
    """Add g and g d to the (C,) sums; with y, take the mask from y instead of x, and write g."""
    scale, offset, dy, y, g, sums, products = operands
    d = _deviations(tile, x, first, bfloat16)
    if has_y:
        out = tile.load(y, bfloat16=bfloat16)
    else:
        w, b = tile.load_channels(scale), tile.load_channels(offset)
        out = [tile.add(tile.mul(value, w), b) for value in d]
    masked = tile.where_above(out, tile.splat(floor), tile.load(dy, bfloat16=bfloat16))
    if has_y:
        tile.store(masked, g, bfloat16=bfloat16)
    tile.accumulate(sums, masked)
    tile.accumulate(products, [tile.mul(*pair) for pair in zip(masked, d, strict=True)])


@_block_loop
def _gradient_loop(tile, bfloat16, apply_mask, x, first, operands, floor):
    """Write dx; with `apply_mask`, g is dy, and the mask of ReLU follows from x."""
    scale, offset, slope, constant, g, dx = operands
    f, w = tile.load_channels(first, bfloat16=bfloat16), tile.load_channels(scale)
    d = [tile.sub(value, f) for value in tile.load(x, bfloat16=bfloat16)]
    gs = tile.load(g, bfloat16=bfloat16)
    if apply_mask:
        b, zero = tile.load_channels(offset), tile.splat(ir.Constant(_F32, 0.0))
        gs = tile.where_above([tile.add(tile.mul(value, w), b) for value in d], zero, gs)
    k, c = tile.load_channels(slope), tile.load_channels(constant)
    out = [tile.add(tile.mul(gv, w), tile.add(tile.mul(dv, k), c)) for gv, dv in zip(gs, d, strict=True)]
    tile.store(out, dx, bfloat16=bfloat16)


# --- kernels ---

_JIT = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}  # error_model: division by zero does not raise
_NO_FLOOR = np.float32(-np.inf)


@njit(**_JIT)
def _stats_address(args, table, row, view, channel):
    """Return the address of an element of the forward or backward statistics (`table`)."""
    return args[table] + 4 * ((row * args[_VIEWS] + view) * args[_CHANNELS] + channel)


@njit(**_JIT)
def _stats_row(args, table, row, view):
    """Return a row (C,) of a view's statistics."""
    return simd.float32_array(_stats_address(args, table, row, view, 0))


@njit(**_JIT)
def _locate(task, args):
    """Locate the block of a task.

    Returns:
        The view, first channel, number of channels, and index of the row range; the block's offset
        in bytes in a tensor of x's size; the block for a loop; the addresses of its channels in
        SCALE and OFFSET.
    """
    channel_blocks = -(-args[_CHANNELS] // args[_BLOCK_CHANNELS])
    row_blocks = -(-args[_ROWS] // args[_BLOCK_ROWS])
    row_range, channel = task // channel_blocks, task % channel_blocks * args[_BLOCK_CHANNELS]
    view, row = row_range // row_blocks, row_range % row_blocks * args[_BLOCK_ROWS]
    rows = min(args[_BLOCK_ROWS], args[_ROWS] - row)
    channels = min(args[_BLOCK_CHANNELS], args[_CHANNELS] - channel)
    start = args[_ITEM_SIZE] * (view * args[_ROWS] * args[_CHANNELS] + channel)
    offset = start + args[_ITEM_SIZE] * row * args[_CHANNELS]
    block = (args[_X] + offset, rows, channels, args[_CHANNELS], args[_X] + start)
    scale = _stats_address(args, _STATS, SCALE, view, channel)
    shift = _stats_address(args, _STATS, OFFSET, view, channel)
    return view, channel, channels, row_range, offset, block, scale, shift


@njit(**_JIT)
def _partial_sums_address(args, row_range, which, channel):
    """Return the address of a row range's first or second partial sum; they follow the totals."""
    return args[_SCRATCH] + 4 * ((4 + 2 * row_range + which) * args[_CHANNELS] + channel)


@njit(**_JIT)
def _zero(address, n):
    values = simd.float32_array(address)
    for i in range(n):
        values[i] = np.float32(0)


@njit(**_JIT)
def _total_sums(view, args):
    """Add a view's partial sums in the order of the row ranges; return two float64 arrays (C,)."""
    n = args[_CHANNELS]
    row_blocks = -(-args[_ROWS] // args[_BLOCK_ROWS])
    one, two = simd.float64_array(args[_SCRATCH]), simd.float64_array(args[_SCRATCH] + 8 * n)
    for c in range(n):
        one[c] = 0.0
        two[c] = 0.0
    for row_range in range(view * row_blocks, (view + 1) * row_blocks):
        a = simd.float32_array(_partial_sums_address(args, row_range, 0, 0))
        b = simd.float32_array(_partial_sums_address(args, row_range, 1, 0))
        for c in range(n):
            one[c] += a[c]
        for c in range(n):
            two[c] += b[c]
    return one, two


@openmp.kernel(**_JIT)
def _moments_kernel(task, args):
    """Partial sums of d and d^2 over a block."""
    _, channel, channels, row_range, _, block, _, _ = _locate(task, args)
    sums = _partial_sums_address(args, row_range, 0, channel)
    squares = _partial_sums_address(args, row_range, 1, channel)
    _zero(sums, channels)
    _zero(squares, channels)
    _moments_loop(args[_ITEM_SIZE] == 2, False, block, (sums, squares), np.float32(0))


@njit(**_JIT)
def _compute_affine(view, args):
    """INVSTD, SCALE and OFFSET of a view."""
    weight, bias = simd.float32_array(args[_WEIGHT]), simd.float32_array(args[_BIAS])
    eps = np.float32(simd.bits_to_float64(args[_EPS]))
    var, delta = _stats_row(args, _STATS, VAR, view), _stats_row(args, _STATS, DELTA, view)
    invstd = _stats_row(args, _STATS, INVSTD, view)
    scale, offset = _stats_row(args, _STATS, SCALE, view), _stats_row(args, _STATS, OFFSET, view)
    for c in range(args[_CHANNELS]):
        invstd[c] = np.float32(1) / np.sqrt(var[c] + eps)
    for c in range(args[_CHANNELS]):
        scale[c] = weight[c] * invstd[c]
        offset[c] = bias[c] - delta[c] * scale[c]


@openmp.kernel(**_JIT)
def _finish_moments_kernel(task, args):
    """The forward statistics of all views from the partial sums."""
    for view in range(args[_VIEWS]):
        sums, squares = _total_sums(view, args)
        mean, var = _stats_row(args, _STATS, MEAN, view), _stats_row(args, _STATS, VAR, view)
        delta = _stats_row(args, _STATS, DELTA, view)
        first = args[_X] + args[_ITEM_SIZE] * view * args[_ROWS] * args[_CHANNELS]
        inverse = 1.0 / args[_ROWS]
        for c in range(args[_CHANNELS]):
            d = sums[c] * inverse
            variance = squares[c] * inverse - d * d
            var[c] = 0.0 if variance < 0 else variance  # NaN stays NaN
            delta[c] = d
        if args[_ITEM_SIZE] == 2:
            for c in range(args[_CHANNELS]):
                mean[c] = simd.load_bfloat16(first, c) + delta[c]
        else:
            for c in range(args[_CHANNELS]):
                mean[c] = simd.float32_array(first)[c] + delta[c]
        _compute_affine(view, args)


@openmp.kernel(**_JIT)
def _affine_kernel(task, args):
    """INVSTD, SCALE and OFFSET of one view."""
    _compute_affine(task, args)


@openmp.kernel(**_JIT)
def _apply_kernel(task, args):
    """y of a block."""
    _, _, _, _, offset, block, scale, shift = _locate(task, args)
    floor = np.float32(0) if args[_RELU] else _NO_FLOOR
    operands = (scale, shift, args[_RESIDUAL] + offset, args[_Y] + offset)
    _apply_loop(args[_ITEM_SIZE] == 2, args[_RESIDUAL] != 0, block, operands, floor)


@openmp.kernel(**_JIT)
def _sums_kernel(task, args):
    """Partial sums of g and g d over a block; writes g if y is given."""
    _, channel, channels, row_range, offset, block, scale, shift = _locate(task, args)
    floor = np.float32(0) if args[_RELU] else _NO_FLOOR
    sums = _partial_sums_address(args, row_range, 0, channel)
    products = _partial_sums_address(args, row_range, 1, channel)
    _zero(sums, channels)
    _zero(products, channels)
    operands = (scale, shift, args[_DY] + offset, args[_Y] + offset, args[_G] + offset, sums, products)
    _sums_loop(args[_ITEM_SIZE] == 2, args[_Y] != 0, block, operands, floor)


@njit(**_JIT)
def _compute_slopes(view, args):
    """SLOPE and CONSTANT of a view."""
    delta, invstd = _stats_row(args, _STATS, DELTA, view), _stats_row(args, _STATS, INVSTD, view)
    scale = _stats_row(args, _STATS, SCALE, view)
    mean_g, mean_gx = _stats_row(args, _BACKWARD_STATS, MEAN_G, view), _stats_row(args, _BACKWARD_STATS, MEAN_GX, view)
    slope, constant = _stats_row(args, _BACKWARD_STATS, SLOPE, view), _stats_row(args, _BACKWARD_STATS, CONSTANT, view)
    for c in range(args[_CHANNELS]):
        slope[c] = -scale[c] * invstd[c] * mean_gx[c]
    for c in range(args[_CHANNELS]):
        constant[c] = -scale[c] * mean_g[c] - slope[c] * delta[c]


@openmp.kernel(**_JIT)
def _finish_sums_kernel(task, args):
    """The backward statistics of all views, dw and db from the partial sums."""
    n = args[_CHANNELS]
    dw, db = simd.float32_array(args[_DW_DB]), simd.float32_array(args[_DW_DB] + 4 * n)
    _zero(args[_DW_DB], 2 * n)
    for view in range(args[_VIEWS]):
        sums, products = _total_sums(view, args)
        delta, invstd = _stats_row(args, _STATS, DELTA, view), _stats_row(args, _STATS, INVSTD, view)
        mean_g = _stats_row(args, _BACKWARD_STATS, MEAN_G, view)
        mean_gx = _stats_row(args, _BACKWARD_STATS, MEAN_GX, view)
        inverse = 1.0 / args[_ROWS]
        for c in range(n):
            products[c] = (products[c] - delta[c] * sums[c]) * invstd[c]
        for c in range(n):
            mean_g[c], mean_gx[c] = sums[c] * inverse, products[c] * inverse
        for c in range(n):
            dw[c] += products[c]
            db[c] += sums[c]
        _compute_slopes(view, args)


@openmp.kernel(**_JIT)
def _slopes_kernel(task, args):
    """SLOPE and CONSTANT of one view."""
    _compute_slopes(task, args)


@openmp.kernel(**_JIT)
def _gradient_kernel(task, args):
    """dx of a block."""
    view, channel, _, _, offset, block, scale, shift = _locate(task, args)
    slope = _stats_address(args, _BACKWARD_STATS, SLOPE, view, channel)
    constant = _stats_address(args, _BACKWARD_STATS, CONSTANT, view, channel)
    operands = (scale, shift, slope, constant, args[_G] + offset, args[_DX] + offset)
    _gradient_loop(args[_ITEM_SIZE] == 2, args[_RELU] != 0, block, operands, np.float32(0))


KERNELS = (
    _moments_kernel,
    _finish_moments_kernel,
    _affine_kernel,
    _apply_kernel,
    _sums_kernel,
    _finish_sums_kernel,
    _slopes_kernel,
    _gradient_kernel,
)
