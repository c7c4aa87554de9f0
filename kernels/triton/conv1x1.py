"""1x1 convolution on a GPU as one matrix product, with the statistics of a BatchNorm per view.

    y[r, c] = sum over k of a[r, k] w[c, k]

for every position r of a channels-last image. The product leaves the mean and the variance of y per
view and channel behind, so that BatchNorm does not read y for them: they are computed while y is in
registers, from the values rounded to y's dtype. `a` is x, or relu(BatchNorm(x)) computed while x is
loaded, if a BatchNorm precedes and nobody else needs its result.

Bytes per value of y for K input channels and C channels: 2 K / C + 2, and 2 less than a convolution
followed by `batch_norm.statistics`. A program computes `Tile.rows` x `Tile.channels` values at a
time for several blocks of rows, and writes mean and M2 = sum (y - mean)^2 of all of them; a small
kernel merges those in float64 (Chan, Golub and LeVeque 1979). All results are deterministic.

The backward pass is torch's.

Shapes: x (V N, K, H, W) in channels-last memory format, weight (C, K, 1, 1), y (V N, C, P, Q).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from fastbyol.kernels.batch_norm_torch import Norm, to_channels_last
from fastbyol.kernels.conv import Tile
from fastbyol.kernels.triton.batch_norm import finish_moments, wrap_triton
from fastbyol.kernels.triton.batch_norm_kernels import affine, part_of_view

PROGRAMS = 2048  # about eight waves on an H100, with two programs per multiprocessor


@triton.jit
def conv1x1_kernel(
    x,
    weight,
    y,
    partials,  # (2, V, P, C) float32: mean and M2 of each part
    norm_stats,  # BatchNorm and ReLU of x, or None
    norm_weight,
    norm_bias,
    rows,
    channels,
    out_height,
    out_width,
    height,
    width,
    eps: tl.constexpr,
    INPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
):
    """Write y of one part of a view for one block of channels, and its partial statistics.

    The product is w x^T: each thread then holds many positions of few channels, so that sums over
    positions take few registers and no exchange between warps.
    """
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    part, parts = tl.program_id(0) // columns, tl.num_programs(0) // columns
    view, views = tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(0) % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = c < channels
    mean = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    squares = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    start, end = part_of_view(part, parts, rows, BLOCK_ROWS)
    inputs = tl.arange(0, BLOCK_INPUTS)
    if INPUTS <= BLOCK_INPUTS:  # the same for all rows
        in_weight = inside[:, None] & (inputs < INPUTS)[None, :]
        w = tl.load(weight + c[:, None] * INPUTS + inputs[None, :], mask=in_weight, other=0.0)
        if norm_stats is not None:
            first, _, _, scale, offset = affine(
                norm_stats, norm_weight, norm_bias, view, views, INPUTS, inputs, inputs < INPUTS, eps
            )
    for row in range(start, end, BLOCK_ROWS):
        r = row + tl.arange(0, BLOCK_ROWS)
        exists = (r < end)[None, :]
        if STRIDE == 1:
            position = view.to(tl.int64) * rows + r
        else:
            i, j = r % (out_height * out_width) // out_width, r % out_width
            image = view * (rows // (out_height * out_width)) + r // (out_height * out_width)
            position = (image.to(tl.int64) * height + i * STRIDE) * width + j * STRIDE
        sources = x + position[None, :] * INPUTS
        out = tl.zeros((BLOCK_CHANNELS, BLOCK_ROWS), tl.float32)
        for k in range(0, INPUTS, BLOCK_INPUTS):
            in_row = (k + inputs < INPUTS)[:, None]
            a = tl.load(sources + (k + inputs)[:, None], mask=exists & in_row, other=0.0)
            if INPUTS > BLOCK_INPUTS:
                in_weight = inside[:, None] & (k + inputs < INPUTS)[None, :]
                w = tl.load(weight + c[:, None] * INPUTS + (k + inputs)[None, :], mask=in_weight, other=0.0)
                if norm_stats is not None:
                    first, _, _, scale, offset = affine(
                        *(norm_stats, norm_weight, norm_bias, view, views, INPUTS),
                        *(k + inputs, k + inputs < INPUTS, eps),
                    )
            if norm_stats is not None:
                value = (a.to(tl.float32) - first[:, None]) * scale[:, None] + offset[:, None]
                a = tl.where(value <= 0.0, 0.0, value).to(a.dtype)  # NaN passes
            out = tl.dot(w, a, out)
        stored = out.to(y.dtype.element_ty)
        base = (view.to(tl.int64) * rows + r)[None, :] * channels
        tl.store(y + base + c[:, None], stored, mask=exists & inside[:, None])
        # Mean and M2 of the tile, merged with those of the tiles before (Chan et al. 1979).
        value = tl.where(exists, stored.to(tl.float32), 0.0)
        count = tl.minimum(end - row, BLOCK_ROWS).to(tl.float32)
        before = (row - start).to(tl.float32)
        own = tl.sum(value, 1) / count
        d = tl.where(exists, value - own[:, None], 0.0)
        change = own - mean
        squares += tl.sum(d * d, 1) + change * change * (before * count / (before + count))
        mean += change * (count / (before + count))
    at = partials + (view * parts + part) * channels + c
    tl.store(at, mean, mask=inside)
    tl.store(at + views * parts * channels, squares, mask=inside)


def _parts(rows: int, channels: int, views: int, tile: Tile) -> int:
    """Return P: a function of the shape and the tile alone."""
    return max(1, min(triton.cdiv(rows, tile.rows), PROGRAMS // (views * triton.cdiv(channels, tile.channels))))


@triton_op("fastbyol::conv1x1", mutates_args={"running_mean", "running_var", "batches"})
def convolve(
    x: Tensor,
    weight: Tensor,
    stride: int,
    views: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    norm_stats: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    tile: list[int],
) -> tuple[Tensor, Tensor]:
    """Return y and its statistics (3, V, C), as `batch_norm.statistics` does."""
    (images, inputs, height, width), channels, sides = x.shape, weight.shape[0], Tile(*tile)
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    rows = images * out_height * out_width // views
    parts = _parts(rows, channels, views, sides)
    # Inductor would fill torch.empty(..., memory_format=torch.channels_last).
    y = torch.empty((images, out_height, out_width, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    partials = torch.empty((2, views, parts, channels), dtype=torch.float32, device=x.device)
    stats = torch.empty((3, views, channels), dtype=torch.float32, device=x.device)
    wrap_triton(conv1x1_kernel)[(parts * triton.cdiv(channels, sides.channels), views, 1)](
        x,
        weight,
        y,
        partials,
        norm_stats,
        norm_weight,
        norm_bias,
        rows,
        channels,
        out_height,
        out_width,
        height,
        width,
        eps,
        INPUTS=inputs,
        STRIDE=stride,
        BLOCK_ROWS=sides.rows,
        BLOCK_CHANNELS=sides.channels,
        BLOCK_INPUTS=sides.inputs,
        num_warps=sides.warps,
        num_stages=sides.stages,
    )
    part_rows = triton.cdiv(triton.cdiv(rows, sides.rows), parts) * sides.rows
    finish_moments(partials, stats, (running_mean, running_var, batches), momentum, rows, part_rows)
    return y, stats


class _Options(NamedTuple):
    stride: int
    views: int
    norm: Norm
    tile: Tile


def conv1x1(x: Tensor, weight: Tensor, norm: Norm, *, stride: int, views: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """Convolve without padding, and return y and the statistics (3, V, C) of `norm` over it.

    Args:
        x: bfloat16 or float16.
        weight: in the dtype of x.
        norm: the BatchNorm that follows; its running statistics are updated if there are any.
        views: V; the caller guarantees at least two positions per view.
        tile: any; the result depends on it within rounding.
    """
    return _Convolve.apply(to_channels_last(x), to_channels_last(weight), _Options(stride, views, norm, tile))


@torch.no_grad()
def norm_conv1x1(
    x: Tensor, before: Norm, stats: Tensor, weight: Tensor, norm: Norm, *, views: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """`conv1x1` of relu(BatchNorm(x)), which is not stored; without gradient.

    Args:
        before: the BatchNorm of x.
        stats: its statistics (3, V, K).
    """
    return convolve(
        to_channels_last(x),
        to_channels_last(weight),
        1,
        views,
        norm.running_mean,
        norm.running_var,
        norm.batches,
        norm.momentum,
        stats,
        before.weight,
        before.bias,
        before.eps,
        list(tile),
    )


class _Convolve(torch.autograd.Function):
    """The statistics have no gradient: that of BatchNorm includes theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        stride, views, norm, tile = options
        running = norm.running_mean, norm.running_var, norm.batches, norm.momentum
        y, stats = convolve(x, weight, stride, views, *running, None, None, None, 0.0, list(tile))
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)  # no zeros in place of the statistics' gradient
        return y, stats

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        stride, needs = [ctx.stride] * 2, [*ctx.needs_input_grad[:2], False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, needs
        )
        return dx, dw, None
