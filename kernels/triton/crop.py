"""Crop, bicubic resize and horizontal flip on a GPU: decoded images -> the crops of a batch.

Formula and reference: kernels/crop.py. One launch renders all views. A program computes BLOCK
consecutive pixels of one view from the image whose address it reads from a table: 16 neighbors per
pixel, with weights computed from integers, so that they are exact for any image size. All views of
an image read the same decoded pixels.

Reads the crops' pixels from memory once (neighbors come from the caches) and writes 3 bytes per
pixel.

Shapes: B images, V views each, S = side of a view.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 256  # pixels per program
WARPS = 8


@triton.jit
def _near(t):
    return (1.5 * t - 2.5) * t * t + 1.0


@triton.jit
def _far(t):
    return ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0


@triton.jit
def _taps(i, length, size):
    """Return the first tap and the four weights of output pixel i: `length` pixels to `size`."""
    numerator = (2 * i + 1) * length - size
    # floor(numerator / 2 size), since numerator > -2 size.
    first = (numerator + 2 * size) // (2 * size) - 1
    t = (numerator - 2 * size * first).to(tl.float32) / (2 * size).to(tl.float32)
    first -= 1
    w0, w1, w2, w3 = _far(1.0 + t), _near(t), _near(1.0 - t), _far(2.0 - t)
    w0 = tl.where(first >= 0, w0, 0.0)
    w1 = tl.where((first >= -1) & (first + 1 < length), w1, 0.0)
    w2 = tl.where(first + 2 < length, w2, 0.0)
    w3 = tl.where(first + 3 < length, w3, 0.0)
    total = w0 + w1 + w2 + w3
    return first, w0 / total, w1 / total, w2 / total, w3 / total


@triton.jit
def _resize_row(image, row, width, first, length, w0, w1, w2, w3, inside):
    """Return one source row, resized in x: R, G, B in 0 .. 255."""
    r, g, b = 0.0, 0.0, 0.0
    for k in tl.static_range(4):
        w = w0 if k == 0 else (w1 if k == 1 else (w2 if k == 2 else w3))
        column = tl.minimum(tl.maximum(first + k, 0), length - 1)
        at = image + (row * width + column) * 3
        r += w * tl.load(at, mask=inside, other=0).to(tl.float32)
        g += w * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
        b += w * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def crop_kernel(
    images,  # (B,) int64: addresses of uint8 (H, W, 3)
    widths,  # (B,) int64: W
    boxes,  # (V, B, 4) int32: top, left, height, width
    flips,  # (V, B) int32
    out,  # (V, B, S, S, 3) uint8, or a float type for values in [0, 1]
    count,  # B
    size,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one view."""
    n = tl.program_id(1)
    image = tl.load(images + n % count).to(tl.pointer_type(tl.uint8))
    width = tl.load(widths + n % count).to(tl.int32)
    top, left = tl.load(boxes + 4 * n), tl.load(boxes + 4 * n + 1)
    box_height, box_width = tl.load(boxes + 4 * n + 2), tl.load(boxes + 4 * n + 3)
    pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < size * size
    y, x = pixels // size, pixels % size
    x = tl.where(tl.load(flips + n) != 0, size - 1 - x, x)
    first_x, x0, x1, x2, x3 = _taps(x, box_width, size)
    first_y, y0, y1, y2, y3 = _taps(y, box_height, size)
    corner = image + (top * width + left).to(tl.int64) * 3
    red, green, blue = 0.0, 0.0, 0.0
    for k in tl.static_range(4):
        w = y0 if k == 0 else (y1 if k == 1 else (y2 if k == 2 else y3))
        row = tl.minimum(tl.maximum(first_y + k, 0), box_height - 1)
        r, g, b = _resize_row(corner, row, width, first_x, box_width, x0, x1, x2, x3, inside)
        red += w * r
        green += w * g
        blue += w * b
    pointer = out + (n.to(tl.int64) * size * size + pixels) * 3
    _store(pointer, red, inside)
    _store(pointer + 1, green, inside)
    _store(pointer + 2, blue, inside)


@triton.jit
def _store(pointer, x, inside):
    """Clip to [0, 255] and store: rounded to uint8, or as a float in [0, 1]."""
    x = tl.minimum(tl.maximum(x, 0.0), 255.0)
    if pointer.dtype.element_ty == tl.uint8:
        tl.store(pointer, (x + 0.5).to(tl.uint8), mask=inside)
    else:
        tl.store(pointer, (x / 255.0).to(pointer.dtype.element_ty), mask=inside)


def crop_views(
    images: Sequence[Tensor],
    boxes: NDArray[np.int32],
    flips: NDArray[np.bool_],
    size: int,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """Compute `crop_reference` of all views of a batch in one launch.

    Args:
        images: B decoded images on one device, contiguous uint8 (H, W, 3), of any size.
        boxes: (B, V, 4): top, left, height, width, inside their images.
        flips: (B, V).
        size: S.
        dtype: uint8 (rounded), or a float dtype for values in [0, 1].

    Returns:
        (V * B, S, S, 3): view v of image i at index v B + i.

    Raises:
        ValueError: An image is not contiguous uint8 (H, W, 3), or a box reaches outside its image.
    """
    count, views = flips.shape
    for i, image in enumerate(images):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.is_contiguous():
            raise ValueError(f"image {i} is not contiguous uint8 (H, W, 3): {image.dtype} {tuple(image.shape)}")
    shapes = np.array([image.shape[:2] for image in images]).reshape(count, 1, 2)
    corners, sides = boxes[..., :2], boxes[..., 2:]
    invalid = ((corners < 0) | (sides < 1) | (corners + sides > shapes)).any(-1)
    if invalid.any():
        i, v = np.argwhere(invalid)[0]
        raise ValueError(f"crop box {boxes[i, v].tolist()} is not inside image {i} of {tuple(images[i].shape[:2])}")
    device = images[0].device
    table = torch.tensor([[image.data_ptr(), image.shape[1]] for image in images], dtype=torch.int64).T.contiguous()
    boxes_flips = np.concatenate([boxes.transpose(1, 0, 2), flips.T[..., None]], axis=-1).astype(np.int32)
    table, boxes_flips = (_to_device(x, device) for x in (table, torch.from_numpy(boxes_flips)))
    out = torch.empty(views * count, size, size, 3, dtype=dtype, device=device)
    crop_kernel[(triton.cdiv(size * size, BLOCK), views * count)](
        table[0],
        table[1],
        boxes_flips[..., :4].contiguous(),
        boxes_flips[..., 4].contiguous(),
        out,
        count,
        size,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
