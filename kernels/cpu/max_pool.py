"""Max-pool on the CPU, for bfloat16 and float32 tensors, in numba.

Formulas and shapes: kernels/max_pool.py. Backward gathers: an input position lies in 1, 2 or 4
windows, whose terms are added in float32 and in raster order, so threads share nothing and the
result is bit-identical for any number of them.

Bytes moved per input value of bfloat16 (float32): forward reads 2, writes 1/2 and 1/4 for k (4, 1,
1/4); backward reads 1/4 and 1/2, writes 2 (1/4, 1, 4). x is not saved for backward. Without
gradients k is not written.
"""

from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastbyol.kernels.cpu import openmp
from fastbyol.kernels.cpu.intrinsics import specialize, splat
from fastbyol.kernels.cpu.simd import for_each_channel_vector, load_vector, store_vector


def max_pool_cpu(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Implement `max_pool` with `padding` (a, b) before the image. The caller has checked x."""
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x, padding)
    return _forward(x, padding, with_indices=False)[0]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: tuple[int, int]) -> Tensor:
        y, indices = _forward(x, padding, with_indices=True)
        ctx.save_for_backward(indices)
        ctx.shape, ctx.padding = x.shape, padding
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dy = dy.contiguous(memory_format=torch.channels_last)
        return _backward(dy, ctx.saved_tensors[0], ctx.shape, ctx.padding), None


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


_BLOCK_ROWS = 8  # rows of the output image per task

# Arguments of both kernels: item size, blocks per image, sizes of the input and output image,
# padding before the image, addresses of x (or dx), y (or dy) and k.
_ITEM_SIZE, _BLOCKS, _CHANNELS, _HEIGHT, _WIDTH, _P, _Q, _A, _B, _X, _Y, _K = range(12)


def _forward(x: Tensor, padding: tuple[int, int], *, with_indices: bool) -> tuple[Tensor, Tensor | None]:
    """Return y and, if requested, k (uint8)."""
    n, channels, height, width = x.shape
    shape = n, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1
    y, k = _empty(shape, x.dtype), _empty(shape, torch.uint8) if with_indices else None
    blocks = -(-shape[2] // _BLOCK_ROWS)
    addresses = x.data_ptr(), y.data_ptr(), k.data_ptr() if with_indices else 0
    openmp.run(_forward_kernel, n * blocks, (x.itemsize, blocks, *x.shape[1:], *shape[2:], *padding, *addresses))
    return y, k


def _backward(dy: Tensor, k: Tensor, shape: torch.Size, padding: tuple[int, int]) -> Tensor:
    """Return dx of the given shape."""
    dx = _empty(shape, dy.dtype)
    blocks = -(-shape[2] // _BLOCK_ROWS)
    addresses = dx.data_ptr(), dy.data_ptr(), k.data_ptr()
    args = (dy.itemsize, blocks, *shape[1:], *dy.shape[2:], *padding, *addresses)
    openmp.run(_backward_kernel, shape[0] * blocks, args)
    return dx


# --- LLVM intrinsics ---

_I8 = ir.IntType(8)
_OUTSIDE = 255  # index of a position outside the window


def _load_bytes(builder, address, index, lanes) -> ir.Value:
    pointer = builder.gep(builder.inttoptr(address, _I8.as_pointer()), [index])
    return builder.load(builder.bitcast(pointer, ir.VectorType(_I8, lanes).as_pointer()), align=1)


def _store_bytes(builder, value, address, index) -> None:
    pointer = builder.gep(builder.inttoptr(address, _I8.as_pointer()), [index])
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


@intrinsic
def _window(typing_context, bfloat16, with_indices, rows, row_indices, columns, column_indices, channels, y, k):
    """Compute the maximum of one window.

    rows, row_indices, columns and column_indices are tuples of three. `rows` are addresses of the
    rows' first values in the image, and `columns` are byte offsets within them; their indices are
    3 i and j. At the image's edge a row or column inside it is repeated: its values then count
    twice, with the same index.
    """
    three, i64, boolean = types.UniTuple(types.int64, 3), types.int64, types.boolean

    def generate(context, builder, signature, arguments):
        *flags, rows, row_indices, columns, column_indices, channels, y, k = arguments
        positions = [
            (
                builder.add(builder.extract_value(rows, i), builder.extract_value(columns, j)),
                builder.add(builder.extract_value(row_indices, i), builder.extract_value(column_indices, j)),
            )
            for i in range(3)
            for j in range(3)
        ]

        def emit(bfloat16: bool, with_indices: bool) -> None:
            def body(channel, lanes) -> None:
                best = best_index = None
                for address, index in positions:
                    value = load_vector(builder, address, channel, lanes, bfloat16=bfloat16)
                    indices = splat(builder, builder.trunc(index, _I8), lanes) if with_indices else None
                    if best is None:
                        best, best_index = value, indices
                        continue
                    larger, nan = builder.fcmp_ordered(">", value, best), builder.fcmp_unordered("uno", value, value)
                    take = builder.or_(larger, nan)
                    best = builder.select(take, value, best)
                    best_index = builder.select(take, indices, best_index) if with_indices else None
                store_vector(builder, best, y, channel, bfloat16=bfloat16)
                if with_indices:
                    _store_bytes(builder, best_index, k, channel)

            for_each_channel_vector(builder, channels, body)

        specialize(builder, flags, emit)
        return context.get_dummy_value()

    return types.void(boolean, boolean, three, three, three, three, i64, i64, i64), generate


@intrinsic
def _gather(typing_context, bfloat16, dy, k, windows, indices, channels, dx):
    """Compute dx of one input position, which lies in the n `windows`.

    `windows` are their positions in the output image, and `indices` the input position's indices in
    them: tuples of n.
    """
    n, i64 = len(windows), types.int64
    tuple_n = types.UniTuple(i64, n)

    def generate(context, builder, signature, arguments):
        *flags, dy, k, windows, indices, channels, dx = arguments
        starts = [builder.mul(builder.extract_value(windows, i), channels) for i in range(n)]
        own_indices = [builder.trunc(builder.extract_value(indices, i), _I8) for i in range(n)]

        def emit(bfloat16: bool) -> None:
            def body(channel, lanes) -> None:
                total = None
                for start, own_index in zip(starts, own_indices, strict=True):
                    offset = builder.add(start, channel)
                    value = load_vector(builder, dy, offset, lanes, bfloat16=bfloat16)
                    stored, own = _load_bytes(builder, k, offset, lanes), splat(builder, own_index, lanes)
                    zero = ir.Constant(value.type, [0.0] * lanes)
                    value = builder.select(builder.icmp_unsigned("==", stored, own), value, zero)
                    total = value if total is None else builder.fadd(total, value)
                store_vector(builder, total, dx, channel, bfloat16=bfloat16)

            for_each_channel_vector(builder, channels, body)

        specialize(builder, flags, emit)
        return context.get_dummy_value()

    return types.void(types.boolean, i64, i64, tuple_n, tuple_n, i64, i64), generate


# --- kernels: one task per block of rows of an image ---

_JIT = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}


@njit(**_JIT)
def _window_rows(p, size, padding):
    """Return the rows (or columns) of window p, clamped to the image, and their indices."""
    first = 2 * p - padding
    a, c = max(first, 0), min(first + 2, size - 1)
    return (a, first + 1, c), (a - first, 1, c - first)


@openmp.kernel(**_JIT)
def _forward_kernel(task, args):
    """A block of rows of y (and k)."""
    size, channels, width = args[_ITEM_SIZE], args[_CHANNELS], args[_WIDTH]
    image, block = task // args[_BLOCKS], task % args[_BLOCKS]
    x = args[_X] + size * image * args[_HEIGHT] * width * channels
    row_bytes, pixel_bytes = size * width * channels, size * channels
    for p in range(block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, args[_P])):
        (h0, h1, h2), row_indices = _window_rows(p, args[_HEIGHT], args[_A])
        rows = (x + h0 * row_bytes, x + h1 * row_bytes, x + h2 * row_bytes)
        row_indices = (3 * row_indices[0], 3 * row_indices[1], 3 * row_indices[2])
        for q in range(args[_Q]):
            (w0, w1, w2), column_indices = _window_rows(q, width, args[_B])
            columns = (w0 * pixel_bytes, w1 * pixel_bytes, w2 * pixel_bytes)
            offset = ((image * args[_P] + p) * args[_Q] + q) * channels
            y, k = args[_Y] + size * offset, args[_K] + offset
            _window(size == 2, args[_K] != 0, rows, row_indices, columns, column_indices, channels, y, k)


@njit(**_JIT)
def _windows_of(h, windows):
    """Return the two windows of padded row (or column) h and its indices; an odd one is in one
    window.
    """
    a = h // 2
    if h % 2 == 1:
        return (a, a), (1, _OUTSIDE)
    return (max(a - 1, 0), min(a, windows - 1)), (2 if a > 0 else _OUTSIDE, 0 if a < windows else _OUTSIDE)


@njit(**_JIT)
def _index(i, j):
    return _OUTSIDE if i == _OUTSIDE or j == _OUTSIDE else 3 * i + j


@openmp.kernel(**_JIT)
def _backward_kernel(task, args):
    """A block of rows of dx."""
    size, channels, width, across = args[_ITEM_SIZE], args[_CHANNELS], args[_WIDTH], args[_Q]
    image, block = task // args[_BLOCKS], task % args[_BLOCKS]
    output_start = image * args[_P] * across * channels
    dy, k = args[_Y] + size * output_start, args[_K] + output_start
    for h in range(block * _BLOCK_ROWS, min((block + 1) * _BLOCK_ROWS, args[_HEIGHT])):
        (p0, p1), (i0, i1) = _windows_of(h + args[_A], args[_P])
        for w in range(width):
            (q0, q1), (j0, j1) = _windows_of(w + args[_B], across)
            dx = args[_X] + size * ((image * args[_HEIGHT] + h) * width + w) * channels
            n00, n01, n10, n11 = p0 * across + q0, p0 * across + q1, p1 * across + q0, p1 * across + q1
            k00, k01, k10, k11 = _index(i0, j0), _index(i0, j1), _index(i1, j0), _index(i1, j1)
            one_row, one_column = (h + args[_A]) % 2 == 1, (w + args[_B]) % 2 == 1
            if one_row and one_column:
                _gather(size == 2, dy, k, (n00,), (k00,), channels, dx)
            elif one_row:
                _gather(size == 2, dy, k, (n00, n01), (k00, k01), channels, dx)
            elif one_column:
                _gather(size == 2, dy, k, (n00, n10), (k00, k10), channels, dx)
            else:
                _gather(size == 2, dy, k, (n00, n01, n10, n11), (k00, k01, k10, k11), channels, dx)


KERNELS = (_forward_kernel, _backward_kernel)
