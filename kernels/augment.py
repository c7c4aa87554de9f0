"""Color jitter, grayscale, Gaussian blur, solarize and normalize of one view.

Order and formulas (x in [0, 1], float32), as in `byol/utils/augmentations.py` of
google-deepmind/deepmind-research:

    color: four operations in random order, clip to [0, 1] after each
        brightness    x + b                           torchvision: b x
        contrast      (x - mean_c) c + mean_c         torchvision: mean of the gray image
                      with the mean per channel
        saturation    S of HSV times s, clipped       torchvision: s x + (1 - s) gray
        hue           H of HSV plus h turns, mod 1    torchvision: the same
    grayscale         0.2989 R + 0.587 G + 0.114 B in all channels
    blur              2 int(S / 20) + 1 taps, weights exp(-d^2 / 2 sigma^2) / sum, separable,
                      zero padding
    solarize          x < 0.5 ? x : 1 - x
    clip to [0, 1], then (x - mean) / std of ImageNet

Saturation without HSV: with M = max(R, G, B), C = M - min(R, G, B) and S = C / M, scaling S by s
and clipping it gives M - (M - x) min(s, M / C). Hue to RGB in closed form, h = 6 H in [0, 6), m = M
- C: R = m + C clamp(|h - 3| - 1), G = m + C clamp(2 - |h - 2|), B = m + C clamp(2 - |h - 4|), clamp
to [0, 1].

The columns of a view's parameter row are in augment_params.py. `augment_into` (cpu/augment.py)
renders one view on the CPU; `triton.augment.augment_views` renders all views of a batch on a GPU.

Shapes: S = side of the view.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.kernels import augment_params as params
from fastbyol.kernels.cpu.augment import (  # noqa: F401 (re-exported)
    WRITTEN,
    AugmentScratch,
    as_written,
    augment_into,
    new_planes,
)


def augment_reference(x: Tensor, p: NDArray[np.float32]) -> Tensor:
    """Apply all operations except normalization.

    Args:
        x: (3, S, S) float32 in [0, 1].
        p: (COLUMNS,) float32, the parameter row.

    Returns:
        (3, S, S) float32 in [0, 1].
    """
    if p[params.JITTER]:
        torchvision = bool(p[params.TORCHVISION])
        for operation in p[params.ORDER : params.ORDER + 4].astype(int):
            if operation == params.OP_BRIGHTNESS:
                x = brightness_reference(x, float(p[params.BRIGHTNESS]), torchvision=torchvision)
            elif operation == params.OP_CONTRAST:
                x = contrast_reference(x, float(p[params.CONTRAST]), torchvision=torchvision)
            elif operation == params.OP_SATURATION:
                x = saturation_reference(x, float(p[params.SATURATION]), torchvision=torchvision)
            else:
                x = hue_reference(x, float(p[params.HUE]))
    if p[params.GRAY]:
        x = gray_reference(x).expand(3, -1, -1)
    if p[params.SIGMA] > 0:
        x = blur_reference(x, float(p[params.SIGMA]))
    if p[params.SOLARIZE]:
        x = torch.where(x < 0.5, x, 1 - x)
    return x.clamp(0, 1)


def brightness_reference(x: Tensor, value: float, *, torchvision: bool = False) -> Tensor:
    """Add `value` (byol) or multiply by it (torchvision)."""
    return (x * value if torchvision else x + value).clamp(0, 1)


def contrast_reference(x: Tensor, factor: float, *, torchvision: bool = False) -> Tensor:
    """Scale around each channel's mean (byol) or the gray image's mean (torchvision)."""
    mean = (gray_reference(x) if torchvision else x).mean((1, 2), keepdim=True)
    return ((x - mean) * factor + mean).clamp(0, 1)


def saturation_reference(x: Tensor, factor: float, *, torchvision: bool = False) -> Tensor:
    """Scale S of HSV, clipped to 1 (byol), or blend with the gray image (torchvision)."""
    if torchvision:
        return (factor * x + (1 - factor) * gray_reference(x)).clamp(0, 1)
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb(hue, (saturation * factor).clamp(0, 1), value).clamp(0, 1)


def hue_reference(x: Tensor, shift: float) -> Tensor:
    """Rotate H of HSV by `shift` turns."""
    hue, saturation, value = rgb_to_hsv(x)
    return hsv_to_rgb((hue + shift) % 1.0, saturation, value).clamp(0, 1)


def gray_reference(x: Tensor) -> Tensor:
    """Return the luma, (1, S, S)."""
    red, green, blue = params.GRAY_WEIGHTS
    return (red * x[0] + green * x[1] + blue * x[2])[None]


def rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert (3, S, S) in [0, 1] to H in turns, S, V, each (S, S); H and S are 0 for grays."""
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
    """Convert H in turns, S, V, each (S, S), to (3, S, S); the inverse of `rgb_to_hsv`."""
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device)[:, None, None] + 6 * hue) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def blur_reference(x: Tensor, sigma: float) -> Tensor:
    """Apply a separable Gaussian of 2 * blur_radius(S) + 1 taps, with zero padding."""
    radius = params.blur_radius(x.shape[-1])
    d = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    taps = torch.exp(-(d**2) / (2 * sigma**2))
    taps = taps / taps.sum()
    planes = x[:, None]  # (3, 1, S, S)
    planes = torch.nn.functional.conv2d(planes, taps[None, None, :, None], padding=(radius, 0))
    return torch.nn.functional.conv2d(planes, taps[None, None, None, :], padding=(0, radius))[:, 0]


def normalize_reference(x: Tensor) -> Tensor:
    """Normalize (..., 3, S, S) in [0, 1] by ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (params.IMAGENET_MEAN, params.IMAGENET_STD))
    return (x - mean) / std
