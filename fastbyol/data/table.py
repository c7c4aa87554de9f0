"""Lists of images: CSV or TSV files of path and label, and folders of a remote storage.

    image,label
    photos/1.jpg,cat
    photos/2.jpg,dog

The first line may name the columns; without names, the first column is the path and the second, if
there is one, the label. Paths are relative to the list, absolute, or URLs.
"""

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.decode import EXTENSIONS
from fastbyol.data.images import UNLABELED, Images, label_images, number_classes
from fastbyol.data.remote import CacheOptions, Remote, open_remote
from fastbyol.data.storage import is_url
from fastbyol.errors import InputError, error_reason

SUFFIXES = {".csv": ",", ".tsv": "\t"}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "url")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target", "category")


@dataclass(frozen=True, eq=False)
class FileList(Images):
    """The N files of a list, on a disk or a remote storage."""

    root: Path | str
    paths: list[str]  # N: absolute, URLs, or relative to `base`
    labels: NDArray[np.int64]
    classes: list[str]
    base: str  # a folder or URL, with a slash at its end
    remotes: dict[str, Remote]  # scheme and host -> storage
    stamps: Mapping[str, str] = field(default_factory=dict)  # path -> version, if it is known
    notes: tuple[str, ...] = ()

    @property
    def is_remote(self) -> bool:
        """True if reading an image takes a network's time."""
        return bool(self.remotes)

    def read(self, index: int) -> bytes:
        """Return the file's bytes.

        Raises:
            OSError: there is no such file, or it cannot be read.
            StorageError: its storage does not answer.
        """
        path = self._full(self.paths[index])
        remote = self.remotes.get(_host(path)) if self.remotes else None
        if remote is not None:
            return remote.read_file(path, self.stamps.get(self.paths[index], ""))
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            return file.read()

    def _full(self, path: str) -> str:
        return path if path.startswith("/") or is_url(path) else self.base + path

    def name(self, index: int) -> str:
        """Return the path as the list has it."""
        return self.paths[index]

    def location(self, index: int) -> str:
        """Return the full path."""
        return self._full(self.paths[index])

    def subset(self, indices: NDArray[np.int64]) -> "FileList":
        """Return the files at `indices`."""
        return replace(self, paths=[self.paths[i] for i in indices.tolist()], labels=self.labels[indices])

    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> "FileList":
        """Return the same files with other labels."""
        return replace(self, labels=labels, classes=classes)


def open_table(path: str, content: bytes, cache: CacheOptions) -> FileList:
    """Return the images that a list names. No image is opened.

    Args:
        path: of the list, or its URL.
        content: of the list.

    Raises:
        InputError: the list is not a text file, is empty, or a line has no path.
    """
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122 - a URL is no Path
    try:
        text = content.decode("utf-8-sig")
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=SUFFIXES[suffix], strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a list in UTF-8: {error}") from None
    numbered = [(k, row) for k, row in enumerate(rows, 1) if any(cell.strip() for cell in row)]
    if not numbered:
        raise InputError(f"{path}: it names no image")
    first = [name.strip().lower() for name in numbered[0][1]]
    path_column, label_column, notes = 0, 1, ()
    if any(name in _PATH_COLUMNS for name in first):
        path_column = next(k for k, name in enumerate(first) if name in _PATH_COLUMNS)
        label_column = next((k for k, name in enumerate(first) if name in _LABEL_COLUMNS), len(first))
        if label_column == len(first) and len(first) > 1:
            notes = (f"{path}: no column of labels ({', '.join(_LABEL_COLUMNS)}) among {', '.join(first)}",)
        numbered = numbered[1:]
        if not numbered:
            raise InputError(f"{path}: it names no image")
    paths, values = list[str](), list[int | str | None]()
    for k, row in numbered:
        name = row[path_column].strip() if path_column < len(row) else ""
        if not name or "\0" in name:
            raise InputError(f"{path}, line {k}: there is no path in {','.join(row)[:100]!r}")
        paths.append(name)
        label = row[label_column].strip() if label_column < len(row) else ""
        values.append(label or None)
    given = [value for value in values if value is not None]
    if all(str(value).isascii() and str(value).isdecimal() and len(str(value)) < 10 for value in given):
        values = [None if value is None else int(value) for value in values]
    try:
        labels, classes = label_images(values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    base = path.rpartition("/")[0] + "/" if is_url(path) else str(Path(path).absolute().parent) + "/"
    remotes = {host: open_remote(host, cache) for host in sorted({_host(name) for name in [path, *paths]} - {""})}
    root: Path | str = path if is_url(path) else Path(path)
    return FileList(root, paths, labels, classes, base, remotes, notes=notes)


def open_remote_folder(url: str, remote: Remote) -> FileList | None:
    """Return the images below a folder of a storage: its first-level folders are the classes.

    None if there is no image.
    """
    found = remote.find(url)
    names = [name for name in found if os.path.splitext(name)[1].lower() in EXTENSIONS]  # noqa: PTH122
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        return None
    flat = [name for name in names if "/" not in name]
    if flat and len(flat) < len(names):
        raise InputError(f"{url} mixes images ({flat[0]}) and class folders: name one of its folders")
    labels, classes = np.full(len(names), UNLABELED, dtype=np.int64), list[str]()
    if not flat:
        classes, labels = number_classes([name.split("/")[0] for name in names])
    base = url.rstrip("/") + "/"
    return FileList(url, names, labels, classes, base, {_host(base): remote}, found)


def _host(path: str) -> str:
    """Return scheme and host or bucket of a URL, which one storage serves; "" for a path."""
    scheme, found, rest = path.partition("://")
    return f"{scheme}://{rest.split('/', 1)[0]}" if found else ""


def read_list(path: Path) -> bytes:
    """Read a list on a disk.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error_reason(error)}") from None
