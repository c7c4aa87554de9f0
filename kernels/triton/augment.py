"""Color, grayscale, blur, solarize and normalize on a GPU, in Triton: decoded crops -> the views of a batch.

Formulas and reference: kernels/augment.py. Two launches for all views of both kinds, whatever they draw:

    mean     per view, the channel means that contrast is about: reads the crops, 3 bytes a pixel; only views with jitter
    finish   everything: reads the crops, 3 bytes a pixel, writes the views, 6 bytes a pixel in 16 bits

12 bytes a pixel, which is the least with two launches. One would do only if a view stayed on the chip between its mean and
its pixels (150 KB at 224 px), which Triton cannot say. The blur adds no pass: a program of `finish` makes the colors of
its tile and of the margin that the blur reaches (three times the pixels at 224 px: 48 rows of 64 for a tile of 32x32), rather
than storing them and reading them again, and blurs by two products with banded matrices on the tensor cores: float16 pixels
and taps, float32 sums, within 0.3/255 of the reference. What the draw leaves out is skipped.

Shapes: N = views of the batch (both of every image), S = side of a view.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels import augment

TILE = 32  # side of a program's piece of a view
PARTS = 16  # programs per view that add up its mean
MEAN_BLOCK = 512  # pixels at a time
MEAN_WARPS, FINISH_WARPS = 4, 8

_JITTER, _ORDER = tl.constexpr(augment.JITTER), tl.constexpr(augment.ORDER)
_BRIGHTNESS, _CONTRAST = tl.constexpr(augment.BRIGHTNESS), tl.constexpr(augment.CONTRAST)
_SATURATION, _HUE = tl.constexpr(augment.SATURATION), tl.constexpr(augment.HUE)
_TORCHVISION, _GRAY = tl.constexpr(augment.TORCHVISION), tl.constexpr(augment.GRAY)
_SIGMA, _SOLARIZE = tl.constexpr(augment.SIGMA), tl.constexpr(augment.SOLARIZE)
_COLUMNS = tl.constexpr(augment.COLUMNS)
_OP_BRIGHTNESS, _OP_CONTRAST = tl.constexpr(augment.OP_BRIGHTNESS), tl.constexpr(augment.OP_CONTRAST)
_OP_SATURATION = tl.constexpr(augment.OP_SATURATION)
_STRIP = tl.constexpr(16)  # rows that the blur's first product takes at a time: the fewest that the tensor cores do
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in augment.GRAY_WEIGHTS)
_GAINS = tuple(1 / std for std in augment.IMAGENET_STD)
_SHIFTS = tuple(-mean / std for mean, std in zip(augment.IMAGENET_MEAN, augment.IMAGENET_STD, strict=True))
_GAIN_R, _GAIN_G, _GAIN_B = (tl.constexpr(gain) for gain in _GAINS)
_SHIFT_R, _SHIFT_G, _SHIFT_B = (tl.constexpr(shift) for shift in _SHIFTS)


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _load(crops, pixels, inside):
    """R, G, B in [0, 1] of pixels of a view; 0 outside."""
    scale: tl.constexpr = 1 / 255 if crops.dtype.element_ty == tl.uint8 else 1.0
    red = tl.load(crops + 3 * pixels, mask=inside, other=0).to(tl.float32) * scale
    green = tl.load(crops + 3 * pixels + 1, mask=inside, other=0).to(tl.float32) * scale
    blue = tl.load(crops + 3 * pixels + 2, mask=inside, other=0).to(tl.float32) * scale
    return red, green, blue


@triton.jit
def _operation(operation, r, g, b, p, mean_r, mean_g, mean_b):
    """One color operation; p is the view's parameter row, the means are used by contrast alone."""
    torchvision = tl.load(p + _TORCHVISION) != 0
    if operation == _OP_BRIGHTNESS:
        value = tl.load(p + _BRIGHTNESS)
        factor = tl.where(torchvision, value, 1.0)
        shift = tl.where(torchvision, 0.0, value)
        r, g, b = _clip(r * factor + shift), _clip(g * factor + shift), _clip(b * factor + shift)
    elif operation == _OP_CONTRAST:
        factor = tl.load(p + _CONTRAST)
        r = _clip((r - mean_r) * factor + mean_r)
        g = _clip((g - mean_g) * factor + mean_g)
        b = _clip((b - mean_b) * factor + mean_b)
    elif operation == _OP_SATURATION:
        factor = tl.load(p + _SATURATION)
        if torchvision:
            gray = (1.0 - factor) * (_RED * r + _GREEN * g + _BLUE * b)
            r, g, b = _clip(factor * r + gray), _clip(factor * g + gray), _clip(factor * b + gray)
        else:
            value = tl.maximum(r, tl.maximum(g, b))
            chroma = value - tl.minimum(r, tl.minimum(g, b))
            ratio = tl.minimum(factor, value / tl.maximum(chroma, 1e-12))
            r, g, b = value - (value - r) * ratio, value - (value - g) * ratio, value - (value - b) * ratio
    else:
        value = tl.maximum(r, tl.maximum(g, b))
        low = tl.minimum(r, tl.minimum(g, b))
        chroma = value - low
        difference = tl.where(value == r, g - b, tl.where(value == g, b - r, r - g))
        base = tl.where(value == r, 0.0, tl.where(value == g, 2.0, 4.0))
        h = difference / tl.maximum(chroma, 1e-12) + base + 6.0 * tl.load(p + _HUE)
        h = tl.where(h < 0.0, h + 6.0, tl.where(h >= 6.0, h - 6.0, h))
        r = low + chroma * _clip(tl.abs(h - 3.0) - 1.0)
        g = low + chroma * _clip(2.0 - tl.abs(h - 2.0))
        b = low + chroma * _clip(2.0 - tl.abs(h - 4.0))
    return r, g, b


@triton.jit
def _contrast_position(p):
    """How many operations come before contrast."""
    position = 0
    for k in tl.static_range(1, 4):
        position += tl.where(tl.load(p + _ORDER + k).to(tl.int32) == _OP_CONTRAST, k, 0)
    return position


@triton.jit
def mean_kernel(
    crops,  # (N, S, S, 3) uint8, or a float type in [0, 1]
    parameters,  # (N, COLUMNS) float32
    sums,  # (N, PARTS, 3) float32
    size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per part of a view, the sums of its channels after the operations that come before contrast."""
    part, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = parameters + n * _COLUMNS
    if tl.load(p + _JITTER) != 0:
        before = _contrast_position(p)
        pixels = size * size
        view = crops + n * pixels * 3
        length = tl.cdiv(pixels, PARTS)
        end = tl.minimum((part + 1) * length, pixels)
        sum_r = tl.zeros((BLOCK,), tl.float32)
        sum_g = tl.zeros((BLOCK,), tl.float32)
        sum_b = tl.zeros((BLOCK,), tl.float32)
        for start in range(part * length, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            r, g, b = _load(view, at, inside)
            for k in range(before):
                r, g, b = _operation(tl.load(p + _ORDER + k).to(tl.int32), r, g, b, p, 0.0, 0.0, 0.0)
            sum_r += tl.where(inside, r, 0.0)
            sum_g += tl.where(inside, g, 0.0)
            sum_b += tl.where(inside, b, 0.0)
        place = sums + (n * PARTS + part) * 3
        tl.store(place, tl.sum(sum_r, 0))
        tl.store(place + 1, tl.sum(sum_g, 0))
        tl.store(place + 2, tl.sum(sum_b, 0))


@triton.jit
def _means(sums, n, p, pixels, PARTS: tl.constexpr):
    """The channels' means, or the gray image's three times."""
    parts = sums + (n * PARTS + tl.arange(0, PARTS)) * 3
    r = tl.sum(tl.load(parts), 0) / pixels
    g = tl.sum(tl.load(parts + 1), 0) / pixels
    b = tl.sum(tl.load(parts + 2), 0) / pixels
    gray = _RED * r + _GREEN * g + _BLUE * b
    torchvision = tl.load(p + _TORCHVISION) != 0
    return tl.where(torchvision, gray, r), tl.where(torchvision, gray, g), tl.where(torchvision, gray, b)


@triton.jit
def _colored(view, p, sums, n, size, rows, columns, PARTS: tl.constexpr):
    """R, G, B of a rectangle of a view after the four operations and grayscale; 0 outside the view."""
    inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None, :]
    r, g, b = _load(view, rows[:, None] * size + columns[None, :], inside)
    if tl.load(p + _JITTER) != 0:
        mean_r, mean_g, mean_b = _means(sums, n, p, size * size, PARTS)
        for k in range(4):
            r, g, b = _operation(tl.load(p + _ORDER + k).to(tl.int32), r, g, b, p, mean_r, mean_g, mean_b)
    if tl.load(p + _GRAY) != 0:
        gray = _RED * r + _GREEN * g + _BLUE * b
        r, g, b = gray, gray, gray
    return tl.where(inside, r, 0.0), tl.where(inside, g, 0.0), tl.where(inside, b, 0.0)


@triton.jit
def _band(sigma, total, radius, ROWS: tl.constexpr, COLUMNS: tl.constexpr, shift):
    """(ROWS, COLUMNS) float16: at (i, j) the tap for the distance j + shift - i, 0 beyond the radius."""
    distance = shift + tl.arange(0, COLUMNS)[None, :] - tl.arange(0, ROWS)[:, None]
    taps = tl.exp(-0.5 / (sigma * sigma) * (distance * distance).to(tl.float32)) / total
    return tl.where((distance <= radius) & (distance >= -radius), taps, 0.0).to(tl.float16)


@triton.jit
def _blurred(
    view,
    p,
    sums,
    n,
    size,
    sigma,
    top,
    left,
    RADIUS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """R, G, B of a tile after color and blur: vertically strip by strip, then horizontally."""
    distance = tl.arange(0, WINDOW)
    taps = tl.where(distance <= RADIUS, tl.exp(-0.5 / (sigma * sigma) * (distance * distance).to(tl.float32)), 0.0)
    total = 2.0 * tl.sum(taps, 0) - 1.0
    # Rows whose taps weigh less than 1e-4 on both sides together are left out, as on the CPU.
    radius = tl.minimum(tl.ceil(3.9 * sigma).to(tl.int32), RADIUS)
    columns = left - RADIUS + distance
    r = tl.zeros((TILE, WINDOW), tl.float32)
    g = tl.zeros((TILE, WINDOW), tl.float32)
    b = tl.zeros((TILE, WINDOW), tl.float32)
    for start in range(0, TILE + 2 * radius, _STRIP):
        rows = top - radius + start + tl.arange(0, _STRIP)
        x_r, x_g, x_b = _colored(view, p, sums, n, size, rows, columns, PARTS)
        band = _band(sigma, total, RADIUS, TILE, _STRIP, start - radius)
        r = tl.dot(band, x_r.to(tl.float16), r)
        g = tl.dot(band, x_g.to(tl.float16), g)
        b = tl.dot(band, x_b.to(tl.float16), b)
    across = tl.trans(_band(sigma, total, RADIUS, TILE, WINDOW, -RADIUS))
    return tl.dot(r.to(tl.float16), across), tl.dot(g.to(tl.float16), across), tl.dot(b.to(tl.float16), across)


@triton.jit
def _tone(x, solarize, gain, shift):
    x = tl.where(tl.where(solarize, x, 0.0) >= 0.5, 1.0 - x, x)
    return _clip(x) * gain + shift


@triton.jit
def finish_kernel(
    crops,
    parameters,
    sums,
    out,  # (N, S, S, 3) float16, bfloat16 or float32
    size,
    RADIUS: tl.constexpr,  # of the blur at this size
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # power of two >= TILE + 2 RADIUS
):
    """One tile of one view, from the crop to the batch."""
    n = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(size, TILE)
    top = tl.program_id(0) // across * TILE
    left = tl.program_id(0) % across * TILE
    p = parameters + n * _COLUMNS
    view = crops + n * size * size * 3
    sigma = tl.load(p + _SIGMA)
    if sigma > 0:
        r, g, b = _blurred(view, p, sums, n, size, sigma, top, left, RADIUS, PARTS, TILE, WINDOW)
    else:
        tile = tl.arange(0, TILE)
        r, g, b = _colored(view, p, sums, n, size, top + tile, left + tile, PARTS)
    solarize = tl.load(p + _SOLARIZE) != 0
    rows, columns = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    place = out + n * size * size * 3 + 3 * (rows[:, None] * size + columns[None, :])
    tl.store(place, _tone(r, solarize, _GAIN_R, _SHIFT_R).to(out.dtype.element_ty), mask=inside)
    tl.store(place + 1, _tone(g, solarize, _GAIN_G, _SHIFT_G).to(out.dtype.element_ty), mask=inside)
    tl.store(place + 2, _tone(b, solarize, _GAIN_B, _SHIFT_B).to(out.dtype.element_ty), mask=inside)


def window(size: int) -> int:
    """Side of the square that a tile's blur reads."""
    return triton.next_power_of_2(TILE + 2 * augment.blur_radius(size))


def augment_views(crops: Tensor, parameters: Tensor, dtype: torch.dtype) -> Tensor:
    """`augment_reference` and `normalize_reference` of all views of a batch, in two launches.

    Args:
        crops: (N, S, S, 3) uint8, contiguous; a float type in [0, 1] is taken too.
        parameters: (N, COLUMNS) float32 on the same device: `ViewParams.pack()` with one row per crop.
        dtype: float16, bfloat16 or float32.

    Returns:
        (N, 3, S, S) of `dtype`, in channels_last layout.

    Raises:
        ValueError: shapes or layouts do not fit.
    """
    n, size = crops.shape[0], crops.shape[1]
    if crops.shape != (n, size, size, 3) or not crops.is_contiguous():
        raise ValueError(f"crops must be contiguous (N, S, S, 3), not {tuple(crops.shape)}, strides {crops.stride()}")
    if parameters.shape != (n, augment.COLUMNS) or parameters.dtype != torch.float32 or not parameters.is_contiguous():
        raise ValueError(
            f"parameters must be contiguous float32 ({n}, {augment.COLUMNS}), not {tuple(parameters.shape)}"
        )
    out = torch.empty(n, size, size, 3, dtype=dtype, device=crops.device)
    if n == 0:
        return out.permute(0, 3, 1, 2)
    sums = torch.empty(n, PARTS, 3, device=crops.device)
    mean_kernel[(PARTS, n)](crops, parameters, sums, size, PARTS=PARTS, BLOCK=MEAN_BLOCK, num_warps=MEAN_WARPS)
    finish_kernel[(triton.cdiv(size, TILE) ** 2, n)](
        crops,
        parameters,
        sums,
        out,
        size,
        RADIUS=augment.blur_radius(size),
        PARTS=PARTS,
        TILE=TILE,
        WINDOW=window(size),
        num_warps=FINISH_WARPS,
    )
    return out.permute(0, 3, 1, 2)
