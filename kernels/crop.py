"""Crop + bicubic resize + horizontal flip of one decoded image.

Formula: output pixel i of S samples the crop (length L) at x = (i + 0.5) L / S - 0.5. With f = floor(x) and
t = x - f, the taps f-1 .. f+2 have the weights k(1+t), k(t), k(1-t), k(2-t) of Keys' cubic with a = -0.5,

    k(x) = 1.5 x^3 - 2.5 x^2 + 1                x < 1
    k(x) = -0.5 x^3 + 2.5 x^2 - 4 x + 2    1 <= x < 2.

Taps outside the crop are dropped and the rest divided by their sum; no antialiasing; the result is clipped to
[0, 1]. This is tf.image.resize(method="bicubic") on a decoded crop, as the authors' code uses it.

Shapes: H, W = source image; S = output side.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.kernels.cpu.intrinsics import aligned_zeros, at, clip, data_pointer, put, shuffle, splat, vector_pointer

_JIT = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "nsz", "arcp"}}


def crop_reference(image: Tensor, box: tuple[int, int, int, int], *, flip: bool, size: int) -> Tensor:
    """One view of one image, in float32.

    Args:
        image: uint8 (H, W, 3).
        box: top, left, height, width in pixels, inside the image.
        flip: mirror left-right.
        size: S.

    Returns:
        (3, S, S) float32 in [0, 1].
    """
    top, left, height, width = box
    patch = image[top : top + height, left : left + width].float() / 255
    index_y, weight_y = _taps_reference(height, size)
    index_x, weight_x = _taps_reference(width, size)
    rows = (patch[index_y] * weight_y[:, :, None, None]).sum(1)  # (S, 4, width, 3) -> (S, width, 3)
    view = (rows[:, index_x] * weight_x[:, :, None]).sum(2)  # (S, S, 4, 3) -> (S, S, 3)
    if flip:
        view = view.flip(1)
    return view.permute(2, 0, 1).clamp(0, 1).contiguous()


def _taps_reference(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Indices (S, 4) and weights (S, 4) of the formula above."""
    x = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5
    index = x.floor()[:, None] + torch.arange(-1, 3)
    distance = (x[:, None] - index).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, far) * ((index >= 0) & (index < length))
    return index.clamp(0, length - 1).long(), (weight / weight.sum(1, keepdim=True)).float()


@njit(cache=True, error_model="numpy")
def random_resized_crop(area, aspect, u, sizes, clamp, low, high, out):
    """Boxes out (n, V, 4) from shares of the area and aspects (n, V, tries), uniforms u (n, V, 2) and sizes (n, 2).

    A box has whole sides of at least 1. With `clamp` a side that does not fit is cut to the image's. Without, the first try
    that fits is taken, and if none does, the largest centered box of an aspect in [low, high]: torchvision's
    RandomResizedCrop. Compiled, since a loader calls it for every image, when it has learned the image's size; it takes two
    microseconds and keeps the interpreter lock, which would take longer to give up and get back.
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
    """A thread's working memory for `crop_into` at one output size."""

    def __init__(self, size: int) -> None:
        pairs = -(-size // 2)
        self.first = np.zeros((2, size), dtype=np.int64)  # y, x: the first of an output pixel's four taps
        self.weight = np.zeros((2, size, 4), dtype=np.float32)
        self.start = np.zeros(2 * pairs, dtype=np.int64)  # where in `row` an output pixel's x taps begin, in bytes
        self.fixed = np.zeros((pairs, 2, 2, 8), dtype=np.int16)  # x weights as `_resize_pair` reads them
        self.row = np.zeros(0, dtype=np.uint8)
        blocks = -(-size // _PIXELS)
        self.resized = aligned_zeros((4, blocks * _PIXELS * _LANES))  # the last four source rows, resized in x
        self.offsets, self.factors = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.float32)  # of the blend in y
        self.edge = aligned_zeros((3 * _PIXELS,))  # what is left of an output row after its last whole block

    def row_for(self, width: int) -> NDArray[np.uint8]:
        """One source row of `width` RGB pixels, its padding, and what a 16-byte load may read beyond; only grows."""
        length = 3 * (width + 2 * _PAD) + 16
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
    """`crop_reference` on the CPU, without the GIL: writes the view to out (3, S, S), float32 in [0, 1].

    The x weights have 14 binary digits and add up to exactly 1: the result is within 2e-4 of the reference.

    Args:
        image: uint8 (H, W, 3), C-contiguous.
        box: top, left, height, width in pixels.
        flip: mirror left-right.
        out: C-contiguous.
        scratch: of this thread and this output size.

    Raises:
        ValueError: the box is empty or reaches outside the image (the kernel itself checks no index).
    """
    top, left, height, width = box
    if not (0 <= top and 0 <= left and 0 < height <= image.shape[0] - top and 0 < width <= image.shape[1] - left):
        raise ValueError(f"crop box {box} is not inside an image of {image.shape[:2]}")
    s = scratch
    arrays = s.first, s.weight, s.start, s.fixed, s.row_for(width), s.resized, s.offsets, s.factors, s.edge
    _crop(image, top, left, height, width, flip, *arrays, out)


# A resized pixel is a vector of four floats: R, G, B and a lane that holds nothing of use.
_LANES = 4
_PAD = 2  # pixels that the first and the last output pixel's taps reach outside the crop; their weights are 0
_ONE = 1 << 14  # the x weight 1: 16-bit products of a pixel and a weight, and sums of two, fit 32 bits


_HAS_AVX2 = bool(binding.get_host_cpu_features().get("avx2"))


def _multiply_add_pairs(builder, a, b):
    """a[2i] * b[2i] + a[2i + 1] * b[2i + 1]: two vectors of 16 int16 -> 8 int32."""
    i32 = ir.IntType(32)
    wide = ir.VectorType(i32, 8)
    if _HAS_AVX2:  # one instruction, which LLVM does not see in the general form below
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
def _resize_pair(typing_context, row, start0, start1, weights, pair, out, place):
    """Two output pixels: out[8 place : 8 place + 8] = sum over the four taps of weight times R, G, B (and a lane of 0).

    An output pixel's taps are 12 neighboring bytes, R G B R G B R G B R G B. They are shuffled into pairs of 16-bit numbers
    (R0 R1, G0 G1, B0 B1 and R2 R3, G2 G3, B2 B3), whose products with the weights' pairs are added within a pair: one
    multiply-add instruction on x86 (pmaddwd), and LLVM finds the like elsewhere. numba's loop vectorizer makes scalar
    code of this gather, so it is written down.

    Args (all typed by numba): row uint8 (L,); start0, start1: first byte of each pixel's taps, 16 readable bytes from
    there; weights int16 (pairs, 2, 2, 8): [pair of taps][pixel][w w' w w' w w' 0 0]; out float32.
    """
    signature = types.void(row, start0, start1, weights, pair, out, place)
    i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))

    def generate(context, builder, signature, arguments):
        row, start0, start1, weights, pair, out, place = arguments
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
                    mask += [first + channel, 32, first + 3 + channel, 32]  # 32 is a zero: the high byte
                mask += [32] * 4
            pairs = builder.bitcast(pick(taps, zeros, mask), ir.VectorType(i16, 16))
            offset = builder.add(builder.mul(pair, ir.Constant(i64, 32)), ir.Constant(i64, 16 * half))
            factors = builder.load(pointer(weights, offset, i16, 16), align=2)
            both = _multiply_add_pairs(builder, pairs, factors)
            total = both if total is None else builder.add(total, both)
        floats = builder.sitofp(total, ir.VectorType(ir.FloatType(), 8))
        store = builder.store(floats, pointer(out, builder.mul(place, ir.Constant(i64, 8)), ir.FloatType(), 8))
        store.align = 4
        return context.get_dummy_value()

    return signature, generate


_PIXELS = 16  # of one round of `_blend`


@intrinsic
def _blend(typing_context, resized, offsets, factors, out, red, green, blue, start, blocks):
    """Pixels start .. start + _PIXELS * blocks - 1 of an output row: the sum of four resized rows, clipped to [0, 1].

    out[red + j], out[green + j], out[blue + j] for pixel start + j = channels of the sum over k of
    factors[k] * resized[offsets[k] + _LANES * (start + j) + channel]. Sum and separation of the channels stay in registers.
    """
    whole = types.int64
    signature = types.void(resized, offsets, factors, out, whole, whole, whole, whole, whole)

    def generate(context, builder, signature, arguments):
        resized, offsets, factors, out = (
            data_pointer(context, builder, signature.args[i], arguments[i]) for i in range(4)
        )
        places, start, blocks = arguments[4:7], arguments[7], arguments[8]
        f32, i64 = ir.FloatType(), ir.IntType(64)
        quarter = _PIXELS // _LANES  # pixels of a vector

        def constant(value):
            return ir.Constant(i64, value)

        begins = [builder.load(builder.gep(offsets, [constant(k)])) for k in range(4)]
        weights = [splat(builder, builder.load(builder.gep(factors, [constant(k)])), _PIXELS) for k in range(4)]
        with cgutils.for_range(builder, blocks) as loop:
            j = builder.mul(loop.index, constant(_PIXELS))
            first = builder.mul(builder.add(start, j), constant(_LANES))
            sums = []
            for v in range(_LANES):
                total = None
                for begin, weight in zip(begins, weights, strict=True):
                    place = builder.add(builder.add(begin, first), constant(_PIXELS * v))
                    values = builder.load(vector_pointer(builder, resized, place, f32, _PIXELS), align=64)
                    product = builder.fmul(values, weight, flags=("contract",))
                    total = product if total is None else builder.fadd(total, product, flags=("contract",))
                sums.append(clip(builder, total))
            for c, base in enumerate(places):
                picks = [_LANES * k + c for k in range(2 * quarter)]  # one channel of two vectors
                halves = [shuffle(builder, sums[v], sums[v + 1], picks) for v in (0, 2)]
                channel = shuffle(builder, *halves, range(_PIXELS))
                stored = builder.store(channel, vector_pointer(builder, out, builder.add(base, j), f32, _PIXELS))
                stored.align = 4
        return context.get_dummy_value()

    return signature, generate


@njit(**_JIT)
def _taps(length, size, first, weight):
    """Fills first (S,) and weight (S, 4) of the formula at the top; taps outside 0 .. length - 1 weigh 0."""
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
def _fix_weights(first, weight, flip, start, fixed):
    """The x taps in fixed point, in the layout of `_resize_pair`; an odd last pixel is done twice."""
    size = len(first)
    for j in range(len(start)):
        target = min(j, size - 1)
        source = size - 1 - target if flip else target
        start[j] = 3 * (first[source] + _PAD)
        largest, rest = 0, _ONE
        for k in range(4):
            w = np.int64(np.rint(weight[source, k] * _ONE))
            rest -= w
            if weight[source, k] > weight[source, largest]:
                largest = k
            for c in range(3):
                fixed[j // 2, k // 2, j % 2, 2 * c + k % 2] = w
        for c in range(3):  # the rounding errors go to the largest weight, so that a flat image stays as it is
            fixed[j // 2, largest // 2, j % 2, 2 * c + largest % 2] += rest


@njit(**_JIT)
def _crop(
    image, top, left, height, width, flip, first, weight, start, fixed, row, resized, offsets, factors, edge, out
):
    """Every source row is resized in x once and kept while output rows need it (four rows at most); y is a blend."""
    size = out.shape[1]
    _taps(height, size, first[0], weight[0])
    _taps(width, size, first[1], weight[1])
    _fix_weights(first[1], weight[1], flip, start, fixed)
    scale = np.float32(1 / (255 * _ONE))
    pitch, stride = 3 * image.shape[1], resized.shape[1]
    done = -1  # the last source row that has been resized
    for i in range(size):
        y0 = first[0, i]
        for y in range(max(y0, done + 1, 0), min(y0 + 4, height)):
            pixels = (top + y) * pitch + 3 * left
            target = y % 4 * stride // (2 * _LANES)
            for x in range(3 * width):
                put(row, 3 * _PAD + x, at(image, pixels + x))
            for pair in range(len(start) // 2):
                _resize_pair(row, at(start, 2 * pair), at(start, 2 * pair + 1), fixed, pair, resized, target + pair)
            done = y
        for k in range(4):
            offsets[k] = (y0 + k) % 4 * stride
            factors[k] = scale * weight[0, i, k]
        red = i * size
        green, blue = red + size * size, red + 2 * size * size
        blocks = size // _PIXELS
        _blend(resized, offsets, factors, out, red, green, blue, 0, blocks)
        done_pixels = _PIXELS * blocks
        if done_pixels < size:
            _blend(resized, offsets, factors, edge, 0, _PIXELS, 2 * _PIXELS, done_pixels, 1)
            for c in range(3):
                for j in range(size - done_pixels):
                    put(out, red + c * size * size + done_pixels + j, at(edge, c * _PIXELS + j))
