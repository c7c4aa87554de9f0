"""Image folders: ROOT/SPLIT/CLASS/**/*.jpg, or ROOT/SPLIT/*.jpg without classes.

The index of a large folder is cached, since listing a million files takes minutes on a network
disk. The cache stores the modification time of every listed folder, which adding, removing or
renaming a file changes.
"""

import hashlib
import os
import re
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.decode import EXTENSIONS
from fastbyol.data.images import UNLABELED, Images, number_classes, pack_names
from fastbyol.errors import InputError, join_names, printable
from fastbyol.runtime.caches import own_folder
from fastbyol.runtime.files import atomic_write

CACHE_FROM_IMAGES = 20_000  # a smaller folder is listed in less than 0.1 s
_SETTLED_NS = 2_000_000_000  # a folder modified more recently may change again within its time stamp: not cached
_CACHE_FORMAT = f"2 {' '.join(EXTENSIONS)}"  # other versions of Pillow may read other files
_IMAGE_EXTENSIONS = frozenset(extension[1:] for extension in EXTENSIONS)
# Folders of operating systems and file servers, partly full of thumbnails; the names of others
# begin with a dot.
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_SPLIT_NAME = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?)(\W|_)*(set|split|data|images|\d+)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ImageFolder(Images):
    """The N files of a split in sorted order, each with a class index."""

    root: Path
    paths: list[str]  # N, relative to root
    labels: NDArray[np.int64]  # (N,), UNLABELED in a flat folder
    classes: list[str]  # sorted names, in Unicode's composed form (NFC); empty for a flat folder
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        """Return the file's bytes.

        Raises:
            OSError: the file cannot be read.
        """
        # A link may point to a pipe, where a blocking open would wait for a writer; it reads as an
        # empty file.
        handle = os.open(f"{self.root}/{self.paths[index]}", os.O_RDONLY | os.O_NONBLOCK)
        try:
            size = os.fstat(handle).st_size
            data = os.read(handle, size + 1)
            while 0 < len(data) < size and (more := os.read(handle, size + 1 - len(data))):
                data += more
            return data
        finally:
            os.close(handle)

    def name(self, index: int) -> str:
        """Return the file's path relative to the folder."""
        return self.paths[index]

    def subset(self, indices: NDArray[np.int64]) -> "ImageFolder":
        """Return the files at `indices`."""
        return replace(self, paths=[self.paths[i] for i in indices], labels=self.labels[indices])

    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> "ImageFolder":
        """Return the same files with other labels."""
        return replace(self, labels=labels, classes=classes)

    def _identity(self, members: NDArray[np.int64]) -> bytes:
        return pack_names([self.paths[i] for i in members.tolist()])


def index_folder(base: Path, *, key: str = "data.root") -> ImageFolder:
    """List a split's images by class and path, including folders below a class. No file is opened.

    Links to folders are followed, but no folder is listed twice for a class. Hidden files and
    folders are skipped. The set's notes tell what was left out.

    Args:
        base: the split's folder.
        key: config key for error messages.

    Raises:
        InputError: there are no images, a folder is unreadable, images are mixed with class
            folders, or the folders are splits.
    """
    try:
        images = _read_cache(base)
        if images is None:
            start = time.time_ns()
            images, folders = _list(base, key)
            if len(images) >= CACHE_FROM_IMAGES and all(t < start - _SETTLED_NS for t in folders.values()):
                with suppress(OSError):  # without a cache the next start lists the folder again
                    _write_cache(images, folders)
    except OSError as error:
        raise InputError(f"{key}: cannot list {error.filename}: {error.strerror}") from None
    return images


def is_split_name(name: str) -> bool:
    """Return True for names of splits: train, Validation, test2017, train_set, ..."""
    return _SPLIT_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class _Listing:
    """State of listing one split."""

    base: str
    folders: dict[str, int]  # path below base -> modification time before it was listed, in ns
    left_out: Counter[str]  # extension or kind -> files

    def images(self, folder: str, seen: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
        """Return the paths of a folder's images and subfolders; nothing if it is in `seen`."""
        path = f"{self.base}/{folder}" if folder else self.base
        status = Path(path).stat()
        if (status.st_dev, status.st_ino) in seen:
            return [], []
        seen.add((status.st_dev, status.st_ino))
        self.folders[folder] = status.st_mtime_ns
        prefix = f"{folder}/" if folder else ""
        images, subfolders = list[str](), list[str]()
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    if name != ".DS_Store" and not name.startswith("._"):  # written by macOS next to every file
                        self.left_out[f"hidden folder {name}" if _is_folder(entry) else "hidden"] += 1
                    continue
                _, dot, extension = name.rpartition(".")
                is_image = dot and extension.lower() in _IMAGE_EXTENSIONS
                # A link with an image's name counts as an image: resolving each is slow on a
                # network disk.
                if is_image and (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                    images.append(prefix + name)
                elif _is_folder(entry):
                    if name not in _SYSTEM_FOLDERS:
                        subfolders.append(prefix + name)
                    else:
                        self.left_out[f"folder {name}"] += 1
                elif is_image:
                    self.left_out["pipe, socket or device"] += 1
                else:
                    self.left_out[f".{extension.lower()}" if dot and extension.isalnum() else "without extension"] += 1
        return images, subfolders

    def images_below(self, folder: str, seen: set[tuple[int, int]]) -> list[str]:
        """Return the sorted paths of all images below a folder; folders in `seen` are skipped."""
        paths, pending = list[str](), [folder]
        while pending:
            images, subfolders = self.images(pending.pop(), seen)
            paths += images
            pending += sorted(subfolders, reverse=True)
        return sorted(paths)


def _list(base: Path, key: str) -> tuple[ImageFolder, dict[str, int]]:
    """Return the images, and folder -> modification time before listing ('' is the split)."""
    listing = _Listing(str(base), {}, Counter())
    seen = set[tuple[int, int]]()
    top, subfolders = listing.images("", seen)
    by_folder = {name: listing.images_below(name, set(seen)) for name in sorted(subfolders)}
    names = [name for name, images in by_folder.items() if images]
    empty = [name for name, images in by_folder.items() if not images]
    if top and names:
        raise InputError(
            f"{key}: {base} mixes images ({join_names(sorted(top))}) and class folders ({join_names(names)}): move the images into a "
            "class folder, or the folders elsewhere"
        )
    if names and all(map(is_split_name, names)):
        raise InputError(f"{key}: {base} holds splits ({join_names(names)}), not classes: name one of them")
    paths = sorted(top)
    for images in by_folder.values():
        paths += images
    if not paths:
        raise InputError(f"{key}: no images in {base} or its folders: {_explain_no_images(listing.left_out)}")
    classes, numbers = number_classes(names)
    counts = [len(by_folder[name]) for name in names]
    labels = np.repeat(numbers, counts) if names else np.full(len(paths), UNLABELED, dtype=np.int64)
    remarks = list[str]()
    if listing.left_out:
        remarks.append(f"left out: {_format_counts(listing.left_out)}")
    if empty:
        remarks.append(f"folders without an image: {join_names(empty)}")
    if len(classes) < len(names):
        merged = [name for name, number in zip(names, numbers, strict=True) if (numbers == number).sum() > 1]
        remarks.append(f"folders whose names differ only in Unicode's normal form are one class: {join_names(merged)}")
    notes = (printable(f"{base}: {'; '.join(remarks)}"),) if remarks else ()
    return ImageFolder(base, paths, labels, classes, notes), listing.folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():  # circular, or its target is not accessible
            return False
        raise


def _explain_no_images(left_out: Counter[str]) -> str:
    """Return what a folder without images holds, and what to do."""
    if not left_out:
        return "they hold no files; name the folder that holds the images"
    if left_out.keys() & {".zip", ".tar", ".tgz", ".gz", ".rar", ".7z"}:
        remedy = "unpack the archives"
    else:
        remedy = "convert them, or name the folder that holds the images"
    formats = "JPEG, PNG, TIFF, WebP, GIF and the other formats that Pillow decodes"
    return f"they hold {_format_counts(left_out)}; fastbyol reads {formats}: {remedy}"


def _format_counts(left_out: Counter[str], most: int = 5) -> str:
    """Return text like "12 .heic, 3 .txt"."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in ranked[most:])
    return ", ".join(f"{count} {kind}" for kind, count in ranked[:most]) + (f", {others} others" if others else "")


def _cache_file(base: Path) -> Path | None:
    """Return the path of a folder's cache; None if there is no home folder."""
    folder = own_folder()
    digest = hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:24]
    return None if folder is None else folder / f"index-{digest}.npz"


def _write_cache(images: ImageFolder, folders: dict[str, int]) -> None:
    file = _cache_file(images.root)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            format=np.array(_CACHE_FORMAT),
            paths=_pack_array(images.paths),
            labels=images.labels,
            classes=_pack_array(images.classes),
            notes=_pack_array(images.notes),
            folders=_pack_array(folders),
            times=np.array(list(folders.values()), dtype=np.int64),
        )


def _read_cache(base: Path) -> ImageFolder | None:
    """Return the cached index if there is one and no folder has changed since."""
    file = _cache_file(base)
    if file is None:
        return None
    try:
        with np.load(file, allow_pickle=False) as cache:
            if cache["format"].item() != _CACHE_FORMAT:
                return None
            if cache["times"].tolist() != list(_modification_times(base, _unpack_names(cache["folders"]))):
                return None
            paths, classes, notes = (_unpack_names(cache[name]) for name in ("paths", "classes", "notes"))
            images = ImageFolder(base, paths, cache["labels"], classes, tuple(notes))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):  # missing or damaged
        return None
    return images if len(images.paths) == len(images.labels) else None


def _modification_times(base: Path, folders: list[str]) -> Iterator[int]:
    for name in folders:
        yield (base / name).stat().st_mtime_ns


def _pack_array(names: Iterable[str]) -> NDArray[np.uint8]:
    return np.frombuffer(pack_names(names), dtype=np.uint8)


def _unpack_names(packed: NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(packed.tobytes()).split("\0")[:-1]
