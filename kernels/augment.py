"""Color jitter, grayscale, Gaussian blur, solarize and normalize of one view.

Order and formulas (x in [0, 1], float32), as in `byol/utils/augmentations.py` of google-deepmind/deepmind-research:

    color, four operations in the drawn order, clip to [0, 1] after each:
        brightness    x + b                                        torchvision: b x
        contrast      (x - mean_c) c + mean_c, mean per channel    torchvision: mean of the gray image
        saturation    S of HSV times s, clipped                    torchvision: s x + (1 - s) gray
        hue           H of HSV plus h turns, mod 1                 torchvision: the same
    grayscale         0.2989 R + 0.587 G + 0.114 B in all channels
    blur              2 int(S / 20) + 1 taps, weights exp(-d^2 / 2 sigma^2) / sum, separable, zero padding
    solarize          x < 0.5 ? x : 1 - x
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

from fastbyol.kernels.cpu.intrinsics import LANES, ROWS, aligned_zeros, at, blur_columns, finish_row, put

# Columns of a view's parameter row.
BOX, FLIP, JITTER, ORDER = 0, 4, 5, 6
BRIGHTNESS, CONTRAST, SATURATION, HUE = 10, 11, 12, 13
TORCHVISION, GRAY, SIGMA, SOLARIZE = 14, 15, 16, 17  # SIGMA is 0 where there is no blur
COLUMNS = 18

# The four color operations, as numbered in the ORDER columns.
OP_BRIGHTNESS, OP_CONTRAST, OP_SATURATION, OP_HUE = 0, 1, 2, 3

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def blur_radius(size: int) -> int:
    """Taps on each side of the center for views of `size` pixels: 11 at 224, 0 (no blur) below 20."""
    return size // 20


def augment_reference(x: Tensor, p: NDArray[np.float32]) -> Tensor:
    """All operations but the normalization.

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
    if p[SOLARIZE]:
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
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device)[:, None, None] + 6 * hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_reference(x: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of 2 * blur_radius(S) + 1 taps, zero padding."""
    radius = blur_radius(x.shape[-1])
    d = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    taps = torch.exp(-(d**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    planes = x[:, None]  # (3, 1, S, S)
    planes = torch.nn.functional.conv2d(planes, taps[None, None, :, None], padding=(radius, 0))
    return torch.nn.functional.conv2d(planes, taps[None, None, None, :], padding=(0, radius))[:, 0]


def normalize_reference(x: Tensor) -> Tensor:
    """(..., 3, S, S) in [0, 1] -> zero mean and unit variance over ImageNet."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


class AugmentScratch:
    """A thread's working memory for `augment_into` at one output size."""

    def __init__(self, size: int) -> None:
        radius, blocks = blur_radius(size), -(-size // LANES)
        self.taps = np.zeros(1 + max(radius, _RADII[-1]), dtype=np.float32)
        self.padded = aligned_zeros((3, ROWS, _PAD + LANES * blocks + _PAD))  # rows after the vertical pass of the blur
        self.offsets = np.zeros(ROWS + 2 * _RADII[-1], dtype=np.int64)
        self.line = np.zeros(size + 2 * radius, dtype=np.float32)
        self.edge = np.zeros(3 * LANES, dtype=np.float32)  # what is left of an output row after its last whole vector
        self.mean = np.zeros(3, dtype=np.float32)
        mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
        self.scale = (1 / std).astype(np.float32)
        self.offset = (-mean / std).astype(np.float32)


def new_planes(size: int) -> NDArray[np.float32]:
    """(3, S, S) float32 that begins a cache line, with a row of zeros behind it: what the blur finds outside the view."""
    return aligned_zeros((3, size, size), beyond=size + LANES)


# The float of a batch -> what `augment_into` writes: numba computes with neither 16-bit float, so integers stand for their bits.
WRITTEN = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}


def as_written(batch: Tensor) -> NDArray[np.float32 | np.uint16 | np.int16]:
    """The memory of a batch on the CPU, float32, bfloat16 or float16, as `augment_into` writes it."""
    bits = batch if batch.dtype == torch.float32 else batch.view(torch.int16)
    return bits.numpy().view(WRITTEN[batch.dtype])


def augment_into(
    planes: NDArray[np.float32],
    p: NDArray[np.float32],
    out: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.int16],
    scratch: AugmentScratch,
) -> None:
    """`augment_reference` and `normalize_reference` on the CPU, without the GIL.

    Args:
        planes: (3, S, S) float32 in [0, 1], from `new_planes`; overwritten.
        p: (COLUMNS,) parameter row.
        out: (S, S, 3), C-contiguous, i.e. one image of a channels-last batch: float32, or uint16 for the bits of
            bfloat16 and int16 for those of float16 (rounded to nearest, ties to even); see `as_written`.
    """
    s = scratch
    _augment(planes, p, s.mean, s.taps, s.padded, s.line, s.edge, s.scale, s.offset, s.offsets, out)


_JIT = {
    "nogil": True,
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "nnan", "reassoc"},
}
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in GRAY_WEIGHTS)
_BLOCK = 1024  # pixels: three planes of a block stay in the L1 cache while the operations pass over them


@njit(**_JIT)
def _clip(x):
    return min(max(x, np.float32(0)), np.float32(1))


@njit(**_JIT)
def _operation(operation, r, g, b, p, mean):
    """One color operation in place on a block of pixels r, g, b (n,); mean (3,) is used by contrast alone."""
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


_RADII = (0, 2, 4, 6, 8)  # that the vector code knows; BYOL's largest sigma, 2, needs 8
_COLUMNS_2, _COLUMNS_4, _COLUMNS_6, _COLUMNS_8 = (blur_columns(radius) for radius in _RADII[1:])
_KINDS = {types.float32: "float32", types.uint16: "bfloat16", types.int16: "float16"}  # see WRITTEN
_FINISH = {dtype: [finish_row(radius, kind) for radius in _RADII] for dtype, kind in _KINDS.items()}
_PAD = LANES  # zeros on both sides of a row that is to be blurred


def _finish_row(source, red, green, blue, radius, taps, solarize, gain, shift, out, place, blocks):
    """`finish_row` of unchecked.py for this radius and this kind of `out`."""
    raise NotImplementedError("only its overload below exists: it is called from compiled code alone")


@overload(_finish_row, jit_options=_JIT)
def _finish_row_overload(source, red, green, blue, radius, taps, solarize, gain, shift, out, place, blocks):
    finish_0, finish_2, finish_4, finish_6, finish_8 = _FINISH[out.dtype]

    def finish(source, red, green, blue, radius, taps, solarize, gain, shift, out, place, blocks):
        if radius == 0:
            finish_0(source, red, green, blue, taps, solarize, gain, shift, out, place, blocks)
        elif radius == 2:
            finish_2(source, red, green, blue, taps, solarize, gain, shift, out, place, blocks)
        elif radius == 4:
            finish_4(source, red, green, blue, taps, solarize, gain, shift, out, place, blocks)
        elif radius == 6:
            finish_6(source, red, green, blue, taps, solarize, gain, shift, out, place, blocks)
        else:
            finish_8(source, red, green, blue, taps, solarize, gain, shift, out, place, blocks)

    return finish


@njit(**_JIT)
def _blur_columns(planes, i, radius, taps, offsets, padded):
    """The vertical pass for rows i .. i + ROWS - 1 of the three planes, into padded (3, ROWS, ...)."""
    size = planes.shape[1]
    stride = padded.shape[2]
    blocks = -(-size // LANES)
    for c in range(3):
        for k in range(ROWS + 2 * radius):
            y = i - radius + k
            put(offsets, k, (c * size + y) * size if 0 <= y < size else 3 * size * size)  # the zeros behind the planes
        start = c * ROWS * stride + _PAD
        if radius == 2:
            _COLUMNS_2(planes, offsets, taps, padded, start, stride, blocks)
        elif radius == 4:
            _COLUMNS_4(planes, offsets, taps, padded, start, stride, blocks)
        elif radius == 6:
            _COLUMNS_6(planes, offsets, taps, padded, start, stride, blocks)
        else:
            _COLUMNS_8(planes, offsets, taps, padded, start, stride, blocks)
        for k in range(ROWS):
            for j in range(_PAD):
                put(padded, start + k * stride + size + j, np.float32(0))


@njit(**_JIT)
def _blur_wide(planes, i, radius, taps, line, padded):
    """Both passes for the same rows with any radius, value by value: for recipes with a larger sigma than BYOL's."""
    size, margin = planes.shape[1], (len(line) - planes.shape[1]) // 2
    for c in range(3):
        for k in range(min(ROWS, size - i)):
            line[:] = 0
            for y in range(max(i + k - radius, 0), min(i + k + radius + 1, size)):
                for j in range(size):
                    line[margin + j] += taps[abs(i + k - y)] * planes[c, y, j]
            for j in range(size):
                total = np.float32(0)
                for d in range(-radius, radius + 1):
                    total += taps[abs(d)] * line[margin + j + d]
                padded[c, k, _PAD + j] = total


@njit(**_JIT)
def _finish(planes, p, split, mean, taps, padded, line, edge, scale, offset, offsets, out):
    """Second pass, ROWS output rows at a time: the color operations from contrast on, blur, solarize, clip, normalize.

    A row's colors are made just before the first output row that its blur needs, while the rows around it are in cache.
    planes (3, S, S) -> out (S, S, 3).

    Taps whose mass on both sides together is below 1e-4 are left out: a change of at most 1e-4 in [0, 1].
    """
    size = planes.shape[1]
    solarize = p[SOLARIZE] != 0
    radius, mass = 0, np.float32(1) - taps[0]
    while radius + 1 < len(taps) and mass > np.float32(1e-4):
        radius += 1
        mass -= 2 * taps[radius]
    wide = radius > _RADII[-1]
    if not wide:
        radius += radius % 2
    horizontal = 0 if wide else radius  # what `_finish_row` still has to do: `_blur_wide` does both passes
    source = padded if radius > 0 else planes
    stride, plane = (padded.shape[2], ROWS * padded.shape[2]) if radius > 0 else (size, size * size)
    flat, rest = out.reshape(out.size), edge.view(out.dtype)
    blocks = size // LANES
    done = LANES * blocks
    colored = 0
    for i in range(0, size, ROWS):
        while colored < min(i + ROWS + radius, size):
            _from_contrast(planes, colored, p, split, mean)
            colored += 1
        if wide:
            _blur_wide(planes, i, radius, taps, line, padded)
        elif radius > 0:
            _blur_columns(planes, i, radius, taps, offsets, padded)
        for k in range(min(ROWS, size - i)):
            red = k * stride + _PAD if radius > 0 else (i + k) * size
            green, blue = red + plane, red + 2 * plane
            place = 3 * size * (i + k)
            _finish_row(source, red, green, blue, horizontal, taps, solarize, scale, offset, flat, place, blocks)
            if done < size:
                red, green, blue, place = red + done, green + done, blue + done, place + 3 * done
                _finish_row(source, red, green, blue, horizontal, taps, solarize, scale, offset, rest, 0, 1)
                for j in range(3 * (size - done)):
                    put(flat, place + j, at(rest, j))


@njit(**_JIT)
def _augment(planes, p, mean, taps, padded, line, edge, scale, offset, offsets, out):
    """Both passes, in one call: a thread that comes back for the interpreter lock may have to wait for it."""
    radius = (len(line) - planes.shape[1]) // 2
    split = _until_contrast(planes, p, radius, taps, mean)
    _finish(planes, p, split, mean, taps, padded, line, edge, scale, offset, offsets, out)
