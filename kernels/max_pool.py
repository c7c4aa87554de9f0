"""Max-pool of 3x3 windows, stride 2, padding 1, as in the stem of a ResNet: forward and backward on the CPU.

Formulas, per channel, for output position (p, q) and its window x[2 p - 1 + i, 2 q - 1 + j], i, j in 0 .. 2, inside of the image:

    y[p, q] = the largest value; NaN where the window holds one
    k[p, q] = 3 i + j of the first value that is the largest, of the last NaN where there is one (as in torch)
    dx[h, w] = sum of dy[p, q] over the windows with k[p, q] = 3 (h - 2 p + 1) + (w - 2 q + 1)

Backward gathers: an input position lies in 1, 2 or 4 windows, whose terms are added in float32 and in raster order, so that threads
share nothing and the bits are the same for any number of them.

Bytes that are moved an input value of bfloat16 (float32): forward 2 read, 1/2 written, 1/4 for k (4, 1, 1/4); backward 1/4 and 1/2
read, 2 written (1/4, 1, 4). x is not kept for backward; without gradients k is not written.

Shapes: x (N, C, H, W), y (N, C, P, Q), P = floor((H - 1) / 2) + 1, all in channels-last memory.
"""

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastbyol.kernels.cpu import openmp as threads
from fastbyol.kernels.cpu.intrinsics import splat
from fastbyol.kernels.cpu.simd import load, over_channels, store


def max_pool_reference(x: Tensor, kernel_size: int = 3, stride: int = 2, padding: int = 1) -> Tensor:
    """The formulas in torch, for any window."""
    return F.max_pool2d(x, kernel_size, stride, padding)


def max_pool(x: Tensor) -> Tensor:
    """y of 3x3 windows, stride 2, padding 1.

    numba on the CPU for bfloat16 and float32, the reference elsewhere and under torch.compile.

    Args:
        x: (N, C, H, W); used in channels-last memory on the CPU, copied where it lies otherwise.

    Returns:
        (N, C, P, Q) of x's dtype, on the CPU channels-last.

    Raises:
        ValueError: x has not four dimensions, or is empty.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"x must be (N, C, H, W) and not empty, not {tuple(x.shape)}")
    has_memory = type(x) is Tensor and x.is_cpu  # unlike FakeTensor, for example
    if torch.compiler.is_compiling() or not has_memory or x.dtype not in (torch.bfloat16, torch.float32):
        return max_pool_reference(x)
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x)
    return _pool(x, places=False)[0]


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, places = _pool(x, places=True)
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _unpool(dy.contiguous(memory_format=torch.channels_last), ctx.saved_tensors[0], ctx.shape)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def _pool(x: Tensor, *, places: bool) -> tuple[Tensor, Tensor | None]:
    n, channels, height, width = x.shape
    shape = n, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1
    y, k = _empty(shape, x.dtype), _empty(shape, torch.uint8) if places else None
    blocks = -(-shape[2] // _BLOCK)
    words = x.itemsize, blocks, *x.shape[1:], *shape[2:], x.data_ptr(), y.data_ptr(), k.data_ptr() if places else 0
    threads.run(_forward, n * blocks, words)
    return y, k


def _unpool(dy: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    dx = _empty(shape, dy.dtype)
    blocks = -(-shape[2] // _BLOCK)
    tensors = dx.data_ptr(), dy.data_ptr(), places.data_ptr()
    threads.run(_backward, shape[0] * blocks, (dy.itemsize, blocks, *shape[1:], *dy.shape[2:], *tensors))
    return dx


# --- numba, threads over blocks of rows of an image ---

_I64, _I8 = ir.IntType(64), ir.IntType(8)
_BLOCK = 8  # rows of the written image that a thread takes at a time
_NOWHERE = 255  # no place in a window


def _window(*, bfloat16: bool, places: bool) -> Callable[..., Any]:
    """Makes f(rows, columns, channels, y, k): one window; rows and columns are tuples of three.

    rows: addresses of its rows' first value in the image, and columns: byte offsets of its columns in them, each with 3 i or j.
    At an edge they name a row or column inside the image twice: its values then count twice, under the same place.
    """

    @intrinsic
    def window(typing_context, rows, row_places, columns, column_places, channels, y, k):
        three, whole = types.UniTuple(types.int64, 3), types.int64

        def generate(context, builder, signature, arguments):
            rows, row_places, columns, column_places, channels, y, k = arguments
            inside = [
                (
                    builder.add(builder.extract_value(rows, i), builder.extract_value(columns, j)),
                    builder.add(builder.extract_value(row_places, i), builder.extract_value(column_places, j)),
                )
                for i in range(3)
                for j in range(3)
            ]

            def body(channel, lanes) -> None:
                best = place = None
                for address, number in inside:
                    value = load(builder, address, channel, lanes, bfloat16=bfloat16)
                    code = splat(builder, builder.trunc(number, _I8), lanes) if places else None
                    if best is None:
                        best, place = value, code
                        continue
                    larger, nan = builder.fcmp_ordered(">", value, best), builder.fcmp_unordered("uno", value, value)
                    take = builder.or_(larger, nan)
                    best = builder.select(take, value, best)
                    place = builder.select(take, code, place) if places else None
                store(builder, best, y, channel, bfloat16=bfloat16)
                if places:
                    _store_bytes(builder, place, k, channel)

            over_channels(builder, channels, body)
            return context.get_dummy_value()

        return types.void(three, three, three, three, whole, whole, whole), generate

    return window


def _store_bytes(builder, value, address, index) -> None:
    pointer = builder.gep(builder.inttoptr(address, _I8.as_pointer()), [index])
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)


def _load_bytes(builder, address, index, lanes) -> ir.Value:
    pointer = builder.gep(builder.inttoptr(address, _I8.as_pointer()), [index])
    return builder.load(builder.bitcast(pointer, ir.VectorType(_I8, lanes).as_pointer()), align=1)


def _gather(*, bfloat16: bool, down: int, across: int) -> Callable[..., Any]:
    """Makes f(dy, k, windows, places, channels, dx): one input position in down x across windows.

    windows: their numbers in the image, and places: the position's place in them, tuples of down x across.
    """
    n = down * across

    @intrinsic
    def gather(typing_context, dy, k, windows, places, channels, dx):
        several, whole = types.UniTuple(types.int64, n), types.int64

        def generate(context, builder, signature, arguments):
            dy, k, windows, places, channels, dx = arguments
            begins = [builder.mul(builder.extract_value(windows, i), channels) for i in range(n)]
            numbers = [builder.trunc(builder.extract_value(places, i), _I8) for i in range(n)]

            def body(channel, lanes) -> None:
                total = None
                for begin, number in zip(begins, numbers, strict=True):
                    index = builder.add(begin, channel)
                    value = load(builder, dy, index, lanes, bfloat16=bfloat16)
                    here = builder.icmp_unsigned(
                        "==", _load_bytes(builder, k, index, lanes), splat(builder, number, lanes)
                    )
                    value = builder.select(here, value, ir.Constant(value.type, [0.0] * lanes))
                    total = value if total is None else builder.fadd(total, value)
                store(builder, total, dx, channel, bfloat16=bfloat16)

            over_channels(builder, channels, body)
            return context.get_dummy_value()

        return types.void(whole, whole, several, several, whole, whole), generate

    return gather


_window_f32, _window_bf16 = (_window(bfloat16=b, places=False) for b in (False, True))
_window_places_f32, _window_places_bf16 = (_window(bfloat16=b, places=True) for b in (False, True))
_gather_11_f32, _gather_12_f32, _gather_21_f32, _gather_22_f32 = (
    _gather(bfloat16=False, down=i, across=j) for i in (1, 2) for j in (1, 2)
)
_gather_11_bf16, _gather_12_bf16, _gather_21_bf16, _gather_22_bf16 = (
    _gather(bfloat16=True, down=i, across=j) for i in (1, 2) for j in (1, 2)
)

# Words of both kernels: size of a value, blocks an image, sizes of the larger and the smaller image, addresses.
_BYTES, _BLOCKS, _CHANNELS, _HEIGHT, _WIDTH, _P, _Q, _LARGE, _SMALL, _PLACES = range(10)

_JIT = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}


@njit(**_JIT)
def _inside(p, size):
    """The three rows (columns) of window p that are read, and their numbers in the window: those outside are replaced."""
    first = 2 * p - 1
    a, c = max(first, 0), min(first + 2, size - 1)
    return (a, first + 1, c), (a - first, 1, c - first)


@threads.kernel(**_JIT)
def _forward(unit, words):
    """A block of rows of an image's y (and k)."""
    size, channels, width = words[_BYTES], words[_CHANNELS], words[_WIDTH]
    image, block = unit // words[_BLOCKS], unit % words[_BLOCKS]
    x = words[_LARGE] + size * image * words[_HEIGHT] * width * channels
    row_bytes, pixel_bytes = size * width * channels, size * channels
    for p in range(block * _BLOCK, min((block + 1) * _BLOCK, words[_P])):
        (h0, h1, h2), row_places = _inside(p, words[_HEIGHT])
        rows = (x + h0 * row_bytes, x + h1 * row_bytes, x + h2 * row_bytes)
        row_places = (3 * row_places[0], 3 * row_places[1], 3 * row_places[2])
        for q in range(words[_Q]):
            (w0, w1, w2), column_places = _inside(q, width)
            columns = (w0 * pixel_bytes, w1 * pixel_bytes, w2 * pixel_bytes)
            place = ((image * words[_P] + p) * words[_Q] + q) * channels
            y, k = words[_SMALL] + size * place, words[_PLACES] + place
            if size == 2:
                if words[_PLACES]:
                    _window_places_bf16(rows, row_places, columns, column_places, channels, y, k)
                else:
                    _window_bf16(rows, row_places, columns, column_places, channels, y, k)
            elif words[_PLACES]:
                _window_places_f32(rows, row_places, columns, column_places, channels, y, k)
            else:
                _window_f32(rows, row_places, columns, column_places, channels, y, k)


@njit(**_JIT)
def _around(h, windows):
    """The two windows that row (column) h lies in, and its number in them; an even one lies in the first alone."""
    a = h // 2
    if h % 2 == 0:
        return (a, a), (1, _NOWHERE)
    return (a, min(a + 1, windows - 1)), (2, 0 if a + 1 < windows else _NOWHERE)


@njit(**_JIT)
def _place(i, j):
    return _NOWHERE if i == _NOWHERE or j == _NOWHERE else 3 * i + j


@threads.kernel(**_JIT)
def _backward(unit, words):
    """A block of rows of an image's dx."""
    size, channels, width, across = words[_BYTES], words[_CHANNELS], words[_WIDTH], words[_Q]
    image, block = unit // words[_BLOCKS], unit % words[_BLOCKS]
    small = image * words[_P] * across * channels
    dy, k = words[_SMALL] + size * small, words[_PLACES] + small
    for h in range(block * _BLOCK, min((block + 1) * _BLOCK, words[_HEIGHT])):
        (p0, p1), (i0, i1) = _around(h, words[_P])
        for w in range(width):
            (q0, q1), (j0, j1) = _around(w, across)
            dx = words[_LARGE] + size * ((image * words[_HEIGHT] + h) * width + w) * channels
            n00, n01, n10, n11 = p0 * across + q0, p0 * across + q1, p1 * across + q0, p1 * across + q1
            k00, k01, k10, k11 = _place(i0, j0), _place(i0, j1), _place(i1, j0), _place(i1, j1)
            if size == 2:
                if h % 2 == 0 and w % 2 == 0:
                    _gather_11_bf16(dy, k, (n00,), (k00,), channels, dx)
                elif h % 2 == 0:
                    _gather_12_bf16(dy, k, (n00, n01), (k00, k01), channels, dx)
                elif w % 2 == 0:
                    _gather_21_bf16(dy, k, (n00, n10), (k00, k10), channels, dx)
                else:
                    _gather_22_bf16(dy, k, (n00, n01, n10, n11), (k00, k01, k10, k11), channels, dx)
            elif h % 2 == 0 and w % 2 == 0:
                _gather_11_f32(dy, k, (n00,), (k00,), channels, dx)
            elif h % 2 == 0:
                _gather_12_f32(dy, k, (n00, n01), (k00, k01), channels, dx)
            elif w % 2 == 0:
                _gather_21_f32(dy, k, (n00, n10), (k00, k10), channels, dx)
            else:
                _gather_22_f32(dy, k, (n00, n01, n10, n11), (k00, k01, k10, k11), channels, dx)


KERNELS = (_forward, _backward)
