"""A picture of what the augmentation does: originals and both views of a few images, with the parameters drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastbyol.config import Config
from fastbyol.data import ImageSet, find_images, views
from fastbyol.data.decode import BadImage, decode
from fastbyol.errors import InputError
from fastbyol.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime.files import check_output, write_output
from fastbyol.tools.plots import title, to_png

IMAGES = 8
_PNG = b"\x89PNG"
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def write_preview(config: Config, out: Path, say: Callable[[str], None]) -> str:
    """Draws the first images that epoch 0 of this config visits, exactly as the run will see them.

    Returns:
        one line saying what was written, and one for each note on the images.

    Raises:
        InputError: no images, none readable, or no file can be written at `out`.
        RunError: `out` could not be written in the end.
    """
    check_output(out, f"--out {out}")
    if out.is_file() and not _is_ours(out):
        raise InputError(f"--out {out}: exists and is no PNG file: it is not overwritten; name another file")
    folder = find_images(config.data, "train")
    for note in folder.notes:
        say(f"warning: {note}")
    write_output(out, draw_views(config, folder), f"--out {out}")
    return f"{out}: {IMAGES} images of {folder.root} and both views of each"


def _is_ours(out: Path) -> bool:
    """Whether a file may be replaced by a picture: it is empty or a PNG."""
    with out.open("rb") as file:
        return file.read(len(_PNG)) in (b"", _PNG)


def draw_views(config: Config, folder: ImageSet) -> bytes:
    """The grid as PNG.

    Raises:
        InputError: fewer than one image can be read.
    """
    order = views.epoch_order(config.seed, 0, len(folder))
    positions, images = [], []
    for position, index in enumerate(order[: 4 * IMAGES]):
        try:
            images.append(decode(folder.read(int(index))))
            positions.append(position)
        except (OSError, BadImage):  # the run names and skips these; a preview shows the others
            continue
        if len(images) == IMAGES:
            break
    if not images:
        raise InputError(f"{folder.root}: none of the first {min(len(order), 4 * IMAGES)} images can be read")
    size = config.data.image_size_px
    params = views.sample(config.data.augmentation, config.seed, 0, positions, [image.shape[:2] for image in images])
    pictures = views.apply_reference([torch.from_numpy(image) for image in images], params, size)
    columns = 4
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.6 * columns, 6.6 * rows), layout="constrained")
    grid = figure.subplots(3 * rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.axis("off")
    for i, image in enumerate(images):
        top, column = 3 * (i // columns), i % columns
        for v, picture in enumerate((image, to_pixels(pictures[0, i]), to_pixels(pictures[1, i]))):
            axis = grid[top + v, column]
            axis.imshow(picture, interpolation="nearest")
            name = title(folder.name(order[positions[i]]))
            original = f"{name}\n{image.shape[1]}x{image.shape[0]}"
            axis.set_title(original if v == 0 else _describe(params, i, v - 1), fontsize=7)
    return to_png(figure)


def to_pixels(view: torch.Tensor) -> NDArray[np.uint8]:
    """A normalized view (3, S, S) -> (S, S, 3) uint8."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((view.float() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def _describe(params: views.ViewParams, i: int, v: int) -> str:
    top, left, height, width = params.box[i, v]
    text = f"view {v + 1}: {width}x{height}+{left}+{top}{' flip' if params.flip[i, v] else ''}"
    if params.jitter[i, v]:
        values = [getattr(params, name)[i, v] for name in _OPERATIONS]
        text += "\n" + " ".join(f"{_OPERATIONS[op][0]}{values[op]:+.2f}" for op in params.order[i, v])
    extras = [name for name in ("gray", "solarize") if getattr(params, name)[i, v]]
    if params.blur[i, v]:
        extras.insert(0, f"blur {params.sigma[i, v]:.2f}")
    return text + ("\n" + " ".join(extras) if extras else "")
