"""LLVM intrinsics for inner loops: unchecked array access, and vectorized augmentation.

In compiled numba code a slice updates the array's reference count atomically, and `a[i]` with a
signed index tests for wrap-around. Both prevent vectorization, or cost more than the few hundred
values of a row. The functions here do neither, and check nothing: the caller guarantees that
indices are in bounds.

Kernels in other files inline these functions. numba's cache does not notice when this file changes;
`jit_cache.compile_cpu_kernels` does.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LANES = 16  # values per vector; LLVM splits them to the width of the processor
BLUR_ROWS = 4  # output rows per call of a vertical blur
CACHE_LINE = 64  # bytes

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_I16 = ir.IntType(16)
_F32 = ir.FloatType()


def aligned_zeros(shape: tuple[int, ...], *, tail: int = 0) -> NDArray[np.float32]:
    """Return float32 zeros, aligned to a cache line, followed by `tail` readable ones."""
    count = int(np.prod(shape))
    memory = np.zeros(count + tail + CACHE_LINE // 4, dtype=np.float32)
    skip = -memory.ctypes.data % CACHE_LINE // 4
    return memory[skip : skip + count].reshape(shape)


# --- helpers that emit LLVM IR ---


def data_pointer(context, builder, kind, array) -> ir.Value:
    """Return the pointer to the data of a numba array."""
    return context.make_array(kind)(context, builder, array).data


def vector_pointer(builder, base, index, kind, lanes) -> ir.Value:
    """Return &base[index] as a pointer to a vector of `lanes` values."""
    return builder.bitcast(builder.gep(base, [index]), ir.VectorType(kind, lanes).as_pointer())


def splat(builder, scalar, lanes) -> ir.Value:
    """Return a vector of `lanes` copies of a scalar."""
    kind = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return shuffle(builder, first, first, [0] * lanes)


def shuffle(builder, a, b, mask) -> ir.Value:
    """Return the lanes `mask` of the concatenation of vectors a and b."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(mask)), list(mask)))


def clip(builder, x) -> ir.Value:
    """Clip a vector of floats to [0, 1]: one maximum and one minimum instruction."""
    zero, one = (ir.Constant(x.type, [value] * x.type.count) for value in (0.0, 1.0))
    x = builder.select(builder.fcmp_ordered(">", x, zero), x, zero)
    return builder.select(builder.fcmp_ordered("<", x, one), x, one)


def specialize(builder, flags, emit: Callable[..., None]) -> None:
    """Emit code for every combination of the booleans `flags`, and branches to it.

    Args:
        emit: emit(*values) emits the code of one combination; the values are Python's.
    """
    if not flags:
        emit()
        return
    with builder.if_else(flags[0]) as branches:
        for value, branch in zip((True, False), branches, strict=True):
            with branch:
                specialize(builder, flags[1:], partial(emit, value))


class _BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


# One instruction instead of eight. Older LLVM versions call a function for it, or do not support
# it.
HAS_BFLOAT16_CONVERSION = bool(binding.get_host_cpu_features().get("avx512bf16")) and binding.llvm_version_info[0] >= 22


def round_bfloat16(builder, value, *, by_instruction=HAS_BFLOAT16_CONVERSION) -> ir.Value:
    """Round a vector of float32 to bfloat16, to nearest, ties to even; return the bits as int16.

    NaN stays NaN.

    Args:
        by_instruction: Use the processor's conversion, which flushes denormals (below 1.2e-38) to
            0.
    """
    lanes = value.type.count
    stored = ir.VectorType(_I16, lanes)
    if by_instruction:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_BFloat16(), lanes)), stored)
    bits = builder.bitcast(value, ir.VectorType(_I32, lanes))
    below_half, upper, lowest, quiet = (ir.Constant(bits.type, [n] * lanes) for n in (0x7FFF, 16, 1, 0x7FC0))
    odd = builder.and_(builder.lshr(bits, upper), lowest)
    rounded = builder.lshr(builder.add(builder.add(bits, below_half), odd), upper)
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), stored)


def _round_float16(builder, value) -> ir.Value:
    """Round a vector of float32 to float16, to nearest, ties to even. One instruction with AVX2."""
    lanes = value.type.count
    half = builder.fptrunc(value, ir.VectorType(ir.HalfType(), lanes))
    return builder.bitcast(half, ir.VectorType(_I16, lanes))


def _i64(value: int) -> ir.Value:
    return ir.Constant(_I64, value)


def _load(builder, base, index) -> ir.Value:
    return builder.load(vector_pointer(builder, base, index, _F32, LANES), align=4)


def _symmetric_sum(builder, values, weights) -> ir.Value:
    """Return weights[0] * center + sum of weights[d] * (values at distance d on both sides)."""
    radius = len(weights) - 1
    total = builder.fmul(values[radius], weights[0], flags=("contract",))
    for d in range(1, radius + 1):
        both = builder.fadd(values[radius - d], values[radius + d])
        total = builder.fadd(total, builder.fmul(both, weights[d], flags=("contract",)), flags=("contract",))
    return total


# --- unchecked array access ---


def _flat_pointer(context, builder, signature, arguments) -> ir.Value:
    index = context.cast(builder, arguments[1], signature.args[1], types.int64)
    return builder.gep(data_pointer(context, builder, signature.args[0], arguments[0]), [index])


@intrinsic
def load_flat(typing_context, array, index):
    """Return array.ravel()[index] of a C-contiguous array, without a bounds check."""

    def generate(context, builder, signature, arguments):
        return builder.load(_flat_pointer(context, builder, signature, arguments))

    return array.dtype(array, index), generate


@intrinsic
def store_flat(typing_context, array, index, value):
    """Set array.ravel()[index] = value of a C-contiguous array, without a bounds check."""

    def generate(context, builder, signature, arguments):
        value = context.cast(builder, arguments[2], signature.args[2], signature.args[0].dtype)
        builder.store(value, _flat_pointer(context, builder, signature, arguments))
        return context.get_dummy_value()

    return types.void(array, index, value), generate


# --- augmentation ---


def make_vertical_blur(radii: Sequence[int]) -> Callable[..., Any]:
    """Return an intrinsic f(radius, source, offsets, taps, out, start, stride, blocks): a vertical
    blur of one of the radii. It writes nothing for another radius.

    It computes BLUR_ROWS output rows. With y[i] the input row at source[offsets[i]], i < BLUR_ROWS
    + 2 radius, for k < BLUR_ROWS and j < LANES * blocks:

        out[start + stride k + j] = taps[0] y[radius + k][j]
            + sum over d of taps[d] (y[radius + k - d][j] + y[radius + k + d][j])

    Every input value is loaded once for all output rows that use it.
    """

    @intrinsic
    def blur(typing_context, radius, source, offsets, taps, out, start, stride, blocks):
        i64 = types.int64
        signature = types.void(i64, source, offsets, taps, out, i64, i64, i64)

        def generate(context, builder, signature, arguments):
            source, offsets, taps, out = (
                data_pointer(context, builder, signature.args[i], arguments[i]) for i in range(1, 5)
            )
            start, stride, blocks = arguments[5:]

            def emit(radius: int) -> None:
                row_starts = [builder.load(builder.gep(offsets, [_i64(i)])) for i in range(BLUR_ROWS + 2 * radius)]
                weights = _load_weights(builder, taps, radius)
                with cgutils.for_range(builder, blocks) as loop:
                    j = builder.mul(loop.index, _i64(LANES))
                    rows = [_load(builder, source, builder.add(row_start, j)) for row_start in row_starts]
                    for k in range(BLUR_ROWS):
                        total = _symmetric_sum(builder, rows[k : k + 2 * radius + 1], weights)
                        index = builder.add(builder.add(start, builder.mul(stride, _i64(k))), j)
                        builder.store(total, vector_pointer(builder, out, index, _F32, LANES)).align = 4

            _specialize_radius(builder, arguments[0], radii, emit)
            return context.get_dummy_value()

        return signature, generate

    return blur


def make_finish_row(radii: Sequence[int]) -> Callable[..., Any]:
    """Return an intrinsic that computes the last stages of one row of a view, in registers.

    Its signature is f(radius, source, red, green, blue, taps, solarize, gain, shift, out, start,
    blocks). For LANES * blocks pixels whose channels start at source[red], source[green] and
    source[blue]:

        1. the horizontal pass of the blur (none for radius 0), with neighbors from adjacent vectors
        2. solarize, if the flag is set
        3. clip to [0, 1], times gain (3,), plus shift (3,)
        4. rounding to the dtype of `out`, to nearest, ties to even
        5. stores to the flat `out` from index `start` on, interleaved as R G B R G B ...

    `out` is float32, or uint16 for the bits of bfloat16 and int16 for those of float16. Nothing is
    written for a radius that is not one of `radii`.

    Args:
        radii: Those to emit code for, each at most LANES. With a blur, `source` must be readable
            from LANES before each row to LANES after its last block.
    """

    @intrinsic
    def finish(typing_context, radius, source, red, green, blue, taps, solarize, gain, shift, out, start, blocks):
        i64 = types.int64
        signature = types.void(i64, source, i64, i64, i64, taps, types.boolean, gain, shift, out, i64, i64)
        convert = {types.uint16: round_bfloat16, types.int16: _round_float16}.get(out.dtype, lambda builder, x: x)
        stored, alignment = (_F32, 4) if out.dtype == types.float32 else (_I16, 2)

        def generate(context, builder, signature, arguments):
            source, taps, gain, shift, out = (
                data_pointer(context, builder, signature.args[i], arguments[i]) for i in (1, 5, 7, 8, 9)
            )
            channel_starts, start, blocks = arguments[2:5], arguments[10], arguments[11]

            def emit(radius: int) -> None:
                invert = splat(builder, context.cast(builder, arguments[6], types.boolean, types.boolean), LANES)
                weights = _load_weights(builder, taps, radius)
                gains, shifts = (
                    [splat(builder, builder.load(builder.gep(a, [_i64(c)])), LANES) for c in range(3)]
                    for a in (gain, shift)
                )
                half, one = (ir.Constant(ir.VectorType(_F32, LANES), [value] * LANES) for value in (0.5, 1.0))
                with cgutils.for_range(builder, blocks) as loop:
                    j = builder.mul(loop.index, _i64(LANES))
                    channels = []
                    for channel_start, g, s in zip(channel_starts, gains, shifts, strict=True):
                        x = _horizontal_blur(builder, source, builder.add(channel_start, j), weights)
                        bright = builder.and_(builder.fcmp_ordered(">=", x, half), invert)
                        x = clip(builder, builder.select(bright, builder.fsub(one, x), x))
                        x = builder.fadd(builder.fmul(x, g, flags=("contract",)), s, flags=("contract",))
                        channels.append(convert(builder, x))
                    for k in range(3):
                        index = builder.add(start, builder.add(builder.mul(j, _i64(3)), _i64(LANES * k)))
                        pointer = vector_pointer(builder, out, index, stored, LANES)
                        builder.store(_interleave(builder, channels, k), pointer).align = alignment

            _specialize_radius(builder, arguments[0], radii, emit)
            return context.get_dummy_value()

        return signature, generate

    return finish


def _specialize_radius(builder, radius, radii: Sequence[int], emit: Callable[[int], None]) -> None:
    """Emit emit(r) for every radius r, and branches to the one that `radius` equals."""
    for r in radii:
        with builder.if_then(builder.icmp_signed("==", radius, _i64(r))):
            emit(r)


def _load_weights(builder, taps, radius: int) -> list[ir.Value]:
    """Load the one-sided taps of a blur, as vectors of copies."""
    return [splat(builder, builder.load(builder.gep(taps, [_i64(d)])), LANES) for d in range(radius + 1)]


def _horizontal_blur(builder, source, index, weights) -> ir.Value:
    """Return the horizontal pass for the vector at source[index]."""
    radius = len(weights) - 1
    center = _load(builder, source, index)
    if radius == 0:
        return center
    before, after = (_load(builder, source, builder.add(index, _i64(d))) for d in (-LANES, LANES))
    left = [shuffle(builder, before, center, range(LANES - d, 2 * LANES - d)) for d in range(radius, 0, -1)]
    right = [shuffle(builder, center, after, range(d, LANES + d)) for d in range(1, radius + 1)]
    return _symmetric_sum(builder, [*left, center, *right], weights)


def _interleave(builder, channels, k) -> ir.Value:
    """Return vector k of the three that hold the vectors R, G, B as R G B R G B ..."""
    sources = [divmod(LANES * k + lane, 3) for lane in range(LANES)]  # (pixel, channel) of each lane
    red_green = [0 if channel == 2 else pixel + LANES * channel for pixel, channel in sources]
    with_blue = [LANES + pixel if channel == 2 else lane for lane, (pixel, channel) in enumerate(sources)]
    return shuffle(builder, shuffle(builder, channels[0], channels[1], red_green), channels[2], with_blue)
