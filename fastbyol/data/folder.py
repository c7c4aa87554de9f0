"""Image folders: ROOT/SPLIT/CLASS/*.jpg, or a flat ROOT/SPLIT/*.jpg without labels.

The index of a large folder is cached, since listing a million files takes minutes on a network disk. It holds the time of
last change of the folder and of every class folder, which any added, removed or renamed file changes.
"""

import hashlib
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.images import UNLABELLED, ImageSet
from fastbyol.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
CACHE_FROM_IMAGES = 20_000  # a smaller folder is listed in less than 0.1 s
_SETTLED_NS = 2_000_000_000  # a folder changed this recently may change again without its time changing: not cached


@dataclass(frozen=True, eq=False)
class ImageFolder(ImageSet):
    """An indexed split: N files in sorted order, each with a class index."""

    root: Path
    paths: list[str]  # N, relative to root
    labels: NDArray[np.int64]  # (N,), UNLABELLED in a flat folder
    classes: list[str]  # sorted names; empty for a flat folder

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

    def name(self, index: int) -> str:
        """The file's path below the folder."""
        return self.paths[index]

    def take(self, keep: NDArray[np.int64]) -> "ImageFolder":
        """The files at `keep`."""
        return replace(self, paths=[self.paths[i] for i in keep], labels=self.labels[keep])

    def relabel(self, labels: NDArray[np.int64], classes: list[str]) -> "ImageFolder":
        """The same files with other labels."""
        return replace(self, labels=labels, classes=classes)


def index_folder(base: Path, *, key: str = "data.root") -> ImageFolder:
    """Lists a split's images by name; no file is opened.

    Args:
        base: the split's folder.
        key: the config key named in error messages.

    Raises:
        InputError: the folder is unreadable, mixes images and class folders, or holds no images.
    """
    try:
        found = _cached(base)
        if found is None:
            began = time.time_ns()
            found, folders = _list(base, key)
            if len(found) >= CACHE_FROM_IMAGES and all(t < began - _SETTLED_NS for t in folders.values()):
                with suppress(OSError):  # without a cache the next start lists the folder again
                    _keep(found, folders)
    except OSError as error:
        raise InputError(f"{key}: cannot list {error.filename}: {error.strerror}") from None
    return found


def _list(base: Path, key: str) -> tuple[ImageFolder, dict[str, int]]:
    """The images, and for the folder ('') and each folder in it the time of last change before it was listed."""
    folders = {"": base.stat().st_mtime_ns}
    files: list[str] = []
    with os.scandir(base) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders[entry.name] = entry.stat().st_mtime_ns
            elif _is_image(entry.name):
                files.append(entry.name)
    if files and len(folders) > 1:
        raise InputError(f"{key}: {base} mixes images and class folders; move the images into classes")
    paths, classes, counts = sorted(files), list[str](), list[int]()
    for name in sorted(folders.keys() - {""}):
        inside = [f"{name}/{n}" for n in sorted(os.listdir(base / name)) if _is_image(n)]
        if inside:
            paths += inside
            counts.append(len(inside))
            classes.append(name)
    if not paths:
        raise InputError(f"{key}: no images ({', '.join(EXTENSIONS)}) in {base} or its folders")
    labels = np.repeat(np.arange(len(classes)), counts) if classes else np.full(len(paths), UNLABELLED, dtype=np.int64)
    return ImageFolder(base, paths, labels, classes), folders


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _cache_file(base: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "fastbyol" / f"index-{hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:24]}.npz"


def _keep(found: ImageFolder, folders: dict[str, int]) -> None:
    file = _cache_file(found.root)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with open(handle, "wb") as out:
            np.savez(
                out,
                paths=_pack_names(found.paths),
                labels=found.labels,
                classes=_pack_names(found.classes),
                folders=_pack_names(list(folders)),
                times=np.array(list(folders.values()), dtype=np.int64),
            )
        os.replace(name, file)
    except BaseException:
        Path(name).unlink()
        raise


def _cached(base: Path) -> ImageFolder | None:
    """The cached index, if there is one and no folder has changed since."""
    try:
        with np.load(_cache_file(base), allow_pickle=False) as kept:
            folders = _unpack_names(kept["folders"])
            if kept["times"].tolist() != list(_times(base, folders)):
                return None
            paths, labels = _unpack_names(kept["paths"]), kept["labels"]
            classes = _unpack_names(kept["classes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none yet, or cut off: it is made again
        return None
    return ImageFolder(base, paths, labels, classes) if len(paths) == len(labels) else None


def _times(base: Path, folders: list[str]) -> Iterator[int]:
    for name in folders:
        yield (base / name).stat().st_mtime_ns


def _pack_names(names: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)


def _unpack_names(packed: NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(packed.tobytes()).split("\0") if len(packed) else []
