"""Read the images and text files of VOC and COCO folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data.decode import BadImage, decode
from fastbyol.data.folder import ImageFolder
from fastbyol.data.images import UNLABELED
from fastbyol.errors import InputError, RunError, error_reason, join_names
from fastbyol.runtime.logging import logger


def read_pixels(file: Path) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3).

    Raises:
        RunError: it cannot be read or decoded.
    """
    try:
        return decode(file.read_bytes())
    except (OSError, ValueError, BadImage) as error:  # ValueError: a null character in the name
        raise RunError(f"{file}: {error_reason(error)}; fix it or remove it from the lists") from None


def image_size(file: Path) -> tuple[int, int]:
    """Return (height, width) of an image.

    Decodes the whole file, so that a truncated one is found before the training, not during it.

    Raises:
        InputError: it cannot be read or decoded.
    """
    try:
        height, width, _ = read_pixels(file).shape
    except RunError as error:
        raise InputError(str(error)) from None
    return height, width


def resize(pixels: NDArray[np.uint8], height: int, width: int, *, labels: bool = False) -> NDArray[np.uint8]:
    """Resize an image (H, W, 3) by antialiased bicubic, or a mask (H, W) by nearest neighbor."""
    method = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((width, height), method))


def read_text(file: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a text file in UTF-8") from None


def path_spellings(name: str) -> list[str]:
    """Return the paths that a listed file name may stand for, in order of preference.

    They are the name itself, the path of a file: URL, and a Windows path with forward slashes.
    """
    found = [name]
    if name.lower().startswith("file:"):
        found.append(unquote(urlsplit(name).path))
    if "\\" in name:
        found.append(name.replace("\\", "/"))
    return found


def unlabeled_set(files: Sequence[Path]) -> ImageFolder:
    """Return files from any folders as a set of images without labels."""
    absolute = [file.absolute() for file in files]
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    paths = [str(file.relative_to(root)) for file in absolute]
    return ImageFolder(root, paths, np.full(len(paths), UNLABELED, dtype=np.int64), [])


def warn_absent_classes(kind: str, names: Sequence[str], seen: dict[str, set[int]], consequence: str) -> None:
    """Log the classes that a split has no annotation of, one line per split.

    Args:
        kind: of annotation, "pixel" or "box".
        names: of the classes 0 .. K - 1.
        seen: split -> classes that occur in it.
        consequence: of absence from the validation split.
    """
    for split, classes in seen.items():
        absent = [name for k, name in enumerate(names) if k not in classes]
        if absent:
            effect = f": {consequence}" if split == "val" else ""
            logger.warning(f"{split} has no {kind} of {join_names(absent)} ({len(absent)} of {len(names)}){effect}")
