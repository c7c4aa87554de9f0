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

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

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


class CropScratch:
    """A thread's working memory for `crop_into` at one output size."""

    def __init__(self, size: int) -> None:
        self.index = np.empty((2, size, 4), dtype=np.int32)
        self.weight = np.empty((2, size, 4), dtype=np.float32)
        self.row = np.empty(4096, dtype=np.float32)

    def for_width(self, width: int) -> NDArray[np.float32]:
        """One row of `width` RGB pixels; grows, never shrinks."""
        if len(self.row) < 3 * width:
            self.row = np.empty(3 * width, dtype=np.float32)
        return self.row


def crop_into(
    image: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    flip: bool,
    out: NDArray[np.float32],
    scratch: CropScratch,
) -> None:
    """`crop_reference` on the CPU, without the GIL: writes the view to out (3, S, S), float32 in [0, 1].

    Args:
        image: uint8 (H, W, 3), C-contiguous.

    Raises:
        ValueError: the box is empty or reaches outside the image (the kernel itself checks no index).
    """
    top, left, height, width = box
    if not (0 <= top and 0 <= left and 0 < height <= image.shape[0] - top and 0 < width <= image.shape[1] - left):
        raise ValueError(f"crop box {box} is not inside an image of {image.shape[:2]}")
    row = scratch.for_width(width)
    _crop(image, top, left, height, width, flip, scratch.index, scratch.weight, row, out)


@njit(**_JIT)
def _taps(length, size, index, weight):
    """Fills index (S, 4) and weight (S, 4) of the formula at the top."""
    for i in range(size):
        x = (i + 0.5) * length / size - 0.5
        f = math.floor(x)
        total = 0.0
        t = x - f
        w = (
            ((-0.5 * (1 + t) + 2.5) * (1 + t) - 4) * (1 + t) + 2,
            (1.5 * t - 2.5) * t * t + 1,
            (1.5 * (1 - t) - 2.5) * (1 - t) * (1 - t) + 1,
            ((-0.5 * (2 - t) + 2.5) * (2 - t) - 4) * (2 - t) + 2,
        )
        for k in range(4):
            if 0 <= f - 1 + k < length:
                total += w[k]
        for k in range(4):
            inside = 0 <= f - 1 + k < length
            index[i, k] = min(max(f - 1 + k, 0), length - 1)
            weight[i, k] = w[k] / total if inside else 0.0


@njit(**_JIT)
def _crop(image, top, left, height, width, flip, index, weight, row, out):
    """Vertical pass into one float row (contiguous in source and row), then the horizontal pass of that row."""
    size = out.shape[1]
    _taps(height, size, index[0], weight[0])
    _taps(width, size, index[1], weight[1])
    scale = np.float32(1 / 255)
    zero, one = np.float32(0), np.float32(1)
    n = 3 * width
    flat = image.reshape(image.shape[0], image.shape[1] * 3)
    for i in range(size):
        row0 = flat[top + index[0, i, 0], 3 * left : 3 * left + n]
        row1 = flat[top + index[0, i, 1], 3 * left : 3 * left + n]
        row2 = flat[top + index[0, i, 2], 3 * left : 3 * left + n]
        row3 = flat[top + index[0, i, 3], 3 * left : 3 * left + n]
        w0, w1 = weight[0, i, 0] * scale, weight[0, i, 1] * scale
        w2, w3 = weight[0, i, 2] * scale, weight[0, i, 3] * scale
        for x in range(n):
            row[x] = (
                w0 * np.float32(row0[x])
                + w1 * np.float32(row1[x])
                + w2 * np.float32(row2[x])
                + w3 * np.float32(row3[x])
            )
        for j in range(size):
            w0, w1, w2, w3 = weight[1, j, 0], weight[1, j, 1], weight[1, j, 2], weight[1, j, 3]
            x0, x1 = 3 * index[1, j, 0], 3 * index[1, j, 1]
            x2, x3 = 3 * index[1, j, 2], 3 * index[1, j, 3]
            target = size - 1 - j if flip else j
            for c in range(3):
                value = w0 * row[x0 + c] + w1 * row[x1 + c] + w2 * row[x2 + c] + w3 * row[x3 + c]
                out[c, i, target] = min(max(value, zero), one)
