"""BatchNorm per view on a GPU: statistics, residual, ReLU and the stem's max-pool in Triton.

Formulas: kernels/batch_norm.py. As on the CPU, sums run over d = x - f, where f is the value at the
view's first position, so that a mean of 1000 costs no digit:

    delta = mean d,  s2 = mean d^2 - delta^2,  y = d (w i) + (b - delta w i)

Kernels (batch_norm_kernels.py), and values read and written per value of x (1 is one pass over x,
1/16 a bit per value):

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
that share its rows. Statistics are (3, V, C): f, delta and the biased variance.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op

from fastbyol.kernels.batch_norm_torch import Norm, Reduce, synchronize, to_channels_last
from fastbyol.kernels.triton.batch_norm_kernels import (
    apply_and_pool_kernel,
    apply_kernel,
    finish_moments_kernel,
    finish_sums_kernel,
    gradient_kernel,
    moments_kernel,
    sums_kernel,
)

if triton.knobs.runtime.interpret:  # torch 2.11 cannot wrap an interpreted kernel

    def wrap_triton(kernel: Any) -> Any:
        """Return the kernel."""
        return kernel

else:
    from torch.library import wrap_triton

TILE = 2048  # values per iteration: one 16-byte vector of bfloat16 per thread
MAX_CHANNELS = 128  # per tile
WARPS = 8
PROGRAMS = 1024  # that share a reduction: about eight per multiprocessor of an H100
ITERATIONS = 4  # tiles per program of `apply` and `gradient`, which share the channels' constants
FINISH_ROWS, FINISH_CHANNELS, FINISH_WARPS = 64, 32, 4


# --- operators ---


def tile(channels: int) -> dict[str, int]:
    """Return the sides of a tile."""
    width = min(max(triton.next_power_of_2(channels), 8), MAX_CHANNELS)
    return {"BLOCK_ROWS": TILE // width, "BLOCK_CHANNELS": width}


def _sizes(x: Tensor, views: int) -> tuple[int, int]:
    """Return R and C."""
    return x.numel() // (x.shape[1] * views), x.shape[1]


def _count_blocks(rows: int, channels: int) -> tuple[int, int]:
    """Return the numbers of row blocks and of channel blocks of a view."""
    rows_per_block, channels_per_block = tile(channels).values()
    return triton.cdiv(rows, rows_per_block), triton.cdiv(channels, channels_per_block)


def _parts(rows: int, channels: int, views: int) -> int:
    """Return P, on which sums depend: a function of the shape alone."""
    row_blocks, channel_blocks = _count_blocks(rows, channels)
    return max(1, min(row_blocks, PROGRAMS // (views * channel_blocks)))


def _float32(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _reduction_grid(rows: int, channels: int, views: int) -> tuple[int, int, int]:
    return _parts(rows, channels, views) * _count_blocks(rows, channels)[1], views, 1


def _stream_grid(rows: int, channels: int, views: int) -> tuple[int, int, int]:
    row_blocks, channel_blocks = _count_blocks(rows, channels)
    return triton.cdiv(row_blocks, ITERATIONS) * channel_blocks, views, 1


def _finish_grid(channels: int) -> tuple[int, int, int]:
    return triton.cdiv(channels, FINISH_CHANNELS), 1, 1


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
    parts = _parts(rows, channels, views)
    partials, stats = _float32(x, 2, views, parts, channels), _float32(x, 3, views, channels)
    wrap_triton(moments_kernel)[_reduction_grid(rows, channels, views)](
        x, stats, partials, rows, channels, **tile(channels), num_warps=WARPS
    )
    finish_moments(partials, stats, (running_mean, running_var, batches), momentum, rows)
    return stats


def finish_moments(
    partials: Tensor,
    stats: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    momentum: float,
    rows: int,
    part_rows: int | None = None,
) -> None:
    """Launch `finish_moments_kernel`.

    Args:
        partials: (2, V, P, C).
        stats: (3, V, C).
        running: mean, variance and number of batches.
        rows: R.
        part_rows: of each part, if partials are means and M2.
    """
    _, views, parts, channels = partials.shape
    wrap_triton(finish_moments_kernel)[_finish_grid(channels)](
        partials,
        stats,
        *running,
        rows,
        channels,
        parts,
        part_rows,
        momentum,
        VIEWS=views,
        ROWS=FINISH_ROWS,
        CHANNELS=FINISH_CHANNELS,
        num_warps=FINISH_WARPS,
    )


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
    wrap_triton(apply_kernel)[_stream_grid(rows, channels, views)](
        x,
        residual,
        y,
        mask if write_mask else None,
        stats,
        weight,
        bias,
        residual_stats,
        residual_weight,
        residual_bias,
        rows,
        channels,
        eps,
        residual_eps,
        RELU=relu,
        ITERATIONS=ITERATIONS,
        **tile(channels),
        num_warps=WARPS,
    )
    return y, mask


@triton_op("fastbyol::batch_norm_apply_and_pool", mutates_args={})
def apply_and_pool(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, same: bool
) -> tuple[Tensor, Tensor]:
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
        SAME=same,
        ITERATIONS=ITERATIONS,
        **tile(channels),
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
    same: bool,
    relu: bool,
    write_g: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return g (empty unless asked for), the means over positions and the gradients of the
    channels' parameters, as `finish_sums_kernel` describes them.
    """
    views = stats.shape[1]
    rows, channels = _sizes(x, views)
    parts = _parts(rows, channels, views)
    norms = 1 if residual_stats is None else 2
    g = torch.empty_like(x) if write_g else torch.empty(0, dtype=x.dtype, device=x.device)
    partials = _float32(x, 1 + norms, views, parts, channels)
    means, gradients = _float32(x, 1 + norms, views, channels), _float32(x, 2 * norms, channels)
    wrap_triton(sums_kernel)[_reduction_grid(rows, channels, views)](
        x,
        dy,
        dy2,
        mask,
        places,
        residual,
        g if write_g else None,
        partials,
        stats,
        weight,
        bias,
        residual_stats,
        rows,
        channels,
        x.shape[2] if x.ndim == 4 else 1,
        x.shape[3] if x.ndim == 4 else 1,
        eps,
        SAME=same,
        MASK_FROM_X=relu and mask is None,
        **tile(channels),
        num_warps=WARPS,
    )
    wrap_triton(finish_sums_kernel)[_finish_grid(channels)](
        partials,
        stats,
        residual_stats,
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
    same: bool,
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
        g2,
        places,
        residual,
        dx,
        d_residual if normalized else None,
        means,
        stats,
        weight,
        bias,
        residual_stats,
        residual_weight,
        residual_bias,
        rows,
        channels,
        x.shape[2] if x.ndim == 4 else 1,
        x.shape[3] if x.ndim == 4 else 1,
        eps,
        residual_eps,
        SAME=same,
        MASK_FROM_X=mask_from_x,
        ITERATIONS=ITERATIONS,
        **tile(channels),
        num_warps=WARPS,
    )
    return dx, d_residual


# --- autograd ---


class _Options(NamedTuple):
    eps: float
    residual_eps: float
    relu: bool
    pool: bool
    same: bool
    fork: bool
    reduce: Reduce | None
    needs_grad: bool


def batch_norm_triton(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    *,
    views: int,
    relu: bool,
    reduce: Reduce | None = None,
    pool: bool = False,
    same: bool = False,
    fork: bool = False,
    stats: Tensor | None = None,
    residual_stats: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """Return y, and the statistics of x and of a normalized residual, in eager mode or compiled.

    y = relu(BatchNorm(x) + residual). Arguments as for `batch_norm`, and:

    Args:
        norm: running statistics are updated from this rank's own; not with `reduce`.
        residual_norm: BatchNorm of the residual, y = relu(BatchNorm(x) + BatchNorm'(residual)).
        pool: apply ReLU and max-pool (kernels/max_pool.py) to the result; x has four dimensions and
            there is no residual.
        same: padding of the max-pool, as kernels/max_pool.py.
        fork: return y twice, for two consumers, whose gradients are added inside the backward pass.
        stats: f, delta and variance (3, V, C) of x over this rank, if they are known; the running
            statistics then include them already.
        residual_stats: the same of a normalized residual.
    """
    x = to_channels_last(x)
    residual = None if residual is None else to_channels_last(residual)
    stats = statistics_over_ranks(x, norm, views, reduce, stats)
    if residual_norm is not None:
        residual_stats = statistics_over_ranks(residual, residual_norm, views, reduce, residual_stats)
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
        _Options(norm.eps, other.eps, relu or pool, pool, same, fork, reduce, needs_grad),
    )
    return y if fork else (y,), stats, residual_stats


@torch.no_grad()
def statistics_over_ranks(
    x: Tensor, norm: Norm, views: int, reduce: Reduce | None, stats: Tensor | None = None
) -> Tensor:
    """Return f, delta and variance (3, V, C) over this rank or over all ranks of `reduce`.

    Args:
        stats: those of this rank, if they are known.
    """
    if stats is None:
        running = (None, None, None) if reduce is not None else (norm.running_mean, norm.running_var, norm.batches)
        stats = statistics(to_channels_last(x.detach()), views, *running, norm.momentum)
    if reduce is None:
        return stats
    first, delta, var = stats.unbind(0)
    mean, var = synchronize(first + delta, var, reduce)
    return torch.stack([first, mean - first, var])


class _Normalize(torch.autograd.Function):
    """y from x and its statistics; the backward pass includes that of the statistics."""

    @staticmethod
    def forward(ctx, x, stats, weight, bias, residual, r_stats, r_weight, r_bias, options):
        eps, r_eps, relu, pool, same, fork, _, needs_grad = options
        if pool:
            y, extra = apply_and_pool(x, stats, weight, bias, eps, same)
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
        eps, r_eps, relu, pool, same, _, reduce, _ = ctx.options
        mask, places = (None, extra) if pool else (extra, None)
        dy = to_channels_last(dy)
        dy2 = None if dy2 is None else to_channels_last(dy2)
        # g of a masked residual is also the residual's gradient.
        write_g = not pool and (mask is not None or dy2 is not None)
        g, means, gradients = sums(
            x, dy, dy2, mask, places, residual, stats, weight, bias, r_stats, eps, r_eps, same, relu, write_g
        )
        if reduce is not None:
            means = reduce(means)
        g, g2 = (g, None) if write_g else (dy, dy2)
        mask_from_x = relu and not write_g
        dx, d_residual = gradient(
            *(x, g, g2, places, residual, means, stats, weight, bias, r_stats, r_weight, r_bias, eps, r_eps),
            *(same, mask_from_x),
        )
        dw, db, *r_gradients = gradients.unbind(0)
        if r_stats is None:
            return dx, None, dw, db, g if ctx.has_residual else None, None, None, None, None
        return dx, None, dw, db, d_residual, None, *r_gradients, None
