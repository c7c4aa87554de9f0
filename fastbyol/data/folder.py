"""Image folders: ROOT/SPLIT/CLASS/*.jpg, or a flat ROOT/SPLIT/*.jpg without labels."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
UNLABELLED = -1


@dataclass(frozen=True)
class ImageFolder:
    """An indexed split: N files in sorted order, each with a class index."""

    root: Path
    paths: list[str]  # N, relative to root
    labels: NDArray[np.int64]  # (N,), UNLABELLED in a flat folder
    classes: list[str]  # sorted names; empty for a flat folder

    def __len__(self) -> int:
        return len(self.paths)

    def spread(self, limit: int) -> "ImageFolder":
        """At most `limit` of the images, evenly spread over the index and so over the classes."""
        if len(self) <= limit:
            return self
        keep = np.linspace(0, len(self) - 1, limit).astype(np.int64)
        return ImageFolder(self.root, [self.paths[i] for i in keep], self.labels[keep], self.classes)

    def read(self, index: int) -> bytes:
        """The file's bytes.

        Raises:
            OSError: it cannot be read.
        """
        handle = os.open(f"{self.root}/{self.paths[index]}", os.O_RDONLY)
        try:
            size = os.fstat(handle).st_size
            data = os.read(handle, size + 1)
            while 0 < len(data) < size and (more := os.read(handle, size + 1 - len(data))):
                data += more
            return data
        finally:
            os.close(handle)


def index_folder(root: str | os.PathLike[str] | None, split: str, *, key: str = "data.root") -> ImageFolder:
    """Lists a split's images by name; no file is opened.

    Args:
        root: the data set's folder.
        split: its sub-folder; '.' is `root` itself.
        key: the config key named in error messages.

    Raises:
        InputError: the folder is missing, unreadable or holds no images.
    """
    if root is None:
        raise InputError(f"{key} is not set: name the folder that holds {split}/")
    base = Path(root) / split
    if not base.is_dir():
        raise InputError(f"{key}={root}: there is no folder {base}")
    try:
        with os.scandir(base) as entries:
            sub_folders, files = [], []
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    sub_folders.append(entry.name)
                elif _is_image(entry.name):
                    files.append(entry.name)
        if files and sub_folders:
            raise InputError(f"{key}={root}: {base} mixes images and class folders; move the images into classes")
        paths, labels, classes = sorted(files), [UNLABELLED] * len(files), []
        for name in sorted(sub_folders):
            inside = sorted(f"{name}/{n}" for n in os.listdir(base / name) if _is_image(n))
            if inside:
                paths += inside
                labels += [len(classes)] * len(inside)
                classes.append(name)
    except OSError as error:
        raise InputError(f"{key}={root}: cannot list {error.filename}: {error.strerror}") from None
    if not paths:
        raise InputError(f"{key}={root}: no images ({', '.join(EXTENSIONS)}) in {base}")
    return ImageFolder(base, paths, np.array(labels, dtype=np.int64), classes)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")
