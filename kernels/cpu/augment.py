"""The augmentation of one view on the CPU, in two passes over the view.

Formulas and reference: kernels/augment.py. Contrast needs the mean of the whole view, so the first
pass applies the color operations before contrast and sums the channels. The second pass does the
rest, a few rows at a time, while they are in the cache.

Shapes: S = side of the view.
"""

import math

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.kernels import augment_params as params
from fastbyol.kernels.cpu.intrinsics import (
    BLUR_ROWS,
    LANES,
    aligned_zeros,
    load_flat,
    make_finish_row,
    make_vertical_blur,
    store_flat,
)

# dtype of a batch -> dtype that `augment_into` writes. numba supports neither 16-bit float, so
# integers hold the bits.
WRITTEN = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}

_RADII = (0, 2, 4, 6, 8)  # blur radii with vectorized code; BYOL's largest sigma, 2, needs 8
_PADDING = LANES  # zeros on both sides of a row that the horizontal pass of the blur reads
_BLOCK = 1024  # pixels: three planes of a block stay in the L1 cache across the color operations
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in params.GRAY_WEIGHTS)
_JIT = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "nnan", "reassoc"},
}


class AugmentScratch:
    """Working memory of one thread for `augment_into` at one output size."""

    def __init__(self, size: int) -> None:
        radius, blocks = params.blur_radius(size), -(-size // LANES)
        self.taps = np.zeros(1 + max(radius, _RADII[-1]), dtype=np.float32)
        # Rows after the vertical pass of the blur.
        self.padded = aligned_zeros((3, BLUR_ROWS, _PADDING + LANES * blocks + _PADDING))
        self.offsets = np.zeros(BLUR_ROWS + 2 * _RADII[-1], dtype=np.int64)
        self.line = np.zeros(size + 2 * radius, dtype=np.float32)
        # The vector that a row's last pixels fill only in part.
        self.edge = np.zeros(3 * LANES, dtype=np.float32)
        self.mean = np.zeros(3, dtype=np.float32)
        mean, std = np.array(params.IMAGENET_MEAN), np.array(params.IMAGENET_STD)
        self.scale = (1 / std).astype(np.float32)
        self.offset = (-mean / std).astype(np.float32)


def new_planes(size: int) -> NDArray[np.float32]:
    """Return (3, S, S) float32, aligned to a cache line, followed by zeros for the blur."""
    return aligned_zeros((3, size, size), tail=size + LANES)


def as_written(batch: Tensor) -> NDArray[np.float32 | np.uint16 | np.int16]:
    """Return the numpy view of a CPU batch that `augment_into` writes; see WRITTEN for dtypes."""
    bits = batch if batch.dtype == torch.float32 else batch.view(torch.int16)
    return bits.numpy().view(WRITTEN[batch.dtype])


def augment_into(
    planes: NDArray[np.float32],
    p: NDArray[np.float32],
    out: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int16],
    scratch: AugmentScratch,
) -> None:
    """Compute `augment_reference` and `normalize_reference`, without the GIL.

    Args:
        planes: (3, S, S) float32 in [0, 1], from `new_planes`; overwritten.
        p: (COLUMNS,) float32, the parameter row.
        out: (S, S, 3), C-contiguous: one image of a channels-last batch. float32, or uint16 for the
            bits of bfloat16 and int16 for those of float16 (rounded to nearest, ties to even); see
            `as_written`.
        scratch: Of this thread and this output size.
    """
    s = scratch
    augment_kernel(planes, p, s.mean, s.taps, s.padded, s.line, s.edge, s.scale, s.offset, s.offsets, out)


# --- color operations ---


@njit(**_JIT)
def _clip(x):
    return min(max(x, np.float32(0)), np.float32(1))


@njit(**_JIT)
def _color_operation(operation, r, g, b, p, mean):
    """Apply one color operation in place to pixels r, g, b (n,); only contrast uses mean (3,)."""
    one, zero = np.float32(1), np.float32(0)
    torchvision = p[params.TORCHVISION] != 0
    n = len(r)
    if operation in (params.OP_BRIGHTNESS, params.OP_CONTRAST):
        if operation == params.OP_CONTRAST:
            factor = p[params.CONTRAST]
            shift_r, shift_g, shift_b = mean[0] * (one - factor), mean[1] * (one - factor), mean[2] * (one - factor)
        else:
            factor = p[params.BRIGHTNESS] if torchvision else one
            shift_r = shift_g = shift_b = zero if torchvision else p[params.BRIGHTNESS]
        for i in range(n):
            r[i] = _clip(r[i] * factor + shift_r)
            g[i] = _clip(g[i] * factor + shift_g)
            b[i] = _clip(b[i] * factor + shift_b)
    elif operation == params.OP_SATURATION:
        factor = p[params.SATURATION]
        if torchvision:
            for i in range(n):
                gray = (one - factor) * (_RED * r[i] + _GREEN * g[i] + _BLUE * b[i])
                r[i] = _clip(factor * r[i] + gray)
                g[i] = _clip(factor * g[i] + gray)
                b[i] = _clip(factor * b[i] + gray)
        else:
            tiny = np.float32(1e-12)
            for i in range(n):
                value = max(r[i], max(g[i], b[i]))
                chroma = value - min(r[i], min(g[i], b[i]))
                ratio = min(factor, value / max(chroma, tiny))
                r[i] = value - (value - r[i]) * ratio
                g[i] = value - (value - g[i]) * ratio
                b[i] = value - (value - b[i]) * ratio
    else:
        two, four, six = np.float32(2), np.float32(4), np.float32(6)
        three, tiny = np.float32(3), np.float32(1e-12)
        shift = six * p[params.HUE]
        for i in range(n):
            red, green, blue = r[i], g[i], b[i]
            value, low = max(red, max(green, blue)), min(red, min(green, blue))
            chroma = value - low
            is_red, is_green = value == red, value == green
            difference = green - blue if is_red else (blue - red if is_green else red - green)
            base = zero if is_red else (two if is_green else four)
            h = difference * (one / max(chroma, tiny)) + base + shift  # in [-4, 8] for up to half a turn
            h += six if h < zero else (-six if h >= six else zero)
            r[i] = low + chroma * _clip(abs(h - three) - one)
            g[i] = low + chroma * _clip(two - abs(h - two))
            b[i] = low + chroma * _clip(two - abs(h - four))


# --- first pass ---


@njit(**_JIT)
def _first_pass(planes, p, radius, taps, mean):
    """Apply the operations before contrast, in place; compute contrast's mean and the blur's taps.

    Fills mean (3,) and the one-sided taps (1, 0, 0 ... for no blur). Returns the number of
    operations applied.
    """
    size = planes.shape[1]
    n = size * size
    before_contrast = 0
    if p[params.JITTER] != 0:
        r, g, b = planes[0].reshape(n), planes[1].reshape(n), planes[2].reshape(n)
        while int(p[params.ORDER + before_contrast]) != params.OP_CONTRAST:
            before_contrast += 1
        sums = np.zeros(3, dtype=np.float64)
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            br, bg, bb = r[start:stop], g[start:stop], b[start:stop]
            for k in range(before_contrast):
                _color_operation(int(p[params.ORDER + k]), br, bg, bb, p, mean)
            sum_r, sum_g, sum_b = np.float32(0), np.float32(0), np.float32(0)
            for i in range(stop - start):
                sum_r += br[i]
                sum_g += bg[i]
                sum_b += bb[i]
            sums[0] += sum_r
            sums[1] += sum_g
            sums[2] += sum_b
        for c in range(3):
            mean[c] = sums[c] / n
        if p[params.TORCHVISION] != 0:
            mean[:] = _RED * mean[0] + _GREEN * mean[1] + _BLUE * mean[2]
    taps[:] = np.float32(0)
    taps[0] = np.float32(1)
    if p[params.SIGMA] > 0:
        total = 1.0
        for d in range(1, radius + 1):
            total += 2 * math.exp(-(d * d) / (2.0 * p[params.SIGMA] * p[params.SIGMA]))
        for d in range(radius + 1):
            taps[d] = math.exp(-(d * d) / (2.0 * p[params.SIGMA] * p[params.SIGMA])) / total
    return before_contrast


# --- second pass ---


@njit(**_JIT)
def _color_row(planes, i, p, before_contrast, mean):
    """Apply contrast, the operations after it, and grayscale to row i, in place."""
    r, g, b = planes[0, i], planes[1, i], planes[2, i]
    if p[params.JITTER] != 0:
        for k in range(before_contrast, 4):
            _color_operation(int(p[params.ORDER + k]), r, g, b, p, mean)
    if p[params.GRAY] != 0:
        for j in range(len(r)):
            gray = _RED * r[j] + _GREEN * g[j] + _BLUE * b[j]
            r[j] = gray
            g[j] = gray
            b[j] = gray


_blur_rows, _finish_blocks = make_vertical_blur(_RADII[1:]), make_finish_row(_RADII)


@njit(**_JIT)
def _finish_row(radius, source, red, green, blue, taps, solarize, gain, shift, out, start, blocks):
    """Call the intrinsic of `make_finish_row`, compiled once for both calls."""
    _finish_blocks(radius, source, red, green, blue, taps, solarize, gain, shift, out, start, blocks)


@njit(**_JIT)
def _vertical_blur(planes, i, radius, taps, offsets, padded):
    """Write the vertical pass for rows i .. i + BLUR_ROWS - 1 to padded (3, BLUR_ROWS, ...)."""
    size = planes.shape[1]
    stride = padded.shape[2]
    blocks = -(-size // LANES)
    for c in range(3):
        for k in range(BLUR_ROWS + 2 * radius):
            y = i - radius + k
            # Rows outside the view read the zeros behind the planes.
            store_flat(offsets, k, (c * size + y) * size if 0 <= y < size else 3 * size * size)
        start = c * BLUR_ROWS * stride + _PADDING
        _blur_rows(radius, planes, offsets, taps, padded, start, stride, blocks)
        for k in range(BLUR_ROWS):
            for j in range(_PADDING):
                store_flat(padded, start + k * stride + size + j, np.float32(0))


@njit(**_JIT)
def _scalar_blur(planes, i, radius, taps, line, padded):
    """Write both passes for the same rows, for any radius: scalar code for large sigmas."""
    size, margin = planes.shape[1], (len(line) - planes.shape[1]) // 2
    for c in range(3):
        for k in range(min(BLUR_ROWS, size - i)):
            line[:] = 0
            for y in range(max(i + k - radius, 0), min(i + k + radius + 1, size)):
                for j in range(size):
                    line[margin + j] += taps[abs(i + k - y)] * planes[c, y, j]
            for j in range(size):
                total = np.float32(0)
                for d in range(-radius, radius + 1):
                    total += taps[abs(d)] * line[margin + j + d]
                padded[c, k, _PADDING + j] = total


@njit(**_JIT)
def _second_pass(planes, p, before_contrast, mean, taps, padded, line, edge, scale, offset, offsets, out):
    """Apply everything from contrast on: planes (3, S, S) -> out (S, S, 3).

    BLUR_ROWS output rows at a time. The colors of a row are computed just before the first output
    row whose blur reads it, while the rows around it are in the cache.

    Taps whose mass on both sides is below 1e-4 in total are dropped: a change of at most 1e-4 in
    [0, 1].
    """
    size = planes.shape[1]
    solarize = p[params.SOLARIZE] != 0
    radius, mass = 0, np.float32(1) - taps[0]
    while radius + 1 < len(taps) and mass > np.float32(1e-4):
        radius += 1
        mass -= 2 * taps[radius]
    scalar = radius > _RADII[-1]
    if not scalar:
        radius += radius % 2
    horizontal = 0 if scalar else radius  # left to `_finish_row`; `_scalar_blur` does both passes
    source = padded if radius > 0 else planes
    stride, plane = (padded.shape[2], BLUR_ROWS * padded.shape[2]) if radius > 0 else (size, size * size)
    flat, flat_edge = out.reshape(out.size), edge.view(out.dtype)
    blocks = size // LANES
    done = LANES * blocks
    colored = 0
    for i in range(0, size, BLUR_ROWS):
        while colored < min(i + BLUR_ROWS + radius, size):
            _color_row(planes, colored, p, before_contrast, mean)
            colored += 1
        if scalar:
            _scalar_blur(planes, i, radius, taps, line, padded)
        elif radius > 0:
            _vertical_blur(planes, i, radius, taps, offsets, padded)
        for k in range(min(BLUR_ROWS, size - i)):
            red = k * stride + _PADDING if radius > 0 else (i + k) * size
            green, blue = red + plane, red + 2 * plane
            start = 3 * size * (i + k)
            _finish_row(horizontal, source, red, green, blue, taps, solarize, scale, offset, flat, start, blocks)
            if done < size:
                red, green, blue, start = red + done, green + done, blue + done, start + 3 * done
                _finish_row(horizontal, source, red, green, blue, taps, solarize, scale, offset, flat_edge, 0, 1)
                for j in range(3 * (size - done)):
                    store_flat(flat, start + j, load_flat(flat_edge, j))


@njit(**_JIT)
def augment_kernel(planes, p, mean, taps, padded, line, edge, scale, offset, offsets, out):
    """Both passes in one call: between two calls a thread might wait for the GIL."""
    radius = (len(line) - planes.shape[1]) // 2
    before_contrast = _first_pass(planes, p, radius, taps, mean)
    _second_pass(planes, p, before_contrast, mean, taps, padded, line, edge, scale, offset, offsets, out)
