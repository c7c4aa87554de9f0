"""Crop, bicubic resize and horizontal flip of one decoded image.

Formula: output pixel i of S samples the crop (length L) at x = (i + 0.5) L / S - 0.5. With
f = floor(x) and t = x - f, the taps f-1 .. f+2 have the weights k(1+t), k(t), k(1-t), k(2-t) of
Keys' cubic with a = -0.5,

    k(x) = 1.5 x^3 - 2.5 x^2 + 1                x < 1
    k(x) = -0.5 x^3 + 2.5 x^2 - 4 x + 2    1 <= x < 2.

Taps outside the crop are dropped and the remaining weights are divided by their sum. No
antialiasing. The result is clipped to [0, 1]. This is tf.image.resize(method="bicubic") on a
decoded crop, as in the authors' code.

`crop_into` (cpu/crop.py) renders one view on the CPU; `triton.crop.crop_views` renders all views of
a batch on a GPU.

Shapes: H, W = source image; S = side of the output.
"""

import torch
from torch import Tensor

from fastbyol.kernels.cpu.crop import CropScratch, crop_into, random_resized_crop  # noqa: F401 (re-exported)


def crop_reference(image: Tensor, box: tuple[int, int, int, int], *, flip: bool, size: int) -> Tensor:
    """Return one view of one image, in float32.

    Args:
        image: uint8 (H, W, 3).
        box: Top, left, height, width in pixels, inside the image.
        flip: Mirror left-right.
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
    """Return the indices (S, 4) and weights (S, 4) of the formula above."""
    x = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5
    index = x.floor()[:, None] + torch.arange(-1, 3)
    distance = (x[:, None] - index).abs()
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, far) * ((index >= 0) & (index < length))
    return index.clamp(0, length - 1).long(), (weight / weight.sum(1, keepdim=True)).float()
