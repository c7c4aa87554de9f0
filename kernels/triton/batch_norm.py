"""BatchNorm per view on a GPU: statistics, residual, ReLU and the stem's max-pool in Triton.

Formulas: kernels/batch_norm.py. As on the CPU, sums run over d = x - f, where f is the value at the
view's first position, so that a mean of 1000 costs no digit:

    delta = mean d,  s2 = mean d^2 - delta^2,  y = d (w i) + (b - delta w i)

Kernels, and values read and written per value of x (1 is one pass over x, 1/16 a bit per value):

    moments     reads x                                     1
    apply       reads x (and residual), writes y            2 (3, and 1/16 for the mask)
    sums        reads x and dy                              2
                with residual and ReLU: reads x, dy, the second gradient and the mask, writes g
                                                            4 + 1/16
    gradient    reads x and dy or g, writes dx              3
    finish_...  add the partial sums of the programs of `moments` and `sums`, in a fixed order

A residual that is itself a BatchNorm (a block's downsampling) is normalized inside the kernels of
the sum. The stem's pool is fused too: its input y is never stored, and the gradient of the pool is
recomputed from the positions of the maxima. An output with two consumers may be returned twice
(`fork`), so that backward adds their gradients inside `sums`; autograd would add them in a pass of
its own.

The sums are float32 per program, added in float64. All results are deterministic.

Shapes: V views of R positions (rows) and C channels; x is (V R, C) in memory. P = programs per view
that share its rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op

from fastbyol.kernels.batch_norm_torch import Norm, Reduce, Statistics, synchronize, to_channels_last

if triton.knobs.runtime.interpret:  # torch 2.11 cannot wrap an interpreted kernel

    def wrap_triton(kernel: Any) -> Any:
        """Return the kernel."""
        return kernel

else:
    from torch.library import wrap_triton

TILE = 2048
MAX_CHANNELS = 128  # per tile
WARPS = 8
PROGRAMS = 1024  # that share a reduction: about eight per multiprocessor of an H100
ITERATIONS = 4  # tiles per program of `apply` and `gradient`, which share the channels' constants
FINISH_ROWS, FINISH_CHANNELS, FINISH_WARPS = 64, 32, 4

FIRST, DELTA, VAR = range(3)
"""Rows of the statistics (3, V, C)."""
_NO_MASK, _MASK_FROM_X, _MASK_FROM_BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_NO_RESIDUAL, _RESIDUAL, _NORMALIZED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


# --- kernels ---


@triton.jit
def _tile(BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, channels):
    """Return the channels of a program's tile, which of them exist, and the tile's offsets."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    offsets = tl.arange(0, BLOCK_ROWS)[:, None] * channels + c[None, :]
    return c, c < channels, offsets


@triton.jit
def _affine(stats, weight, bias, view, views, channels, c, inside, eps: tl.constexpr):
    """Return f, delta, invstd, scale and offset of channels `c`: y = (x - f) scale + offset."""
    at = stats + view * channels + c
    step = views * channels
    first = tl.load(at, mask=inside, other=0.0)
    delta = tl.load(at + step, mask=inside, other=0.0)
    invstd = 1.0 / tl.sqrt_rn(tl.load(at + 2 * step, mask=inside, other=0.0) + eps)
    scale = tl.load(weight + c, mask=inside, other=0.0) * invstd
    return first, delta, invstd, scale, tl.load(bias + c, mask=inside, other=0.0) - delta * scale


@triton.jit
def _part(part, parts, rows, BLOCK_ROWS: tl.constexpr):
    """Return the first row of a part of a view, and the row after its last."""
    length = tl.cdiv(tl.cdiv(rows, BLOCK_ROWS), parts) * BLOCK_ROWS
    return part * length, tl.minimum((part + 1) * length, rows)


@triton.jit
def moments_kernel(
    x,
    stats,  # (3, V, C) float32, of which f is written
    partials,  # (2, V, P, C) float32: sums of d and d^2
    rows,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Partial sums of d and d^2."""
    c, inside, offsets = _tile(BLOCK_ROWS, BLOCK_CHANNELS, channels)
    part, parts, view, views = tl.program_id(1), tl.num_programs(1), tl.program_id(2), tl.num_programs(2)
    origin = view.to(tl.int64) * rows
    first = tl.load(x + origin * channels + c, mask=inside, other=0.0).to(tl.float32)
    if part == 0:
        tl.store(stats + view * channels + c, first, mask=inside)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    start, end = _part(part, parts, rows, BLOCK_ROWS)
    for row in range(start, end, BLOCK_ROWS):
        exists = (row + tl.arange(0, BLOCK_ROWS) < end)[:, None] & inside[None, :]
        value = tl.load(x + (origin + row) * channels + offsets, mask=exists, other=0.0)
        d = tl.where(exists, value.to(tl.float32) - first[None, :], 0.0)
        sums += d
        squares += d * d
    out = partials + (view * parts + part) * channels + c
    tl.store(out, tl.sum(sums, 0), mask=inside)
    tl.store(out + views * parts * channels, tl.sum(squares, 0), mask=inside)


@triton.jit
def _total(partials, parts, channels, c, inside, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the float64 sum over parts of (P, C) partial sums."""
    total = tl.zeros((ROWS, CHANNELS), tl.float64)
    for part in range(0, parts, ROWS):
        at = part + tl.arange(0, ROWS)
        exists = (at < parts)[:, None] & inside[None, :]
        total += tl.load(partials + at[:, None] * channels + c[None, :], mask=exists, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def finish_moments_kernel(
    partials,
    stats,
    running_mean,  # (C,) float32, updated once per view
    running_var,
    batches,  # scalar int64, counts views
    rows,
    channels,
    parts,
    momentum: tl.constexpr,
    VIEWS: tl.constexpr,
    TRACK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics of all views from the partial sums, and the running statistics."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    if TRACK:
        average = tl.load(running_mean + c, mask=inside, other=0.0)
        spread = tl.load(running_var + c, mask=inside, other=0.0)
    for view in tl.static_range(VIEWS):
        sums = partials + view * parts * channels
        delta = _total(sums, parts, channels, c, inside, ROWS, CHANNELS) / rows
        square = _total(sums + VIEWS * parts * channels, parts, channels, c, inside, ROWS, CHANNELS) / rows
        wide = square - delta * delta
        var = tl.where(wide < 0, 0.0, wide).to(tl.float32)  # NaN stays NaN
        out = stats + view * channels + c
        tl.store(out + VIEWS * channels, delta.to(tl.float32), mask=inside)
        tl.store(out + 2 * VIEWS * channels, var, mask=inside)
        if TRACK:
            first = tl.load(out, mask=inside, other=0.0)
            average += momentum * (first + delta.to(tl.float32) - average)
            spread += momentum * (var * (rows / tl.maximum(rows - 1, 1)) - spread)
    if TRACK:
        tl.store(running_mean + c, average, mask=inside)
        tl.store(running_var + c, spread, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + VIEWS)


@triton.jit
def apply_kernel(
    x,
    residual,
    y,
    mask,  # (V R, ceil(C / 8)) uint8: bit k of byte j is set where channel 8 j + k of y is positive
    stats,
    weight,
    bias,
    residual_stats,
    residual_weight,
    residual_bias,
    rows,
    channels,
    eps: tl.constexpr,
    residual_eps: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Y of ITERATIONS tiles."""
    c, inside, offsets = _tile(BLOCK_ROWS, BLOCK_CHANNELS, channels)
    view, views = tl.program_id(2), tl.num_programs(2)
    first, _, _, scale, offset = _affine(stats, weight, bias, view, views, channels, c, inside, eps)
    if RESIDUAL == _NORMALIZED:
        r_first, _, _, r_scale, r_offset = _affine(
            residual_stats, residual_weight, residual_bias, view, views, channels, c, inside, residual_eps
        )
    start = tl.program_id(1) * ITERATIONS * BLOCK_ROWS
    for row in range(start, tl.minimum(start + ITERATIONS * BLOCK_ROWS, rows), BLOCK_ROWS):
        r = row + tl.arange(0, BLOCK_ROWS)
        exists = (r < rows)[:, None] & inside[None, :]
        base = (view.to(tl.int64) * rows + row) * channels
        value = tl.load(x + base + offsets, mask=exists, other=0.0).to(tl.float32)
        out = (value - first[None, :]) * scale[None, :] + offset[None, :]
        if RESIDUAL != _NO_RESIDUAL:
            more = tl.load(residual + base + offsets, mask=exists, other=0.0).to(tl.float32)
            if RESIDUAL == _NORMALIZED:
                more = (more - r_first[None, :]) * r_scale[None, :] + r_offset[None, :]
            out += more
        if RELU:
            blocked = out <= 0.0  # NaN is not
            out = tl.where(blocked, 0.0, out)
            if WRITE_MASK:
                bits = tl.where(blocked, 0, 1).to(tl.int32).reshape(BLOCK_ROWS, BLOCK_CHANNELS // 8, 8)
                packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
                width = tl.cdiv(channels, 8)
                j = tl.program_id(0) * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
                at = mask + (view.to(tl.int64) * rows + row) * width + tl.arange(0, BLOCK_ROWS)[:, None] * width
                tl.store(at + j[None, :], packed.to(tl.uint8), mask=(r < rows)[:, None] & (j < width)[None, :])
        tl.store(y + base + offsets, out.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _unpack(mask, first_row, exists_row, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Return a tile of the mask, 0 or 1."""
    width = tl.cdiv(channels, 8)
    j = tl.program_id(0) * (BLOCK_CHANNELS // 8) + tl.arange(0, BLOCK_CHANNELS // 8)
    at = mask + first_row * width + tl.arange(0, BLOCK_ROWS)[:, None] * width + j[None, :]
    packed = tl.load(at, mask=exists_row[:, None] & (j < width)[None, :], other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return bits.reshape(BLOCK_ROWS, BLOCK_CHANNELS)


@triton.jit
def _incoming(
    dy,
    dy2,
    places,
    view,
    rows,
    row,
    exists_row,
    exists,
    c,
    offsets,
    channels,
    height,
    width,
    TWO: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Return a tile of the gradient of y; with POOL from the gradient of the pooled y.

    Position (h, w) is in the windows of p = floor(h / 2) and, if h is odd, p = (h + 1) / 2.
    """
    if POOL:
        r = row + tl.arange(0, BLOCK_ROWS)
        h, w = r % (height * width) // width, r % width
        image = view * (rows // (height * width)) + r // (height * width)
        pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
        value = tl.zeros(offsets.shape, tl.float32)
        for a in tl.static_range(2):
            for b in tl.static_range(2):
                p, q = (h + a) // 2, (w + b) // 2
                place = 3 * (h - 2 * p + 1) + w - 2 * q + 1
                valid = exists_row & (p < pooled_height) & (q < pooled_width)
                if a == 1:
                    valid = valid & (h % 2 == 1)
                if b == 1:
                    valid = valid & (w % 2 == 1)
                position = (image.to(tl.int64) * pooled_height + p) * pooled_width + q
                at = position[:, None] * channels + c[None, :]
                chosen = exists & valid[:, None]
                found = tl.load(places + at, mask=chosen, other=255).to(tl.int32) == place[:, None]
                part = tl.load(dy + at, mask=chosen, other=0.0).to(tl.float32)
                if TWO:
                    part += tl.load(dy2 + at, mask=chosen, other=0.0).to(tl.float32)
                value += tl.where(found, part, 0.0)
    else:
        base = (view.to(tl.int64) * rows + row) * channels
        value = tl.load(dy + base + offsets, mask=exists, other=0.0).to(tl.float32)
        if TWO:
            value += tl.load(dy2 + base + offsets, mask=exists, other=0.0).to(tl.float32)
    return value


@triton.jit
def sums_kernel(
    x,
    dy,
    dy2,  # added to dy
    mask,
    places,  # (V N P Q, C) uint8: 3 i + j of the maximum's tap (i, j) in its window
    residual,
    g,
    partials,  # (2 or 3, V, P, C) float32: sums of g, g d, and g d of a normalized residual
    stats,
    weight,
    bias,
    residual_stats,
    rows,
    channels,
    height,
    width,
    eps: tl.constexpr,
    TWO: tl.constexpr,
    POOL: tl.constexpr,
    MASK: tl.constexpr,
    NORMALIZED: tl.constexpr,
    WRITE_G: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Partial sums of g and g d, and g itself."""
    c, inside, offsets = _tile(BLOCK_ROWS, BLOCK_CHANNELS, channels)
    part, parts, view, views = tl.program_id(1), tl.num_programs(1), tl.program_id(2), tl.num_programs(2)
    first, _, _, scale, offset = _affine(stats, weight, bias, view, views, channels, c, inside, eps)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    products = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    if NORMALIZED:
        r_first = tl.load(residual_stats + view * channels + c, mask=inside, other=0.0)
        r_products = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    start, end = _part(part, parts, rows, BLOCK_ROWS)
    for row in range(start, end, BLOCK_ROWS):
        exists_row = row + tl.arange(0, BLOCK_ROWS) < end
        exists = exists_row[:, None] & inside[None, :]
        first_row = view.to(tl.int64) * rows + row
        base = first_row * channels
        d = tl.load(x + base + offsets, mask=exists, other=0.0).to(tl.float32) - first[None, :]
        value = _incoming(
            dy,
            dy2,
            places,
            view,
            rows,
            row,
            exists_row,
            exists,
            c,
            offsets,
            channels,
            height,
            width,
            TWO,
            POOL,
            BLOCK_ROWS,
        )
        if MASK == _MASK_FROM_X:
            value = tl.where(d * scale[None, :] + offset[None, :] <= 0.0, 0.0, value)
        if MASK == _MASK_FROM_BITS:
            bits = _unpack(mask, first_row, exists_row, channels, BLOCK_ROWS, BLOCK_CHANNELS)
            value = tl.where(bits == 0, 0.0, value)
        if WRITE_G:
            rounded = value.to(g.dtype.element_ty)
            tl.store(g + base + offsets, rounded, mask=exists)
            value = rounded.to(tl.float32)  # as `gradient` reads it
        sums += value
        products += value * tl.where(exists, d, 0.0)
        if NORMALIZED:
            more = tl.load(residual + base + offsets, mask=exists, other=0.0).to(tl.float32)
            r_products += value * tl.where(exists, more - r_first[None, :], 0.0)
    out = partials + (view * parts + part) * channels + c
    tl.store(out, tl.sum(sums, 0), mask=inside)
    tl.store(out + views * parts * channels, tl.sum(products, 0), mask=inside)
    if NORMALIZED:
        tl.store(out + 2 * views * parts * channels, tl.sum(r_products, 0), mask=inside)


@triton.jit
def finish_sums_kernel(
    partials,  # (1 + N, V, P, C), N = norms
    stats,
    residual_stats,
    means,  # (1 + N, V, C) float32: mean g, and mean(g xhat) of each norm
    gradients,  # (2 N, C) float32: dw and db of each norm; db is the same for all
    rows,
    channels,
    parts,
    eps: tl.constexpr,
    residual_eps: tl.constexpr,
    VIEWS: tl.constexpr,
    NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Means over the positions of each view, and the gradients of weights and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    step = VIEWS * parts * channels
    db = tl.zeros((CHANNELS,), tl.float64)
    for view in tl.static_range(VIEWS):
        total = _total(partials + view * parts * channels, parts, channels, c, inside, ROWS, CHANNELS)
        tl.store(means + view * channels + c, (total / rows).to(tl.float32), mask=inside)
        db += total
    for norm in tl.static_range(NORMS):
        table = stats if norm == 0 else residual_stats
        constant = eps if norm == 0 else residual_eps
        dw = tl.zeros((CHANNELS,), tl.float64)
        for view in tl.static_range(VIEWS):
            part = partials + view * parts * channels
            total = _total(part, parts, channels, c, inside, ROWS, CHANNELS)
            product = _total(part + (1 + norm) * step, parts, channels, c, inside, ROWS, CHANNELS)
            delta = tl.load(table + (VIEWS + view) * channels + c, mask=inside, other=0.0)
            var = tl.load(table + (2 * VIEWS + view) * channels + c, mask=inside, other=0.0)
            product = (product - delta * total) * (1.0 / tl.sqrt_rn(var + constant))
            out = means + ((1 + norm) * VIEWS + view) * channels + c
            tl.store(out, (product / rows).to(tl.float32), mask=inside)
            dw += product
        tl.store(gradients + 2 * norm * channels + c, dw.to(tl.float32), mask=inside)
        tl.store(gradients + (2 * norm + 1) * channels + c, db.to(tl.float32), mask=inside)


@triton.jit
def _slopes(means, norm, view, views, channels, c, inside, scale, invstd, delta):
    """Return slope and constant of dx = scale g + slope d + constant."""
    mean_g = tl.load(means + view * channels + c, mask=inside, other=0.0)
    mean_gx = tl.load(means + ((1 + norm) * views + view) * channels + c, mask=inside, other=0.0)
    slope = -scale * invstd * mean_gx
    return slope, -scale * mean_g - slope * delta


@triton.jit
def gradient_kernel(
    x,
    g,
    g2,
    places,
    residual,
    dx,
    d_residual,
    means,
    stats,
    weight,
    bias,
    residual_stats,
    residual_weight,
    residual_bias,
    rows,
    channels,
    height,
    width,
    eps: tl.constexpr,
    residual_eps: tl.constexpr,
    TWO: tl.constexpr,
    POOL: tl.constexpr,
    MASK: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Dx of ITERATIONS tiles, and that of a normalized residual."""
    c, inside, offsets = _tile(BLOCK_ROWS, BLOCK_CHANNELS, channels)
    view, views = tl.program_id(2), tl.num_programs(2)
    first, delta, invstd, scale, offset = _affine(stats, weight, bias, view, views, channels, c, inside, eps)
    slope, constant = _slopes(means, 0, view, views, channels, c, inside, scale, invstd, delta)
    if NORMALIZED:
        r_first, r_delta, r_invstd, r_scale, _ = _affine(
            residual_stats, residual_weight, residual_bias, view, views, channels, c, inside, residual_eps
        )
        r_slope, r_constant = _slopes(means, 1, view, views, channels, c, inside, r_scale, r_invstd, r_delta)
    start = tl.program_id(1) * ITERATIONS * BLOCK_ROWS
    for row in range(start, tl.minimum(start + ITERATIONS * BLOCK_ROWS, rows), BLOCK_ROWS):
        exists_row = row + tl.arange(0, BLOCK_ROWS) < rows
        exists = exists_row[:, None] & inside[None, :]
        base = (view.to(tl.int64) * rows + row) * channels
        d = tl.load(x + base + offsets, mask=exists, other=0.0).to(tl.float32) - first[None, :]
        value = _incoming(
            g,
            g2,
            places,
            view,
            rows,
            row,
            exists_row,
            exists,
            c,
            offsets,
            channels,
            height,
            width,
            TWO,
            POOL,
            BLOCK_ROWS,
        )
        if MASK == _MASK_FROM_X:
            value = tl.where(d * scale[None, :] + offset[None, :] <= 0.0, 0.0, value)
        out = value * scale[None, :] + (d * slope[None, :] + constant[None, :])
        tl.store(dx + base + offsets, out.to(dx.dtype.element_ty), mask=exists)
        if NORMALIZED:
            more = tl.load(residual + base + offsets, mask=exists, other=0.0).to(tl.float32) - r_first[None, :]
            out = value * r_scale[None, :] + (more * r_slope[None, :] + r_constant[None, :])
            tl.store(d_residual + base + offsets, out.to(d_residual.dtype.element_ty), mask=exists)


@triton.jit
def apply_and_pool_kernel(
    x,  # (V N, H, W, C)
    y,  # (V N, P, Q, C)
    places,
    stats,
    weight,
    bias,
    rows,  # N P Q, of one view
    channels,
    height,
    width,
    eps: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Max-pool of relu(BatchNorm(x)): 3x3 windows, stride 2, padding 1, as kernels/max_pool.py."""
    c, inside, offsets = _tile(BLOCK_ROWS, BLOCK_CHANNELS, channels)
    view, views = tl.program_id(2), tl.num_programs(2)
    first, _, _, scale, offset = _affine(stats, weight, bias, view, views, channels, c, inside, eps)
    pooled_height, pooled_width = (height + 1) // 2, (width + 1) // 2
    start = tl.program_id(1) * ITERATIONS * BLOCK_ROWS
    for row in range(start, tl.minimum(start + ITERATIONS * BLOCK_ROWS, rows), BLOCK_ROWS):
        r = row + tl.arange(0, BLOCK_ROWS)
        exists = (r < rows)[:, None] & inside[None, :]
        p, q = r % (pooled_height * pooled_width) // pooled_width, r % pooled_width
        image = view * (rows // (pooled_height * pooled_width)) + r // (pooled_height * pooled_width)
        best = tl.full((BLOCK_ROWS, BLOCK_CHANNELS), float("-inf"), tl.float32)
        place = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.int32)
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                h, w = 2 * p - 1 + i, 2 * q - 1 + j
                valid = (h >= 0) & (h < height) & (w >= 0) & (w < width)
                position = (image.to(tl.int64) * height + h) * width + w
                chosen = exists & valid[:, None]
                value = tl.load(x + position[:, None] * channels + c[None, :], mask=chosen, other=0.0).to(tl.float32)
                out = (value - first[None, :]) * scale[None, :] + offset[None, :]
                out = tl.where(out <= 0.0, 0.0, out).to(y.dtype.element_ty).to(tl.float32)  # ties as in a stored y
                better = chosen & ((out > best) | (out != out))
                best = tl.where(better, out, best)
                place = tl.where(better, 3 * i + j, place)
        base = (view.to(tl.int64) * rows + row) * channels
        tl.store(y + base + offsets, best.to(y.dtype.element_ty), mask=exists)
        tl.store(places + base + offsets, place.to(tl.uint8), mask=exists)


# --- operators ---


def _blocks(channels: int) -> dict[str, int]:
    """Return the sides of a tile."""
    width = min(max(triton.next_power_of_2(channels), 8), MAX_CHANNELS)
    return {"BLOCK_ROWS": TILE // width, "BLOCK_CHANNELS": width}


def _sizes(x: Tensor, views: int) -> tuple[int, int]:
    """Return R and C."""
    return x.numel() // (x.shape[1] * views), x.shape[1]


def _parts(rows: int, channels: int, views: int) -> int:
    """Return P, on which sums depend: a function of the shape alone."""
    blocks = _blocks(channels)
    columns = triton.cdiv(channels, blocks["BLOCK_CHANNELS"])
    return max(1, min(triton.cdiv(rows, blocks["BLOCK_ROWS"]), PROGRAMS // (views * columns)))


def _float32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _stream_grid(rows: int, channels: int, views: int) -> tuple[int, int, int]:
    blocks = _blocks(channels)
    return (
        triton.cdiv(channels, blocks["BLOCK_CHANNELS"]),
        triton.cdiv(rows, blocks["BLOCK_ROWS"] * ITERATIONS),
        views,
    )


@triton_op("fastbyol::batch_norm_statistics", mutates_args={"running_mean", "running_var", "batches"})
def statistics(
    x: Tensor,
    views: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
) -> Tensor:
    """Return f, delta and variance (3, V, C) of x, and update the running statistics if given."""
    rows, channels = _sizes(x, views)
    blocks, parts = _blocks(channels), _parts(rows, channels, views)
    partials, stats = _float32(x, 2, views, parts, channels), _float32(x, 3, views, channels)
    grid = triton.cdiv(channels, blocks["BLOCK_CHANNELS"]), parts, views
    wrap_triton(moments_kernel)[grid](x, stats, partials, rows, channels, **blocks, num_warps=WARPS)
    wrap_triton(finish_moments_kernel)[(triton.cdiv(channels, FINISH_CHANNELS), 1, 1)](
        partials,
        stats,
        stats if running_mean is None else running_mean,
        stats if running_var is None else running_var,
        stats if batches is None else batches,
        rows,
        channels,
        parts,
        momentum,
        VIEWS=views,
        TRACK=running_mean is not None,
        ROWS=FINISH_ROWS,
        CHANNELS=FINISH_CHANNELS,
        num_warps=FINISH_WARPS,
    )
    return stats


@triton_op("fastbyol::batch_norm_apply", mutates_args={})
def apply(
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    residual_stats: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    residual_eps: float,
    relu: bool,
    write_mask: bool,
) -> tuple[Tensor, Tensor]:
    """Return y, and the bits of its sign if asked for."""
    views = stats.shape[1]
    rows, channels = _sizes(x, views)
    y = torch.empty_like(x)
    shape = (views * rows, triton.cdiv(channels, 8)) if write_mask else (0,)
    mask = torch.empty(shape, dtype=torch.uint8, device=x.device)
    kind = _NO_RESIDUAL if residual is None else _RESIDUAL if residual_stats is None else _NORMALIZED
    wrap_triton(apply_kernel)[_stream_grid(rows, channels, views)](
        x,
        x if residual is None else residual,
        y,
        mask if write_mask else y,
        stats,
        weight,
        bias,
        stats if residual_stats is None else residual_stats,
        weight if residual_weight is None else residual_weight,
        bias if residual_bias is None else residual_bias,
        rows,
        channels,
        eps,
        residual_eps,
        RESIDUAL=kind.value,
        RELU=relu,
        WRITE_MASK=write_mask,
        ITERATIONS=ITERATIONS,
        **_blocks(channels),
        num_warps=WARPS,
    )
    return y, mask


@triton_op("fastbyol::batch_norm_apply_and_pool", mutates_args={})
def apply_and_pool(x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the max-pool (V N, C, P, Q) of relu(y), and the places of the maxima."""
    views = stats.shape[1]
    images, channels, height, width = x.shape
    # Inductor would fill torch.empty(..., memory_format=torch.channels_last).
    shape = images, (height + 1) // 2, (width + 1) // 2, channels
    y = torch.empty(shape, dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    places = torch.empty(shape, dtype=torch.uint8, device=x.device).permute(0, 3, 1, 2)
    rows, _ = _sizes(y, views)
    wrap_triton(apply_and_pool_kernel)[_stream_grid(rows, channels, views)](
        x,
        y,
        places,
        stats,
        weight,
        bias,
        rows,
        channels,
        height,
        width,
        eps,
        ITERATIONS=ITERATIONS,
        **_blocks(channels),
        num_warps=WARPS,
    )
    return y, places


@triton_op("fastbyol::batch_norm_sums", mutates_args={})
def sums(
    x: Tensor,
    dy: Tensor,
    dy2: Tensor | None,
    mask: Tensor | None,
    places: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_stats: Tensor | None,
    eps: float,
    residual_eps: float,
    relu: bool,
    write_g: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return g (empty unless asked for), the means over positions and the gradients of the
    channels' parameters, as `finish_sums_kernel` describes them.
    """
    views = stats.shape[1]
    rows, channels = _sizes(x, views)
    blocks, parts = _blocks(channels), _parts(rows, channels, views)
    norms = 1 if residual_stats is None else 2
    g = torch.empty_like(x) if write_g else torch.empty(0, dtype=x.dtype, device=x.device)
    partials = _float32(x, 1 + norms, views, parts, channels)
    means, gradients = _float32(x, 1 + norms, views, channels), _float32(x, 2 * norms, channels)
    kind = _MASK_FROM_BITS if mask is not None else _MASK_FROM_X if relu else _NO_MASK
    grid = triton.cdiv(channels, blocks["BLOCK_CHANNELS"]), parts, views
    wrap_triton(sums_kernel)[grid](
        x,
        dy,
        dy if dy2 is None else dy2,
        x if mask is None else mask,
        x if places is None else places,
        x if residual is None else residual,
        g if write_g else x,
        partials,
        stats,
        weight,
        bias,
        stats if residual_stats is None else residual_stats,
        rows,
        channels,
        x.shape[2] if x.ndim == 4 else 1,
        x.shape[3] if x.ndim == 4 else 1,
        eps,
        TWO=dy2 is not None,
        POOL=places is not None,
        MASK=kind.value,
        NORMALIZED=norms == 2,
        WRITE_G=write_g,
        **blocks,
        num_warps=WARPS,
    )
    wrap_triton(finish_sums_kernel)[(triton.cdiv(channels, FINISH_CHANNELS), 1, 1)](
        partials,
        stats,
        stats if residual_stats is None else residual_stats,
        means,
        gradients,
        rows,
        channels,
        parts,
        eps,
        residual_eps,
        VIEWS=views,
        NORMS=norms,
        ROWS=FINISH_ROWS,
        CHANNELS=FINISH_CHANNELS,
        num_warps=FINISH_WARPS,
    )
    return g, means, gradients


@triton_op("fastbyol::batch_norm_gradient", mutates_args={})
def gradient(
    x: Tensor,
    g: Tensor,
    g2: Tensor | None,
    places: Tensor | None,
    residual: Tensor | None,
    means: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_stats: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    eps: float,
    residual_eps: float,
    mask_from_x: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx, and that of a normalized residual (else empty)."""
    views = stats.shape[1]
    rows, channels = _sizes(x, views)
    normalized = residual_stats is not None
    dx = torch.empty_like(x)
    d_residual = torch.empty_like(x) if normalized else torch.empty(0, dtype=x.dtype, device=x.device)
    wrap_triton(gradient_kernel)[_stream_grid(rows, channels, views)](
        x,
        g,
        g if g2 is None else g2,
        x if places is None else places,
        x if residual is None else residual,
        dx,
        d_residual if normalized else x,
        means,
        stats,
        weight,
        bias,
        stats if residual_stats is None else residual_stats,
        weight if residual_weight is None else residual_weight,
        bias if residual_bias is None else residual_bias,
        rows,
        channels,
        x.shape[2] if x.ndim == 4 else 1,
        x.shape[3] if x.ndim == 4 else 1,
        eps,
        residual_eps,
        TWO=g2 is not None,
        POOL=places is not None,
        MASK=(_MASK_FROM_X if mask_from_x else _NO_MASK).value,
        NORMALIZED=normalized,
        ITERATIONS=ITERATIONS,
        **_blocks(channels),
        num_warps=WARPS,
    )
    return dx, d_residual


# --- autograd ---


class _Options(NamedTuple):
    eps: float
    residual_eps: float
    relu: bool
    pool: bool
    fork: bool
    reduce: Reduce | None
    needs_grad: bool


def batch_norm_triton(
    x: Tensor,
    norm: Norm,
    *,
    views: int,
    relu: bool,
    reduce: Reduce | None = None,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    pool: bool = False,
    fork: bool = False,
) -> tuple[tuple[Tensor, ...], Statistics, Statistics]:
    """Return y, and the statistics of x and of the residual, in eager mode or compiled.

    y = relu(BatchNorm(x) + residual). Arguments as for `batch_norm`, and:

    Args:
        norm: running statistics are updated from this rank's own; not with `reduce`.
        residual_norm: BatchNorm of the residual, y = relu(BatchNorm(x) + BatchNorm'(residual)).
        pool: apply ReLU and max-pool (kernels/max_pool.py) to the result; x has four dimensions and
            there is no residual.
        fork: return y twice, for two consumers, whose gradients are added inside the backward pass.
    """
    x = to_channels_last(x)
    residual = None if residual is None else to_channels_last(residual)
    stats = _statistics(x, norm, views, reduce)
    residual_stats = None if residual_norm is None else _statistics(residual, residual_norm, views, reduce)
    other = residual_norm or norm
    inputs = [t for t in (x, residual, norm.weight, norm.bias, other.weight, other.bias) if t is not None]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    y = _Normalize.apply(
        x,
        stats,
        norm.weight,
        norm.bias,
        residual,
        residual_stats,
        None if residual_norm is None else residual_norm.weight,
        None if residual_norm is None else residual_norm.bias,
        _Options(norm.eps, other.eps, relu or pool, pool, fork, reduce, needs_grad),
    )
    statistics = [(t[FIRST] + t[DELTA], t[VAR]) for t in (stats, stats if residual_stats is None else residual_stats)]
    return y if fork else (y,), *statistics


@torch.no_grad()
def _statistics(x: Tensor, norm: Norm, views: int, reduce: Reduce | None) -> Tensor:
    """Return f, delta and variance (3, V, C) over this rank or over all ranks of `reduce`."""
    running = (None, None, None) if reduce is not None else (norm.running_mean, norm.running_var, norm.batches)
    stats = statistics(x.detach(), views, *running, norm.momentum)
    if reduce is None:
        return stats
    first, delta, var = stats.unbind(0)
    mean, var = synchronize(first + delta, var, reduce)
    return torch.stack([first, mean - first, var])


class _Normalize(torch.autograd.Function):
    """y from x and its statistics; the backward pass includes that of the statistics."""

    @staticmethod
    def forward(ctx, x, stats, weight, bias, residual, r_stats, r_weight, r_bias, options):
        eps, r_eps, relu, pool, fork, _, needs_grad = options
        if pool:
            y, extra = apply_and_pool(x, stats, weight, bias, eps)
        else:
            write_mask = needs_grad and relu and residual is not None
            y, extra = apply(x, stats, weight, bias, eps, residual, r_stats, r_weight, r_bias, r_eps, relu, write_mask)
            extra = extra if write_mask else None
        normalized = None if r_stats is None else residual
        ctx.save_for_backward(x, stats, weight, bias, extra, normalized, r_stats, r_weight, r_bias)
        ctx.options, ctx.has_residual = options, residual is not None
        return (y, y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx, dy, dy2=None):
        x, stats, weight, bias, extra, residual, r_stats, r_weight, r_bias = ctx.saved_tensors
        eps, r_eps, relu, pool, _, reduce, _ = ctx.options
        mask, places = (None, extra) if pool else (extra, None)
        dy = to_channels_last(dy)
        dy2 = None if dy2 is None else to_channels_last(dy2)
        # g of a masked residual is also the residual's gradient.
        write_g = not pool and (mask is not None or dy2 is not None)
        g, means, gradients = sums(
            x, dy, dy2, mask, places, residual, stats, weight, bias, r_stats, eps, r_eps, relu, write_g
        )
        if reduce is not None:
            means = reduce(means)
        g, g2 = (g, None) if write_g else (dy, dy2)
        mask_from_x = relu and not write_g
        dx, d_residual = gradient(
            x, g, g2, places, residual, means, stats, weight, bias, r_stats, r_weight, r_bias, eps, r_eps, mask_from_x
        )
        dw, db, *r_gradients = gradients.unbind(0)
        if r_stats is None:
            return dx, None, dw, db, g if ctx.has_residual else None, None, None, None, None
        return dx, None, dw, db, d_residual, None, *r_gradients, None
