"""`fastbyol preview`: draws training images and both augmented views of each."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastbyol.config import Config
from fastbyol.data import Images, find_images, views
from fastbyol.data.decode import BadImage, decode
from fastbyol.errors import InputError
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime.files import check_output, check_replaceable, write_output
from fastbyol.runtime.logging import logger
from fastbyol.tools.plots import image_title, to_png

IMAGES = 8
_MAX_TRIED = 4 * IMAGES  # images read to find IMAGES readable ones
_COLUMNS = 4
_PNG_SIGNATURE = b"\x89PNG"
_JITTER = ("brightness", "contrast", "saturation", "hue")


def write_preview(config: Config, out: Path) -> str:
    """Draw the first images of the run's first epoch, with the exact views of the run.

    Notes on the data set are logged as warnings.

    Args:
        config: The run's config.
        out: The PNG file to write. Only a PNG or an empty file is overwritten.

    Returns:
        One line that names the file and the data set.

    Raises:
        InputError: No image can be read, or `out` cannot be written.
        RunError: Writing `out` failed.
    """
    check_output(out, f"--out {out}")
    check_replaceable(out, f"--out {out}", _PNG_SIGNATURE, "a PNG file")
    images = find_images(config.data, "train")
    for note in images.notes:
        logger.warning(note)
    write_output(out, draw_views(config, images), f"--out {out}")
    return f"{out}: {IMAGES} images of {images.root} and both views of each"


def draw_views(config: Config, images: Images) -> bytes:
    """Draw the grid of images and views.

    Returns:
        The grid as PNG.

    Raises:
        InputError: None of the first images can be read.
    """
    order = views.epoch_order(config.seed, 0, len(images))
    positions, originals = _first_readable(images, order[:_MAX_TRIED])
    shapes = [original.shape[:2] for original in originals]
    params = views.sample(config.data.augmentation, config.seed, 0, positions, shapes)
    tensors = [torch.from_numpy(original) for original in originals]
    augmented = views.apply_reference(tensors, params, config.data.image_size_px)  # (views, N, 3, S, S)
    rows = -(-len(originals) // _COLUMNS)
    figure = Figure(figsize=(3.6 * _COLUMNS, 6.6 * rows), layout="constrained")
    grid = figure.subplots(3 * rows, _COLUMNS, squeeze=False)  # an image takes three rows of one column
    for axis in grid.flat:
        axis.axis("off")
    for i, original in enumerate(originals):
        height, width = original.shape[:2]
        name = image_title(images.name(order[positions[i]]))
        cells = [(original, f"{name}\n{width}x{height}")]
        cells += [(to_pixels(augmented[v, i]), _describe(params, i, v)) for v in range(views.VIEWS)]
        top, column = 3 * (i // _COLUMNS), i % _COLUMNS
        for axis, (pixels, title) in zip(grid[top : top + 3, column], cells, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set_title(title, fontsize=9)
    return to_png(figure)


def _first_readable(images: Images, order: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """Return the first readable images: positions in `order`, and pixels.

    Training skips unreadable images too.

    Raises:
        InputError: No image can be read.
    """
    positions, originals = [], []
    for position, index in enumerate(order):
        try:
            originals.append(decode(images.read(int(index))))
        except (OSError, BadImage):
            continue
        positions.append(position)
        if len(originals) == IMAGES:
            break
    if not originals:
        raise InputError(f"{images.root}: none of the first {len(order)} images can be read")
    return positions, originals


def to_pixels(view: torch.Tensor) -> NDArray[np.uint8]:
    """Convert a normalized view, shape (3, S, S), to uint8 pixels, shape (S, S, 3)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((view.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _describe(params: views.ViewParams, i: int, v: int) -> str:
    """Return the parameters of view `v` of image `i`, one line per kind of operation."""
    top, left, height, width = params.box[i, v]
    lines = [f"view {v + 1}: {width}x{height}+{left}+{top}{' flip' if params.flip[i, v] else ''}"]
    if params.jitter[i, v]:
        strengths = [getattr(params, name)[i, v] for name in _JITTER]
        lines.append(" ".join(f"{_JITTER[op][0]}{strengths[op]:+.2f}" for op in params.order[i, v]))
    others = [f"blur {params.sigma[i, v]:.2f}"] if params.blur[i, v] else []
    others += [name for name in ("gray", "solarize") if getattr(params, name)[i, v]]
    if others:
        lines.append(" ".join(others))
    return "\n".join(lines)
