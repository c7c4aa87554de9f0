"""Crop, bicubic resize and horizontal flip of one view on the CPU.

Formula and reference: kernels/crop.py. A source row is resized in x once, in 16-bit fixed point,
and kept while output rows need it (four rows at most); an output row is a weighted sum of four
resized rows.

Shapes: H, W = source image; S = side of the output.
"""

import math
from collections.abc import Sequence

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastbyol.kernels.cpu.intrinsics import (
    aligned_zeros,
    clip,
    data_pointer,
    load_flat,
    shuffle,
    splat,
    store_flat,
    vector_pointer,
)

_CHANNELS = 4  # a resized pixel is a vector of four floats: R, G, B and an unused lane
_PADDING = 2  # pixels that taps reach outside the crop; their weights are 0
_ONE = 1 << 14  # fixed-point weight 1 in x; sums of two products with 8-bit pixels fit in 32 bits
_PIXELS = 16  # pixels per step of `_blend_rows`
_HAS_AVX2 = bool(binding.get_host_cpu_features().get("avx2"))
_JIT = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}


@njit(cache=True, error_model="numpy")
def random_resized_crop(area, aspect, u, sizes, clamp, low, high, out):
    """Compute the crop boxes of n images with V views each from random numbers.

    Compiled because a loader calls it for every image, once the image's size is known. It takes two
    microseconds and keeps the GIL, since releasing and reacquiring it would take longer.

    Args:
        area, aspect: (n, V, tries) float64, candidate fractions of the image's area and aspect
            ratios.
        u: (n, V, 2) float64 in [0, 1), relative positions in y and x.
        sizes: (n, 2), heights and widths of the images.
        clamp: Reduce a side that does not fit to the image's. Otherwise, like torchvision's
            RandomResizedCrop, take the first candidate that fits, or if none does, the largest
            centered box with an aspect ratio in [low, high].
        low, high: Limits of the aspect ratio for that fallback.
        out: (n, V, 4) int32; receives top, left, height, width. Sides are integers of at least 1.
    """
    for i in range(len(sizes)):
        full_h, full_w = float(sizes[i, 0]), float(sizes[i, 1])
        for v in range(out.shape[1]):
            h, w, fits = 0.0, 0.0, False
            for t in range(area.shape[2]):
                pixels = area[i, v, t] * full_h * full_w
                h = max(1.0, np.rint(math.sqrt(pixels / aspect[i, v, t])))
                w = max(1.0, np.rint(math.sqrt(pixels * aspect[i, v, t])))
                fits = h <= full_h and w <= full_w
                if fits:
                    break
            top, left = -1.0, -1.0
            if not fits and clamp:
                h, w = min(h, full_h), min(w, full_w)
            elif not fits:
                h, w = full_h, full_w
                if full_w / full_h < low:
                    h = min(full_h, max(1.0, np.rint(full_w / low)))
                elif full_w / full_h > high:
                    w = min(full_w, max(1.0, np.rint(full_h * high)))
                top, left = (full_h - h) // 2, (full_w - w) // 2
            out[i, v, 0] = top if top >= 0 else math.floor(u[i, v, 0] * (full_h - h + 1))
            out[i, v, 1] = left if left >= 0 else math.floor(u[i, v, 1] * (full_w - w + 1))
            out[i, v, 2] = h
            out[i, v, 3] = w


class CropScratch:
    """Working memory of one thread for `crop_into` at one output size."""

    def __init__(self, size: int) -> None:
        pairs = -(-size // 2)
        # The first tap and the weights of every output pixel, in y and x.
        self.first = np.zeros((2, size), dtype=np.int64)
        self.weight = np.zeros((2, size, 4), dtype=np.float32)
        # The same in x for `_resize_pair`: byte offsets in `row`, and fixed-point weights.
        self.start = np.zeros(2 * pairs, dtype=np.int64)
        self.fixed = np.zeros((pairs, 2, 2, 8), dtype=np.int16)
        self.row = np.zeros(0, dtype=np.uint8)
        blocks = -(-size // _PIXELS)
        # The last four source rows, resized in x; their offsets and factors in the sum in y.
        self.resized = aligned_zeros((4, blocks * _PIXELS * _CHANNELS))
        self.offsets, self.factors = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.float32)
        # The block that a row's last pixels fill only in part.
        self.edge = aligned_zeros((3 * _PIXELS,))

    def row_for(self, width: int) -> NDArray[np.uint8]:
        """Return memory for a padded source row of `width` pixels, readable by 16-byte loads."""
        length = 3 * (width + 2 * _PADDING) + 16
        if len(self.row) < length:
            self.row = np.zeros(length, dtype=np.uint8)
        return self.row


def crop_into(
    image: NDArray[np.uint8],
    box: Sequence[int],
    flip: bool,
    out: NDArray[np.float32],
    scratch: CropScratch,
) -> None:
    """Write the view of `crop_reference` to `out`, without the GIL.

    The x weights have 14 fractional bits and add up to exactly 1: the result is within 2e-4 of the
    reference.

    Args:
        image: uint8 (H, W, 3), C-contiguous.
        box: Top, left, height, width in pixels.
        flip: Mirror left-right.
        out: (3, S, S) float32, C-contiguous; values in [0, 1].
        scratch: Of this thread and this output size.

    Raises:
        ValueError: The box is empty or reaches outside the image. The kernel itself checks no
            index.
    """
    top, left, height, width = box
    if not (0 <= top and 0 <= left and 0 < height <= image.shape[0] - top and 0 < width <= image.shape[1] - left):
        raise ValueError(f"crop box {box} is not inside an image of {image.shape[:2]}")
    s = scratch
    arrays = s.first, s.weight, s.start, s.fixed, s.row_for(width), s.resized, s.offsets, s.factors, s.edge
    crop_kernel(image, top, left, height, width, flip, *arrays, out)


# --- LLVM intrinsics ---


def _multiply_add_pairs(builder, a, b):
    """Return a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: two vectors of 16 int16 -> 8 int32."""
    i32 = ir.IntType(32)
    wide = ir.VectorType(i32, 8)
    if _HAS_AVX2:  # one instruction, which LLVM does not match in the general form below
        pmaddwd = builder.module.declare_intrinsic(
            "llvm.x86.avx2.pmadd.wd", (), ir.FunctionType(wide, [a.type, b.type])
        )
        return builder.call(pmaddwd, [a, b])
    products = []
    for parity in range(2):
        lanes = ir.Constant(ir.VectorType(i32, 8), [ir.Constant(i32, k) for k in range(parity, 16, 2)])
        even_or_odd = [builder.sext(builder.shuffle_vector(v, v, lanes), wide) for v in (a, b)]
        products.append(builder.mul(*even_or_odd))
    return builder.add(*products)


@intrinsic
def _resize_pair(typing_context, row, start0, start1, weights, pair, out, index):
    """Resize two output pixels: out[8 index : 8 index + 8] = sum of weight * (R, G, B, 0).

    An output pixel's taps are 12 adjacent bytes, R G B R G B R G B R G B. They are shuffled into
    pairs of 16-bit integers (R0 R1, G0 G1, B0 B1 and R2 R3, G2 G3, B2 B3), multiplied by pairs of
    weights and added within each pair: one multiply-add instruction on x86 (pmaddwd). LLVM's loop
    vectorizer turns this gather into scalar code, so it is written by hand.

    Args:
        row: uint8 (L,), a source row.
        start0, start1: Byte offsets of the two pixels' taps; 16 bytes must be readable from there.
        weights: int16 (pairs, 2, 2, 8): [pair of taps][pixel][w w' w w' w w' 0 0].
        pair, index: Positions in weights and out, in pairs of pixels.
        out: float32, flat.
    """
    signature = types.void(row, start0, start1, weights, pair, out, index)
    i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

    def generate(context, builder, signature, arguments):
        row, start0, start1, weights, pair, out, index = arguments
        row, weights, out = (
            context.make_array(signature.args[i])(context, builder, value).data
            for i, value in ((0, row), (3, weights), (5, out))
        )

        def pointer(base, offset, kind, count):
            return builder.bitcast(builder.gep(base, [offset]), ir.VectorType(kind, count).as_pointer())

        def constant(kind, values):
            return ir.Constant(ir.VectorType(kind, len(values)), [ir.Constant(kind, value) for value in values])

        def pick(vector, other, mask):
            return builder.shuffle_vector(vector, other, constant(i32, mask))

        taps = [builder.load(pointer(row, start, i8, 16), align=1) for start in (start0, start1)]
        taps = pick(taps[0], taps[1], list(range(32)))
        zeros = constant(i8, [0] * 32)
        total = None
        for half in range(2):
            mask = []
            for pixel in range(2):
                first = 16 * pixel + 6 * half
                for channel in range(3):
                    mask += [first + channel, 32, first + 3 + channel, 32]  # 32 is a zero byte: the upper half
                mask += [32] * 4
            pairs = builder.bitcast(pick(taps, zeros, mask), ir.VectorType(i16, 16))
            offset = builder.add(builder.mul(pair, ir.Constant(i64, 32)), ir.Constant(i64, 16 * half))
            factors = builder.load(pointer(weights, offset, i16, 16), align=2)
            both = _multiply_add_pairs(builder, pairs, factors)
            total = both if total is None else builder.add(total, both)
        floats = builder.sitofp(total, ir.VectorType(ir.FloatType(), 8))
        store = builder.store(floats, pointer(out, builder.mul(index, ir.Constant(i64, 8)), ir.FloatType(), 8))
        store.align = 4
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _blend_rows(typing_context, resized, offsets, factors, out, red, green, blue, start, blocks):
    """Write _PIXELS * blocks pixels of an output row, a weighted sum of four resized rows.

    For pixel start + j and channel c, clipped to [0, 1] and written to out[red + j], out[green +
    j], out[blue + j]:

        sum over k of factors[k] * resized[offsets[k] + _CHANNELS * (start + j) + c]

    The sums are deinterleaved into planes in registers.
    """
    i64 = types.int64
    signature = types.void(resized, offsets, factors, out, i64, i64, i64, i64, i64)

    def generate(context, builder, signature, arguments):
        resized, offsets, factors, out = (
            data_pointer(context, builder, signature.args[i], arguments[i]) for i in range(4)
        )
        channel_starts, start, blocks = arguments[4:7], arguments[7], arguments[8]
        f32 = ir.FloatType()
        quarter = _PIXELS // _CHANNELS  # pixels per vector

        def constant(value):
            return ir.Constant(ir.IntType(64), value)

        row_starts = [builder.load(builder.gep(offsets, [constant(k)])) for k in range(4)]
        weights = [splat(builder, builder.load(builder.gep(factors, [constant(k)])), _PIXELS) for k in range(4)]
        with cgutils.for_range(builder, blocks) as loop:
            j = builder.mul(loop.index, constant(_PIXELS))
            first = builder.mul(builder.add(start, j), constant(_CHANNELS))
            sums = []
            for v in range(_CHANNELS):
                total = None
                for row_start, weight in zip(row_starts, weights, strict=True):
                    index = builder.add(builder.add(row_start, first), constant(_PIXELS * v))
                    values = builder.load(vector_pointer(builder, resized, index, f32, _PIXELS), align=64)
                    product = builder.fmul(values, weight, flags=("contract",))
                    total = product if total is None else builder.fadd(total, product, flags=("contract",))
                sums.append(clip(builder, total))
            for c, base in enumerate(channel_starts):
                picks = [_CHANNELS * k + c for k in range(2 * quarter)]  # channel c of two vectors
                halves = [shuffle(builder, sums[v], sums[v + 1], picks) for v in (0, 2)]
                channel = shuffle(builder, *halves, range(_PIXELS))
                stored = builder.store(channel, vector_pointer(builder, out, builder.add(base, j), f32, _PIXELS))
                stored.align = 4
        return context.get_dummy_value()

    return signature, generate


# --- compiled functions ---


@njit(**_JIT)
def _taps(length, size, first, weight):
    """Fill first (S,) and weight (S, 4), which is 0 for taps outside 0 .. length - 1."""
    for i in range(size):
        x = (i + 0.5) * length / size - 0.5
        f = math.floor(x)
        t = x - f
        w = (
            ((-0.5 * (1 + t) + 2.5) * (1 + t) - 4) * (1 + t) + 2,
            (1.5 * t - 2.5) * t * t + 1,
            (1.5 * (1 - t) - 2.5) * (1 - t) * (1 - t) + 1,
            ((-0.5 * (2 - t) + 2.5) * (2 - t) - 4) * (2 - t) + 2,
        )
        total = 0.0
        for k in range(4):
            if 0 <= f - 1 + k < length:
                total += w[k]
        first[i] = f - 1
        for k in range(4):
            weight[i, k] = w[k] / total if 0 <= f - 1 + k < length else 0.0


@njit(**_JIT)
def _quantize_weights(first, weight, flip, start, fixed):
    """Convert the x taps to the fixed point of `_resize_pair`; repeats an odd last pixel."""
    size = len(first)
    for j in range(len(start)):
        target = min(j, size - 1)
        source = size - 1 - target if flip else target
        start[j] = 3 * (first[source] + _PADDING)
        largest, rest = 0, _ONE
        for k in range(4):
            w = np.int64(np.rint(weight[source, k] * _ONE))
            rest -= w
            if weight[source, k] > weight[source, largest]:
                largest = k
            for c in range(3):
                fixed[j // 2, k // 2, j % 2, 2 * c + k % 2] = w
        for c in range(3):  # the largest weight absorbs the rounding errors, so that a flat image stays flat
            fixed[j // 2, largest // 2, j % 2, 2 * c + largest % 2] += rest


@njit(**_JIT)
def crop_kernel(
    image, top, left, height, width, flip, first, weight, start, fixed, row, resized, offsets, factors, edge, out
):
    """Write one view; see `CropScratch` for the working memory."""
    size = out.shape[1]
    _taps(height, size, first[0], weight[0])
    _taps(width, size, first[1], weight[1])
    _quantize_weights(first[1], weight[1], flip, start, fixed)
    scale = np.float32(1 / (255 * _ONE))
    pitch, stride = 3 * image.shape[1], resized.shape[1]
    last_resized = -1
    for i in range(size):
        y0 = first[0, i]
        for y in range(max(y0, last_resized + 1, 0), min(y0 + 4, height)):
            pixels = (top + y) * pitch + 3 * left
            target = y % 4 * stride // (2 * _CHANNELS)
            for x in range(3 * width):
                store_flat(row, 3 * _PADDING + x, load_flat(image, pixels + x))
            for pair in range(len(start) // 2):
                _resize_pair(
                    row, load_flat(start, 2 * pair), load_flat(start, 2 * pair + 1), fixed, pair, resized, target + pair
                )
            last_resized = y
        for k in range(4):
            offsets[k] = (y0 + k) % 4 * stride
            factors[k] = scale * weight[0, i, k]
        red = i * size
        green, blue = red + size * size, red + 2 * size * size
        blocks = size // _PIXELS
        _blend_rows(resized, offsets, factors, out, red, green, blue, 0, blocks)
        done = _PIXELS * blocks
        if done < size:
            _blend_rows(resized, offsets, factors, edge, 0, _PIXELS, 2 * _PIXELS, done, 1)
            for c in range(3):
                for j in range(size - done):
                    store_flat(out, red + c * size * size + done + j, load_flat(edge, c * _PIXELS + j))
