"""Array access for inner loops: no wrap-around of negative indices, no slices; and the blur in vector registers.

A slice in compiled code counts references to its array, atomically, and `a[i]` with a signed index tests whether it counts
from the end; both keep LLVM from vector code or cost more than the few hundred values of a row. These do neither:
indices are taken as they are, so the caller proves that they are inside.

numba's cache does not notice a change of this file in the kernels that use it; `dispatch.compile_cpu_kernels` does.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16  # of the vectors here: LLVM cuts them to what the processor has
ROWS = 4  # of one round of `blur_columns`
CACHE_LINE = 64  # bytes

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_I16 = ir.IntType(16)
_F32 = ir.FloatType()


def aligned_zeros(shape: tuple[int, ...], *, beyond: int = 0) -> NDArray[np.float32]:
    """float32 zeros that begin a cache line, with room for `beyond` more behind them, for vectors that reach over the end."""
    count = int(np.prod(shape))
    memory = np.zeros(count + beyond + CACHE_LINE // 4, dtype=np.float32)
    skip = -memory.ctypes.data % CACHE_LINE // 4
    return memory[skip : skip + count].reshape(shape)


def data_pointer(context, builder, kind, array) -> ir.Value:
    """Where the values of a numba array begin."""
    return context.make_array(kind)(context, builder, array).data


def vector_pointer(builder, base, index, kind, lanes) -> ir.Value:
    """&base[index] as the place of a vector of `lanes` values."""
    return builder.bitcast(builder.gep(base, [index]), ir.VectorType(kind, lanes).as_pointer())


def splat(builder, scalar, lanes) -> ir.Value:
    """A vector of `lanes` copies of a scalar."""
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return shuffle(builder, first, first, [0] * lanes)


def shuffle(builder, a, b, mask) -> ir.Value:
    """The lanes `mask` of the vectors a and b put end to end."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(mask)), list(mask)))


def _place(context, builder, signature, arguments) -> ir.Value:
    index = context.cast(builder, arguments[1], signature.args[1], types.int64)
    return builder.gep(data_pointer(context, builder, signature.args[0], arguments[0]), [index])


@intrinsic
def at(typing_context, array, index):
    """array.ravel()[index] of a C-contiguous array."""

    def generate(context, builder, signature, arguments):
        return builder.load(_place(context, builder, signature, arguments))

    return array.dtype(array, index), generate


@intrinsic
def put(typing_context, array, index, value):
    """array.ravel()[index] = value of a C-contiguous array."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[2], signature.args[2], signature.args[0].dtype)
        builder.store(value, _place(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, index, value), generate


def blur_columns(radius: int) -> Callable[..., Any]:
    """Makes f(source, offsets, taps, out, start, stride, blocks): ROWS rows of the vertical pass of a blur.

    With y[i] the row at source[offsets[i]], i < ROWS + 2 radius, for k < ROWS and j < LANES * blocks:

        out[start + stride k + j] = taps[0] y[radius + k][j] + sum over d of taps[d] (y[radius + k - d][j] + y[radius + k + d][j])

    Every value is loaded once for all the rows that it counts for.
    """

    @intrinsic
    def blur(typing_context, source, offsets, taps, out, start, stride, blocks):
        whole = types.int64
        signature = types.void(source, offsets, taps, out, whole, whole, whole)

        def generate(context, builder, signature, arguments):
            source, offsets, taps, out = (
                data_pointer(context, builder, signature.args[i], arguments[i]) for i in range(4)
            )
            start, stride, blocks = arguments[4:]
            begins = [builder.load(builder.gep(offsets, [_whole(i)])) for i in range(ROWS + 2 * radius)]
            weights = [splat(builder, builder.load(builder.gep(taps, [_whole(d)])), LANES) for d in range(radius + 1)]
            with cgutils.for_range(builder, blocks) as loop:
                j = builder.mul(loop.index, _whole(LANES))
                rows = [_load(builder, source, builder.add(begin, j)) for begin in begins]
                for k in range(ROWS):
                    total = _symmetric_sum(builder, rows[k : k + 2 * radius + 1], weights)
                    place = builder.add(builder.add(start, builder.mul(stride, _whole(k))), j)
                    stored = builder.store(total, vector_pointer(builder, out, place, _F32, LANES))
                    stored.align = 4
            return context.get_dummy_value()

        return signature, generate

    return blur


def finish_row(radius: int, kind: str) -> Callable[..., Any]:
    """Makes f(source, red, green, blue, taps, solarize, gain, shift, out, place, blocks): the last step of a row of a view.

    For LANES * blocks pixels: the horizontal pass of the blur over the rows that begin at source[red], [green] and [blue]
    (none with radius 0), solarize if told to, clip to [0, 1], times gain (3,), plus shift (3,); then written to the flat `out` from
    `place` on as R G B R G B ...: as float32, or as the bits of bfloat16 or float16 (`kind`), rounded to nearest, ties to even, into 16-bit
    integers. All of it happens in registers; the neighbors of a vector's values are shifted in from the vectors beside it.

    radius <= LANES; with a blur, `source` is readable from LANES before the rows to LANES after their last block.
    """
    rounded = {"float32": lambda builder, x: x, "bfloat16": round_bfloat16, "float16": _round_float16}[kind]
    stored, width = (_F32, 4) if kind == "float32" else (_I16, 2)

    @intrinsic
    def finish(typing_context, source, red, green, blue, taps, solarize, gain, shift, out, place, blocks):
        whole = types.int64
        signature = types.void(source, whole, whole, whole, taps, types.boolean, gain, shift, out, whole, whole)

        def generate(context, builder, signature, arguments):
            source, taps, gain, shift, out = (
                data_pointer(context, builder, signature.args[i], arguments[i]) for i in (0, 4, 6, 7, 8)
            )
            begins, place, blocks = arguments[1:4], arguments[9], arguments[10]
            invert = splat(builder, context.cast(builder, arguments[5], types.boolean, types.boolean), LANES)
            weights = [splat(builder, builder.load(builder.gep(taps, [_whole(d)])), LANES) for d in range(radius + 1)]
            gains, shifts = (
                [splat(builder, builder.load(builder.gep(a, [_whole(c)])), LANES) for c in range(3)]
                for a in (gain, shift)
            )
            half, one = (ir.Constant(ir.VectorType(_F32, LANES), [value] * LANES) for value in (0.5, 1.0))
            with cgutils.for_range(builder, blocks) as loop:
                j = builder.mul(loop.index, _whole(LANES))
                channels = []
                for begin, factor, summand in zip(begins, gains, shifts, strict=True):
                    x = _blurred(builder, source, builder.add(begin, j), weights)
                    bright = builder.and_(builder.fcmp_ordered(">=", x, half), invert)
                    x = clip(builder, builder.select(bright, builder.fsub(one, x), x))
                    x = builder.fadd(builder.fmul(x, factor, flags=("contract",)), summand, flags=("contract",))
                    channels.append(rounded(builder, x))
                for k in range(3):
                    start = builder.add(place, builder.add(builder.mul(j, _whole(3)), _whole(LANES * k)))
                    pointer = vector_pointer(builder, out, start, stored, LANES)
                    builder.store(_interleaved(builder, channels, k), pointer).align = width
            return context.get_dummy_value()

        return signature, generate

    return finish


def _blurred(builder, source, place, weights) -> ir.Value:
    """The horizontal pass for the vector at source[place]."""
    radius = len(weights) - 1
    center = _load(builder, source, place)
    if radius == 0:
        return center
    before, after = (_load(builder, source, builder.add(place, _whole(d))) for d in (-LANES, LANES))
    left = [shuffle(builder, before, center, range(LANES - d, 2 * LANES - d)) for d in range(radius, 0, -1)]
    right = [shuffle(builder, center, after, range(d, LANES + d)) for d in range(1, radius + 1)]
    return _symmetric_sum(builder, [*left, center, *right], weights)


def _interleaved(builder, channels, k) -> ir.Value:
    """Vector k of the three that hold R G B R G B ... of three vectors R, G, B."""
    sources = [divmod(LANES * k + lane, 3) for lane in range(LANES)]  # (pixel, channel) of a lane
    red_green = [0 if channel == 2 else pixel + LANES * channel for pixel, channel in sources]
    with_blue = [LANES + pixel if channel == 2 else lane for lane, (pixel, channel) in enumerate(sources)]
    return shuffle(builder, shuffle(builder, channels[0], channels[1], red_green), channels[2], with_blue)


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"


# One instruction instead of eight. Older LLVMs call a function for it, or do not know it.
CONVERTS = bool(binding.get_host_cpu_features().get("avx512bf16")) and binding.llvm_version_info[0] >= 22


def round_bfloat16(builder, value, *, converts=CONVERTS) -> ir.Value:
    """The bits of a vector of float32 as bfloat16, rounded to nearest, ties to even; NaN stays NaN.

    converts: by the processor's instruction, which takes numbers below 1.2e-38 for 0.
    """
    lanes = value.type.count
    stored = ir.VectorType(_I16, lanes)
    if converts:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_BFloat16(), lanes)), stored)
    bits = builder.bitcast(value, ir.VectorType(_I32, lanes))
    below_half, upper, lowest, quiet = (ir.Constant(bits.type, [n] * lanes) for n in (0x7FFF, 16, 1, 0x7FC0))
    odd = builder.and_(builder.lshr(bits, upper), lowest)
    rounded = builder.lshr(builder.add(builder.add(bits, below_half), odd), upper)
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), stored)


def _round_float16(builder, value) -> ir.Value:
    """The bits of a vector of float32 as float16, rounded to nearest, ties to even; one instruction on every processor with AVX2."""
    lanes = value.type.count
    half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
    return builder.bitcast(half, ir.VectorType(_I16, lanes))


def clip(builder, x) -> ir.Value:
    """A vector of floats clipped to [0, 1]: one maximum and one minimum instruction."""
    zero, one = (ir.Constant(x.type, [value] * x.type.count) for value in (0.0, 1.0))
    x = builder.select(builder.fcmp_ordered(">", x, zero), x, zero)
    return builder.select(builder.fcmp_ordered("<", x, one), x, one)


def _whole(value: int) -> ir.Value:
    return ir.Constant(_I64, value)


def _load(builder, base, index) -> ir.Value:
    return builder.load(vector_pointer(builder, base, index, _F32, LANES), align=4)


def _symmetric_sum(builder, values, weights) -> ir.Value:
    """weights[0] times the middle one of the vectors, plus weights[d] times the sum of the two at distance d from it."""
    radius = len(weights) - 1
    total = builder.fmul(values[radius], weights[0], flags=("contract",))
    for d in range(1, radius + 1):
        both = builder.fadd(values[radius - d], values[radius + d])
        total = builder.fadd(total, builder.fmul(both, weights[d], flags=("contract",)), flags=("contract",))
    return total
