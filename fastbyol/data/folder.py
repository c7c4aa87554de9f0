"""Image folders: ROOT/SPLIT/CLASS/**/*.jpg, a class being a folder of the first level, or a flat ROOT/SPLIT/*.jpg without labels.

The index of a large folder is cached, since listing a million files takes minutes on a network disk. It holds the time of
last change of every folder listed, which any added, removed or renamed file changes.
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
from fastbyol.data.images import UNLABELED, ImageSet, number_classes
from fastbyol.errors import InputError, join_names, printable
from fastbyol.runtime.files import atomic_write

CACHE_FROM_IMAGES = 20_000  # a smaller folder is listed in less than 0.1 s
_SETTLED_NS = 2_000_000_000  # a folder changed this recently may change again without its time changing: not cached
_FORMAT = f"2 {' '.join(EXTENSIONS)}"  # of the cache; another Pillow may read other files
_READ = frozenset(extension[1:] for extension in EXTENSIONS)
# Folders that operating systems and file servers make, some of them full of thumbnails; '.' begins the others' names.
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
_SPLIT_NAME = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?)(\W|_)*(set|split|data|images|\d+)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class ImageFolder(ImageSet):
    """An indexed split: N files in sorted order, each with a class index."""

    root: Path
    paths: list[str]  # N, relative to root
    labels: NDArray[np.int64]  # (N,), UNLABELED in a flat folder
    classes: list[str]  # sorted names, in Unicode's composed form (NFC); empty for a flat folder
    notes: tuple[str, ...] = ()

    def read(self, index: int) -> bytes:
        """The file's bytes.

        Raises:
            OSError: it cannot be read.
        """
        # A link may lead to a pipe, for whose writer a plain open would wait; it reads as an empty file.
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
        """The file's path below the folder."""
        return self.paths[index]

    def take(self, keep: NDArray[np.int64]) -> "ImageFolder":
        """The files at `keep`."""
        return replace(self, paths=[self.paths[i] for i in keep], labels=self.labels[keep])

    def relabel(self, labels: NDArray[np.int64], classes: list[str]) -> "ImageFolder":
        """The same files with other labels."""
        return replace(self, labels=labels, classes=classes)

    def _contents(self, members: NDArray[np.int64]) -> bytes:
        return _pack_names([self.paths[i] for i in members.tolist()])


def index_folder(base: Path, *, key: str = "data.root") -> ImageFolder:
    """Lists a split's images by class and path, in folders below a class too; no file is opened.

    Links to folders are followed, but no folder is listed twice for a class. Hidden files and folders are passed over. What is
    left out is said in the set's notes.

    Args:
        base: the split's folder.
        key: the config key named in error messages.

    Raises:
        InputError: there are no images, a folder is unreadable, images lie beside class folders, or the folders are splits.
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


def is_split_name(name: str) -> bool:
    """Whether a folder or file of this name is rather a split than a class: train, Validation, test2017, train_set, ..."""
    return _SPLIT_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class _Listing:
    """Collects what is met on the way."""

    base: str
    folders: dict[str, int]  # path below base -> time of last change before it was listed, in ns
    left_out: Counter[str]  # extension or kind -> files

    def images(self, folder: str, seen: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
        """Paths below `base` of the images and of the folders right in a folder; none of a folder that is in `seen`."""
        path = f"{self.base}/{folder}" if folder else self.base
        state = Path(path).stat()
        if (state.st_dev, state.st_ino) in seen:
            return [], []
        seen.add((state.st_dev, state.st_ino))
        self.folders[folder] = state.st_mtime_ns
        prefix = f"{folder}/" if folder else ""
        images, below = list[str](), list[str]()
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    if name != ".DS_Store" and not name.startswith("._"):  # macOS's own, beside every file
                        self.left_out[f"hidden folder {name}" if _is_folder(entry) else "hidden"] += 1
                    continue
                _, dot, extension = name.rpartition(".")
                is_image = dot and extension.lower() in _READ
                # A link with an image's name is taken for one, since asking where each leads takes long on a network disk.
                if is_image and (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
                    images.append(prefix + name)
                elif _is_folder(entry):
                    if name not in _SYSTEM_FOLDERS:
                        below.append(prefix + name)
                    else:
                        self.left_out[f"folder {name}"] += 1
                elif is_image:
                    self.left_out["pipe, socket or device"] += 1
                else:
                    self.left_out[f".{extension.lower()}" if dot and extension.isalnum() else "without extension"] += 1
        return images, below

    def images_below(self, folder: str, seen: set[tuple[int, int]]) -> list[str]:
        """Paths below `base` of all images of a folder, sorted; `seen` are folders that are not listed (again)."""
        found, waiting = list[str](), [folder]
        while waiting:
            images, below = self.images(waiting.pop(), seen)
            found += images
            waiting += sorted(below, reverse=True)
        return sorted(found)


def _list(base: Path, key: str) -> tuple[ImageFolder, dict[str, int]]:
    """The images, and for each folder listed ('' is the split's own) the time of last change before it was listed."""
    listing = _Listing(str(base), {}, Counter())
    seen = set[tuple[int, int]]()
    top, below = listing.images("", seen)
    inside = {name: listing.images_below(name, set(seen)) for name in sorted(below)}
    names = [name for name, images in inside.items() if images]
    empty = [name for name, images in inside.items() if not images]
    if top and names:
        raise InputError(
            f"{key}: {base} mixes images ({join_names(sorted(top))}) and class folders ({join_names(names)}): move the images into a "
            "class folder, or the folders elsewhere"
        )
    if names and all(map(is_split_name, names)):
        raise InputError(f"{key}: {base} holds splits ({join_names(names)}), not classes: name one of them")
    paths = sorted(top)
    for images in inside.values():
        paths += images
    if not paths:
        raise InputError(f"{key}: no images in {base} or its folders: {_instead(listing.left_out)}")
    classes, numbers = number_classes(names)
    counts = [len(inside[name]) for name in names]
    labels = np.repeat(numbers, counts) if names else np.full(len(paths), UNLABELED, dtype=np.int64)
    remarks = list[str]()
    if listing.left_out:
        remarks.append(f"left out: {_counted(listing.left_out)}")
    if empty:
        remarks.append(f"folders without an image: {join_names(empty)}")
    if len(classes) < len(names):
        several = [name for name, number in zip(names, numbers, strict=True) if (numbers == number).sum() > 1]
        remarks.append(f"folders whose names differ in Unicode's normal form only are one class: {join_names(several)}")
    notes = (printable(f"{base}: {'; '.join(remarks)}"),) if remarks else ()
    return ImageFolder(base, paths, labels, classes, notes), listing.folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        if entry.is_symlink():  # it leads round in a circle, or where we may not look
            return False
        raise


def _instead(left_out: Counter[str]) -> str:
    """What a folder without images holds, and what to do."""
    if not left_out:
        return "they hold no files; name the folder that holds the images"
    if left_out.keys() & {".zip", ".tar", ".tgz", ".gz", ".rar", ".7z"}:
        remedy = "unpack the archives"
    else:
        remedy = "convert them, or name the folder that holds the images"
    formats = "JPEG, PNG, TIFF, WebP, GIF and the other formats that Pillow decodes"
    return f"they hold {_counted(left_out)}; fastbyol reads {formats}: {remedy}"


def _counted(left_out: Counter[str], most: int = 5) -> str:
    """As "12 .heic, 3 .txt"."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in ranked[most:])
    return ", ".join(f"{count} {kind}" for kind, count in ranked[:most]) + (f", {others} others" if others else "")


def _cache_file(base: Path) -> Path | None:
    """None where there is no home folder."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return home / "fastbyol" / f"index-{hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:24]}.npz"


def _keep(found: ImageFolder, folders: dict[str, int]) -> None:
    file = _cache_file(found.root)
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            format=np.array(_FORMAT),
            paths=_as_array(found.paths),
            labels=found.labels,
            classes=_as_array(found.classes),
            notes=_as_array(found.notes),
            folders=_as_array(folders),
            times=np.array(list(folders.values()), dtype=np.int64),
        )


def _cached(base: Path) -> ImageFolder | None:
    """The cached index, if there is one and no folder has changed since."""
    file = _cache_file(base)
    if file is None:
        return None
    try:
        with np.load(file, allow_pickle=False) as kept:
            if kept["format"].item() != _FORMAT:
                return None
            if kept["times"].tolist() != list(_times(base, _names(kept["folders"]))):
                return None
            paths, labels, classes, notes = (
                _names(kept["paths"]),
                kept["labels"],
                _names(kept["classes"]),
                kept["notes"],
            )
            found = ImageFolder(base, paths, labels, classes, tuple(_names(notes)))
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ):  # none yet, or damaged: made anew
        return None
    return found if len(paths) == len(labels) else None


def _times(base: Path, folders: list[str]) -> Iterator[int]:
    for name in folders:
        yield (base / name).stat().st_mtime_ns


def _pack_names(names: Iterable[str]) -> bytes:
    """Each name ends in a zero, so that no names and one empty name differ."""
    return os.fsencode("\0".join([*names, ""]))


def _as_array(names: Iterable[str]) -> NDArray[np.uint8]:
    return np.frombuffer(_pack_names(names), dtype=np.uint8)


def _names(packed: NDArray[np.uint8]) -> list[str]:
    return os.fsdecode(packed.tobytes()).split("\0")[:-1]
