"""Color, grayscale, blur, solarize and normalize on a GPU: cropped images -> the views of a batch.

Formulas and reference: kernels/augment.py. Two launches for all views, whatever their parameters:

    mean     channel means for contrast, only for views with color jitter:
             reads the crops, 3 bytes per pixel
    finish   everything: reads the crops, 3 bytes per pixel,
             writes the views, 6 bytes per pixel in a 16-bit dtype

12 bytes per pixel are the minimum for two launches. A single launch would have to keep a view on
chip between its mean and its pixels (150 KB at 224 px), which Triton cannot express. The blur adds
no pass: a program of `finish` computes the colors of its tile and of the margin that the blur reads
(three times the pixels at 224 px: 48 rows of 64 for a tile of 32x32) instead of storing and
reloading them. It blurs by two products with banded matrices on the tensor cores: float16 pixels
and taps, float32 sums, within 0.3/255 of the reference. Operations that a view's parameters disable
are skipped.

Shapes: N = views of the batch, S = side of a view.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbyol.kernels import augment_params as params

TILE = 32  # side of a program's tile of a view
PARTS = 16  # programs per view that compute its mean
MEAN_BLOCK = 512  # pixels per iteration
MEAN_WARPS, FINISH_WARPS = 4, 8

_JITTER, _ORDER = tl.constexpr(params.JITTER), tl.constexpr(params.ORDER)
_BRIGHTNESS, _CONTRAST = tl.constexpr(params.BRIGHTNESS), tl.constexpr(params.CONTRAST)
_SATURATION, _HUE = tl.constexpr(params.SATURATION), tl.constexpr(params.HUE)
_TORCHVISION, _GRAY = tl.constexpr(params.TORCHVISION), tl.constexpr(params.GRAY)
_SIGMA, _SOLARIZE = tl.constexpr(params.SIGMA), tl.constexpr(params.SOLARIZE)
_COLUMNS = tl.constexpr(params.COLUMNS)
_OP_BRIGHTNESS, _OP_CONTRAST = tl.constexpr(params.OP_BRIGHTNESS), tl.constexpr(params.OP_CONTRAST)
_OP_SATURATION = tl.constexpr(params.OP_SATURATION)
_STRIP = tl.constexpr(16)  # rows per iteration of the vertical blur: the tensor cores' minimum
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in params.GRAY_WEIGHTS)
_GAINS = tuple(1 / std for std in params.IMAGENET_STD)
_SHIFTS = tuple(-mean / std for mean, std in zip(params.IMAGENET_MEAN, params.IMAGENET_STD, strict=True))
_GAIN_R, _GAIN_G, _GAIN_B = (tl.constexpr(gain) for gain in _GAINS)
_SHIFT_R, _SHIFT_G, _SHIFT_B = (tl.constexpr(shift) for shift in _SHIFTS)


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _load(crops, pixels, inside):
    """Return R, G, B in [0, 1] of a view's pixels; 0 outside."""
    scale: tl.constexpr = 1 / 255 if crops.dtype.element_ty == tl.uint8 else 1.0
    red = tl.load(crops + 3 * pixels, mask=inside, other=0).to(tl.float32) * scale
    green = tl.load(crops + 3 * pixels + 1, mask=inside, other=0).to(tl.float32) * scale
    blue = tl.load(crops + 3 * pixels + 2, mask=inside, other=0).to(tl.float32) * scale
    return red, green, blue


@triton.jit
def _color_operation(operation, r, g, b, p, mean_r, mean_g, mean_b):
    """Apply one color operation; p is the view's parameter row; only contrast uses the means."""
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
    """Return the number of operations before contrast."""
    position = 0
    for k in tl.static_range(1, 4):
        position += tl.where(tl.load(p + _ORDER + k).to(tl.int32) == _OP_CONTRAST, k, 0)
    return position


@triton.jit
def mean_kernel(
    crops,  # (N, S, S, 3) uint8, or a float dtype in [0, 1]
    parameters,  # (N, COLUMNS) float32
    sums,  # (N, PARTS, 3) float32
    size,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channel sums of one part of a view, after the operations before contrast."""
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
                r, g, b = _color_operation(tl.load(p + _ORDER + k).to(tl.int32), r, g, b, p, 0.0, 0.0, 0.0)
            sum_r += tl.where(inside, r, 0.0)
            sum_g += tl.where(inside, g, 0.0)
            sum_b += tl.where(inside, b, 0.0)
        pointer = sums + (n * PARTS + part) * 3
        tl.store(pointer, tl.sum(sum_r, 0))
        tl.store(pointer + 1, tl.sum(sum_g, 0))
        tl.store(pointer + 2, tl.sum(sum_b, 0))


@triton.jit
def _means(sums, n, p, pixels, PARTS: tl.constexpr):
    """Return the channel means; with torchvision's color the mean of the gray image three times."""
    parts = sums + (n * PARTS + tl.arange(0, PARTS)) * 3
    r = tl.sum(tl.load(parts), 0) / pixels
    g = tl.sum(tl.load(parts + 1), 0) / pixels
    b = tl.sum(tl.load(parts + 2), 0) / pixels
    gray = _RED * r + _GREEN * g + _BLUE * b
    torchvision = tl.load(p + _TORCHVISION) != 0
    return tl.where(torchvision, gray, r), tl.where(torchvision, gray, g), tl.where(torchvision, gray, b)


@triton.jit
def _apply_color(view, p, sums, n, size, rows, columns, PARTS: tl.constexpr):
    """Return R, G, B of a rectangle after color operations and grayscale; 0 outside the view."""
    inside = ((rows >= 0) & (rows < size))[:, None] & ((columns >= 0) & (columns < size))[None, :]
    r, g, b = _load(view, rows[:, None] * size + columns[None, :], inside)
    if tl.load(p + _JITTER) != 0:
        mean_r, mean_g, mean_b = _means(sums, n, p, size * size, PARTS)
        for k in range(4):
            r, g, b = _color_operation(tl.load(p + _ORDER + k).to(tl.int32), r, g, b, p, mean_r, mean_g, mean_b)
    if tl.load(p + _GRAY) != 0:
        gray = _RED * r + _GREEN * g + _BLUE * b
        r, g, b = gray, gray, gray
    return tl.where(inside, r, 0.0), tl.where(inside, g, 0.0), tl.where(inside, b, 0.0)


@triton.jit
def _band_matrix(sigma, total, radius, ROWS: tl.constexpr, COLUMNS: tl.constexpr, shift):
    """Return (ROWS, COLUMNS) float16: at (i, j) the tap of distance j + shift - i."""
    distance = shift + tl.arange(0, COLUMNS)[None, :] - tl.arange(0, ROWS)[:, None]
    taps = tl.exp(-0.5 / (sigma * sigma) * (distance * distance).to(tl.float32)) / total
    return tl.where((distance <= radius) & (distance >= -radius), taps, 0.0).to(tl.float16)


@triton.jit
def _apply_color_and_blur(
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
    """Return R, G, B of a tile after color and blur: vertically in strips, then horizontally."""
    distance = tl.arange(0, WINDOW)
    taps = tl.where(distance <= RADIUS, tl.exp(-0.5 / (sigma * sigma) * (distance * distance).to(tl.float32)), 0.0)
    total = 2.0 * tl.sum(taps, 0) - 1.0
    # Taps whose mass on both sides is below 1e-4 in total are dropped, as on the CPU.
    radius = tl.minimum(tl.ceil(3.9 * sigma).to(tl.int32), RADIUS)
    columns = left - RADIUS + distance
    r = tl.zeros((TILE, WINDOW), tl.float32)
    g = tl.zeros((TILE, WINDOW), tl.float32)
    b = tl.zeros((TILE, WINDOW), tl.float32)
    for start in range(0, TILE + 2 * radius, _STRIP):
        rows = top - radius + start + tl.arange(0, _STRIP)
        x_r, x_g, x_b = _apply_color(view, p, sums, n, size, rows, columns, PARTS)
        band = _band_matrix(sigma, total, RADIUS, TILE, _STRIP, start - radius)
        r = tl.dot(band, x_r.to(tl.float16), r)
        g = tl.dot(band, x_g.to(tl.float16), g)
        b = tl.dot(band, x_b.to(tl.float16), b)
    across = tl.trans(_band_matrix(sigma, total, RADIUS, TILE, WINDOW, -RADIUS))
    return tl.dot(r.to(tl.float16), across), tl.dot(g.to(tl.float16), across), tl.dot(b.to(tl.float16), across)


@triton.jit
def _finish(x, solarize, gain, shift):
    """Solarize, clip and normalize one channel."""
    x = tl.where(tl.where(solarize, x, 0.0) >= 0.5, 1.0 - x, x)
    return _clip(x) * gain + shift


@triton.jit
def finish_kernel(
    crops,
    parameters,
    sums,
    out,  # (N, S, S, 3) float16, bfloat16 or float32
    size,
    RADIUS: tl.constexpr,  # blur radius for this size
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # power of two >= TILE + 2 RADIUS
):
    """One tile of one view, from the crop to the normalized batch."""
    n = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(size, TILE)
    top = tl.program_id(0) // across * TILE
    left = tl.program_id(0) % across * TILE
    p = parameters + n * _COLUMNS
    view = crops + n * size * size * 3
    sigma = tl.load(p + _SIGMA)
    if sigma > 0:
        r, g, b = _apply_color_and_blur(view, p, sums, n, size, sigma, top, left, RADIUS, PARTS, TILE, WINDOW)
    else:
        tile = tl.arange(0, TILE)
        r, g, b = _apply_color(view, p, sums, n, size, top + tile, left + tile, PARTS)
    solarize = tl.load(p + _SOLARIZE) != 0
    rows, columns = top + tl.arange(0, TILE), left + tl.arange(0, TILE)
    inside = (rows < size)[:, None] & (columns < size)[None, :]
    pointer = out + n * size * size * 3 + 3 * (rows[:, None] * size + columns[None, :])
    tl.store(pointer, _finish(r, solarize, _GAIN_R, _SHIFT_R).to(out.dtype.element_ty), mask=inside)
    tl.store(pointer + 1, _finish(g, solarize, _GAIN_G, _SHIFT_G).to(out.dtype.element_ty), mask=inside)
    tl.store(pointer + 2, _finish(b, solarize, _GAIN_B, _SHIFT_B).to(out.dtype.element_ty), mask=inside)


def window(size: int) -> int:
    """Return the side of the square that the blur of a tile reads, padded to a power of two."""
    return triton.next_power_of_2(TILE + 2 * params.blur_radius(size))


def augment_views(crops: Tensor, parameters: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `augment_reference` and `normalize_reference` of a batch's views in two launches.

    Args:
        crops: (N, S, S, 3), contiguous; uint8, or a float dtype in [0, 1].
        parameters: (N, COLUMNS) float32 on the same device: `ViewParams.pack()` with one row per
            crop.
        dtype: float16, bfloat16 or float32.

    Returns:
        (N, 3, S, S) of `dtype`, channels-last.

    Raises:
        ValueError: Mismatched shapes, or tensors that are not contiguous.
    """
    n, size = crops.shape[0], crops.shape[1]
    if crops.shape != (n, size, size, 3) or not crops.is_contiguous():
        raise ValueError(f"crops must be contiguous (N, S, S, 3), not {tuple(crops.shape)}, strides {crops.stride()}")
    if parameters.shape != (n, params.COLUMNS) or parameters.dtype != torch.float32 or not parameters.is_contiguous():
        raise ValueError(
            f"parameters must be contiguous float32 ({n}, {params.COLUMNS}), not {tuple(parameters.shape)}"
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
        RADIUS=params.blur_radius(size),
        PARTS=PARTS,
        TILE=TILE,
        WINDOW=window(size),
        num_warps=FINISH_WARPS,
    )
    return out.permute(0, 3, 1, 2)
