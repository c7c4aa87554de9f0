"""Colour jitter, grayscale, Gaussian blur, solarise and normalise of one view.

Order and formulas (x in [0, 1], float32), as in `byol/utils/augmentations.py` of google-deepmind/deepmind-research:

    colour, four operations in the drawn order, clip to [0, 1] after each:
        brightness    x + b                                        torchvision: b x
        contrast      (x - mean_c) c + mean_c, mean per channel    torchvision: mean of the gray image
        saturation    S of HSV times s, clipped                    torchvision: s x + (1 - s) gray
        hue           H of HSV plus h turns, mod 1                 torchvision: the same
    grayscale         0.2989 R + 0.587 G + 0.114 B in all channels
    blur              2 int(S / 20) + 1 taps, weights exp(-d^2 / 2 sigma^2) / sum, separable, zero padding
    solarise          x < 0.5 ? x : 1 - x
    clip to [0, 1], then (x - mean) / std of ImageNet

Saturation without HSV: with M = max(R, G, B), C = M - min(R, G, B) and S = C / M, scaling S by s and clipping it
gives M - (M - x) min(s, M / C). Hue to RGB by a closed form, h = 6 H in [0, 6), m = M - C: R = m + C clamp(|h - 3| - 1),
G = m + C clamp(2 - |h - 2|), B = m + C clamp(2 - |h - 4|), clamp to [0, 1].

A view's parameters are one row of float32, its columns named below (`views.ViewParams.pack` fills it).

Shapes: S = side of the view.
"""

import math

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.kernels.unchecked import LANES, at, put, weighted_sum

# Columns of a view's parameter row.
BOX, FLIP, JITTER, ORDER = 0, 4, 5, 6
BRIGHTNESS, CONTRAST, SATURATION, HUE = 10, 11, 12, 13
TORCHVISION, GRAY, SIGMA, SOLARISE = 14, 15, 16, 17  # SIGMA is 0 where there is no blur
COLUMNS = 18

# The four colour operations, as numbered in the ORDER columns.
OP_BRIGHTNESS, OP_CONTRAST, OP_SATURATION, OP_HUE = 0, 1, 2, 3

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def blur_radius(size: int) -> int:
    """Taps on each side of the centre for views of `size` pixels: 11 at 224, 0 (no blur) below 20."""
    return int(size / 10 / 2)


def augment_reference(x: Tensor, p: NDArray[np.float32]) -> Tensor:
    """All operations but the normalisation.

    Args:
        x: (3, S, S) float32 in [0, 1].
        p: (COLUMNS,) parameter row.

    Returns:
        (3, S, S) float32 in [0, 1].
    """
    if p[JITTER]:
        torchvision = bool(p[TORCHVISION])
        for operation in p[ORDER : ORDER + 4].astype(int):
            if operation == OP_BRIGHTNESS:
                x = brightness_reference(x, float(p[BRIGHTNESS]), torchvision=torchvision)
            elif operation == OP_CONTRAST:
                x = contrast_reference(x, float(p[CONTRAST]), torchvision=torchvision)
            elif operation == OP_SATURATION:
                x = saturation_reference(x, float(p[SATURATION]), torchvision=torchvision)
            else:
                x = hue_reference(x, float(p[HUE]))
    if p[GRAY]:
        x = gray_reference(x).expand(3, -1, -1)
    if p[SIGMA] > 0:
        x = blur_reference(x, float(p[SIGMA]))
    if p[SOLARISE]:
        x = torch.where(x < 0.5, x, 1 - x)
    return x.clamp(0, 1)


def brightness_reference(x: Tensor, value: float, *, torchvision: bool = False) -> Tensor:
    """Adds `value` (byol) or multiplies by it (torchvision)."""
    return (x * value if torchvision else x + value).clamp(0, 1)


def contrast_reference(x: Tensor, factor: float, *, torchvision: bool = False) -> Tensor:
    """Stretches about each channel's own mean (byol) or the mean of the gray image (torchvision)."""
    mean = (gray_reference(x) if torchvision else x).mean((1, 2), keepdim=True)
    return ((x - mean) * factor + mean).clamp(0, 1)


def saturation_reference(x: Tensor, factor: float, *, torchvision: bool = False) -> Tensor:
    """Scales S of HSV, clipped to 1 (byol), or blends with the gray image (torchvision)."""
    if torchvision:
        return (factor * x + (1 - factor) * gray_reference(x)).clamp(0, 1)
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb(hue, (saturation * factor).clamp(0, 1), value).clamp(0, 1)


def hue_reference(x: Tensor, shift: float) -> Tensor:
    """Turns H of HSV by `shift` turns."""
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb((hue + shift) % 1.0, saturation, value).clamp(0, 1)


def gray_reference(x: Tensor) -> Tensor:
    """(1, S, S): the luma."""
    red, green, blue = GRAY_WEIGHTS
    return (red * x[0] + green * x[1] + blue * x[2])[None]


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(3, S, S) in [0, 1] -> H in turns, S, V, each (S, S); H and S are 0 for grays."""
    red, green, blue = x
    value, chroma = x.amax(0), x.amax(0) - x.amin(0)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return sextant / 6 * (chroma > 0), chroma / torch.where(value > 0, value, 1.0), value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverse of `rgb_to_hsv`: (3, S, S)."""
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + 6 * hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_reference(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of 2 * blur_radius(S) + 1 taps, zero padding."""
    radius = blur_radius(x.shape[-1])
    d = torch.arange(-radius, radius + 1, dtype=torch.float32)
    taps = torch.exp(-(d**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    planes = x[:, None]  # (3, 1, S, S)
    planes = torch.nn.functional.conv2d(planes, taps[None, None, :, None], padding=(radius, 0))
    return torch.nn.functional.conv2d(planes, taps[None, None, None, :], padding=(0, radius))[:, 0]


def normalise_reference(x: Tensor) -> Tensor:
    """(..., 3, S, S) in [0, 1] -> zero mean and unit variance over ImageNet."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


class AugmentScratch:
    """A thread's working memory for `augment_into` at one output size."""

    def __init__(self, size: int) -> None:
        radius = _padded_radius(blur_radius(size))
        blocks = -(-size // LANES) * LANES
        self.rows = np.zeros((3, blocks), dtype=np.float32)  # an output row after the blur
        self.padded = np.zeros(blocks + 2 * radius + LANES, dtype=np.float32)
        terms = 1 + 2 * radius
        self.offsets, self.weights = np.zeros((2, terms), dtype=np.int64), np.zeros((2, terms), dtype=np.float32)
        self.toned = np.zeros((3, size), dtype=np.float32)  # an output row before it becomes bfloat16
        self.taps = np.zeros(1 + radius, dtype=np.float32)
        self.mean = np.zeros(3, dtype=np.float32)
        mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
        self.scale = (1 / std).astype(np.float32)
        self.offset = (-mean / std).astype(np.float32)


def new_planes(size: int) -> NDArray[np.float32]:
    """(3, S, S) float32 that begins a cache line, with room behind it for a last vector that reads beyond the end."""
    count = 3 * size * size
    memory = np.zeros(count + LANES + _CACHE_LINE // 4, dtype=np.float32)
    skip = -memory.ctypes.data % _CACHE_LINE // 4
    return memory[skip : skip + count].reshape(3, size, size)


def augment_into(
    planes: NDArray[np.float32],
    p: NDArray[np.float32],
    out: NDArray[np.float32] | NDArray[np.uint16],
    scratch: AugmentScratch,
) -> None:
    """`augment_reference` and `normalise_reference` on the CPU, without the GIL.

    Args:
        planes: (3, S, S) float32 in [0, 1], from `new_planes`; overwritten.
        p: (COLUMNS,) parameter row.
        out: (S, S, 3), C-contiguous, i.e. one image of a channels-last batch: float32, or uint16 for the bits of
            bfloat16 (rounded to nearest, ties to even).
    """
    s = scratch
    split = _until_contrast(planes, p, blur_radius(planes.shape[1]), s.taps, s.mean)
    _finish(planes, p, split, s.mean, s.taps, s.padded, s.rows, s.toned, s.scale, s.offset, s.offsets, s.weights, out)


def _padded_radius(radius: int) -> int:
    """Taps are handled in groups of four per side."""
    return -(-radius // 4) * 4


_JIT = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "nnan", "reassoc"},
}
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in GRAY_WEIGHTS)
_CACHE_LINE = 64  # bytes
_BLOCK = 1024  # pixels: three planes of a block stay in the L1 cache while the operations pass over them


@njit(**_JIT)
def _clip(x):
    return min(max(x, np.float32(0)), np.float32(1))


@njit(**_JIT)
def _operation(operation, r, g, b, p, mean):
    """One colour operation in place on a block of pixels r, g, b (n,); mean (3,) is used by contrast alone."""
    one, zero = np.float32(1), np.float32(0)
    torchvision = p[TORCHVISION] != 0
    n = len(r)
    if operation == OP_BRIGHTNESS:
        factor = p[BRIGHTNESS] if torchvision else one
        shift = zero if torchvision else p[BRIGHTNESS]
        for i in range(n):
            r[i] = _clip(r[i] * factor + shift)
            g[i] = _clip(g[i] * factor + shift)
            b[i] = _clip(b[i] * factor + shift)
    elif operation == OP_CONTRAST:
        factor = p[CONTRAST]
        shift_r, shift_g, shift_b = mean[0] * (one - factor), mean[1] * (one - factor), mean[2] * (one - factor)
        for i in range(n):
            r[i] = _clip(r[i] * factor + shift_r)
            g[i] = _clip(g[i] * factor + shift_g)
            b[i] = _clip(b[i] * factor + shift_b)
    elif operation == OP_SATURATION:
        factor = p[SATURATION]
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
        shift = six * p[HUE]
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


@njit(**_JIT)
def _until_contrast(planes, p, radius, taps, mean):
    """First pass: the operations before contrast, in place, and what the second pass needs to know of the whole view.

    Fills mean (3,), contrast's, and the blur's one-sided taps (all 0 but the first where there is no blur). Returns the
    number of operations done.
    """
    size = planes.shape[1]
    n = size * size
    split = 0
    if p[JITTER] != 0:
        r, g, b = planes[0].reshape(n), planes[1].reshape(n), planes[2].reshape(n)
        while int(p[ORDER + split]) != OP_CONTRAST:
            split += 1
        sums = np.zeros(3, dtype=np.float64)
        for start in range(0, n, _BLOCK):
            stop = min(start + _BLOCK, n)
            br, bg, bb = r[start:stop], g[start:stop], b[start:stop]
            for k in range(split):
                _operation(int(p[ORDER + k]), br, bg, bb, p, mean)
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
        if p[TORCHVISION] != 0:
            mean[:] = _RED * mean[0] + _GREEN * mean[1] + _BLUE * mean[2]
    taps[:] = np.float32(0)
    taps[0] = np.float32(1)
    if p[SIGMA] > 0:
        total = 1.0
        for d in range(1, radius + 1):
            total += 2 * math.exp(-(d * d) / (2.0 * p[SIGMA] * p[SIGMA]))
        for d in range(radius + 1):
            taps[d] = math.exp(-(d * d) / (2.0 * p[SIGMA] * p[SIGMA])) / total
    return split


@njit(**_JIT)
def _from_contrast(planes, i, p, split, mean):
    """Row i of the view: contrast, the operations after it, and grayscale, in place."""
    r, g, b = planes[0, i], planes[1, i], planes[2, i]
    if p[JITTER] != 0:
        for k in range(split, 4):
            _operation(int(p[ORDER + k]), r, g, b, p, mean)
    if p[GRAY] != 0:
        for j in range(len(r)):
            gray = _RED * r[j] + _GREEN * g[j] + _BLUE * b[j]
            r[j] = gray
            g[j] = gray
            b[j] = gray


@njit(**_JIT)
def _tone(x, solarise, gain, shift):
    """Solarise, clip and normalise one value."""
    x = np.float32(1) - x if solarise and x >= np.float32(0.5) else x
    return _clip(x) * gain + shift


def _store(source, red, green, blue, solarise, gain, shift, toned, out, place):
    """Last step of a row: tones S values from red, green and blue on in the flat `source` and interleaves them.

    They go to the flat `out` from `place` on; where that is uint16, as the bits of bfloat16, with `toned` (3, S) between.
    """
    raise NotImplementedError("only its overload below exists: it is called from compiled code alone")


@overload(_store, jit_options=_JIT)
def _store_overload(source, red, green, blue, solarise, gain, shift, toned, out, place):
    if out.dtype == types.float32:

        def store_float32(source, red, green, blue, solarise, gain, shift, toned, out, place):
            gain_r, gain_g, gain_b = gain[0], gain[1], gain[2]
            shift_r, shift_g, shift_b = shift[0], shift[1], shift[2]
            for j in range(toned.shape[1]):
                put(out, place + 3 * j, _tone(at(source, red + j), solarise, gain_r, shift_r))
                put(out, place + 3 * j + 1, _tone(at(source, green + j), solarise, gain_g, shift_g))
                put(out, place + 3 * j + 2, _tone(at(source, blue + j), solarise, gain_b, shift_b))

        return store_float32

    def store_bfloat16(source, red, green, blue, solarise, gain, shift, toned, out, place):
        size = toned.shape[1]
        gain_r, gain_g, gain_b = gain[0], gain[1], gain[2]
        shift_r, shift_g, shift_b = shift[0], shift[1], shift[2]
        for j in range(size):
            put(toned, j, _tone(at(source, red + j), solarise, gain_r, shift_r))
            put(toned, size + j, _tone(at(source, green + j), solarise, gain_g, shift_g))
            put(toned, 2 * size + j, _tone(at(source, blue + j), solarise, gain_b, shift_b))
        bits = toned.view(np.uint32)
        for j in range(size):
            put(out, place + 3 * j, _round_bfloat16(at(bits, j)))
            put(out, place + 3 * j + 1, _round_bfloat16(at(bits, size + j)))
            put(out, place + 3 * j + 2, _round_bfloat16(at(bits, 2 * size + j)))

    return store_bfloat16


@njit(**_JIT)
def _round_bfloat16(bits):
    """The upper half of a float32's bits (uint32), rounded to nearest, ties to even."""
    return (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)


_first_nine = weighted_sum(9, accumulate=False)  # the centre and four taps on each side
_next_eight = weighted_sum(8, accumulate=True)  # four further taps on each side


@njit(**_JIT)
def _blur_row(planes, i, size, taps, groups, padded, rows, offsets, weights):
    """Row i of the three planes, blurred, in rows[:, :size]: vertical sums into `padded`, from there the horizontal ones.

    offsets and weights (2, terms) are those of the vertical and of the horizontal sums; the caller filled the latter.
    Vectors of LANES values may read and write beyond the row's end: planes, padded and rows have room for that, and what
    must be 0 (the horizontal padding) is set to 0 again.
    """
    pad = 4 * groups
    blocks = -(-size // LANES)
    terms = weights.shape[1]
    for d in range(pad + 1):
        for side in range(2 if d else 1):
            y = i + d if side else i - d
            term = 2 * d - 1 + side if d else 0
            inside = 0 <= y < size
            put(offsets, term, y * size if inside else 0)
            put(weights, term, taps[d] if inside else np.float32(0))
    for c in range(3):
        plane = c * size * size
        _first_nine(planes, plane, offsets, weights, 0, padded, pad, blocks)
        for k in range(1, groups):
            _next_eight(planes, plane, offsets, weights, 8 * k + 1, padded, pad, blocks)
        for j in range(pad + LANES):
            put(padded, pad + size + j, np.float32(0))
        out = c * rows.shape[1]
        _first_nine(padded, 0, offsets, weights, terms, rows, out, blocks)
        for k in range(1, groups):
            _next_eight(padded, 0, offsets, weights, terms + 8 * k + 1, rows, out, blocks)


@njit(**_JIT)
def _finish(planes, p, split, mean, taps, padded, rows, toned, scale, offset, offsets, weights, out):
    """Second pass, one output row at a time: the colour operations from contrast on, blur, solarise, clip, normalise.

    A row's colours are made just before the first output row that its blur needs, while the rows around it are in cache.
    planes (3, S, S) -> out (S, S, 3).

    Taps whose mass on both sides together is below 1e-4 are left out: a change of at most 1e-4 in [0, 1].
    """
    size = planes.shape[1]
    solarise = p[SOLARISE] != 0
    groups = (len(taps) - 1) // 4
    while groups > 0:
        mass = np.float32(0)
        for d in range(4 * groups - 3, len(taps)):
            mass += 2 * taps[d]
        if mass > np.float32(1e-4):
            break
        groups -= 1
    pad = 4 * groups
    for d in range(pad + 1):
        for side in range(2 if d else 1):
            term = 2 * d - 1 + side if d else 0
            offsets[1, term] = pad + d if side else pad - d
            weights[1, term] = taps[d]
    padded[:pad] = 0
    coloured = 0
    for i in range(size):
        while coloured < min(i + 4 * groups + 1, size):
            _from_contrast(planes, coloured, p, split, mean)
            coloured += 1
        place = 3 * size * i
        if groups > 0:
            _blur_row(planes, i, size, taps, groups, padded, rows, offsets, weights)
            stride = rows.shape[1]
            _store(rows, 0, stride, 2 * stride, solarise, scale, offset, toned, out, place)
        else:
            red = i * size
            green, blue = red + size * size, red + 2 * size * size
            _store(planes, red, green, blue, solarise, scale, offset, toned, out, place)
