"""Images that are ranges of larger files: base of tar shards (tar.py) and Parquet (parquet.py).

An index holds the position of every image, so any order costs one read per image, as with a folder
of files. Building it takes a pass over the files; it is cached, and rebuilt if a file changes.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbyol.data.codecs import decompress
from fastbyol.data.images import Images, label_images, pack_names
from fastbyol.data.storage import RangeFile, is_url
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, join_names
from fastbyol.runtime.caches import own_folder
from fastbyol.runtime.files import atomic_write
from fastbyol.runtime.logging import logger

_FORMAT = 2  # of cached indices
_WORTH_A_LINE = 1 << 28  # bytes to index
_INDEXERS = 8  # files that are indexed at a time


class Position(NamedTuple):
    """Where an image lies in its file.

    The stored bytes start .. start + stored - 1 are the image itself (codec 0), or have to be
    decompressed to `raw` bytes, of which the image is skip .. skip + size - 1.
    """

    start: int
    stored: int
    codec: int = 0
    raw: int = 0
    skip: int = 0
    size: int = 0


@dataclass(frozen=True)
class FileIndex:
    """What a pass over one file finds: for each image its position, name, and label if any."""

    positions: NDArray[np.int64]  # (n, 6)
    names: list[str]
    labels: list[int | str | None]
    left_out: list[str] = field(default_factory=list)
    """Images of the file that are not in the index."""


@dataclass(frozen=True, eq=False)
class ShardImages(Images):
    """The N images of a list of files."""

    root: Path | str
    labels: NDArray[np.int64]
    classes: list[str]
    files: Sequence[RangeFile]
    file_of: NDArray[np.int32]  # (N,)
    positions: NDArray[np.int64]  # (N, 6), see Position
    names: list[str]
    notes: tuple[str, ...] = ()

    @property
    def is_remote(self) -> bool:
        """True if reading an image takes a network's time."""
        return is_url(self.files[0].path)

    def read(self, index: int) -> bytes:
        """Return an image's bytes.

        Raises:
            OSError: they cannot be read or decompressed.
            RunError: their storage does not answer.
        """
        start, stored, codec, raw, skip, size = self.positions[index].tolist()
        data = self.files[self.file_of[index]].read(start, stored)
        if not codec:
            return data
        return decompress(data, codec, raw)[skip : skip + size]

    def name(self, index: int) -> str:
        """Return the image's name in its file."""
        return self.names[index]

    def location(self, index: int) -> str:
        """Return the file and the image's name."""
        file, name = self.files[self.file_of[index]], self.names[index]
        return (
            f"{file.path.removesuffix(file.name)}{name}"
            if name.startswith(f"{file.name}, ")
            else f"{file.path}, {name}"
        )

    def subset(self, indices: NDArray[np.int64]) -> "ShardImages":
        """Return the images at `indices`, which share the open files."""
        arrays = {name: getattr(self, name)[indices] for name in ("labels", "file_of", "positions")}
        return replace(self, **arrays, names=[self.names[i] for i in indices.tolist()])

    def with_labels(self, labels: NDArray[np.int64], classes: list[str]) -> "ShardImages":
        """Return the same images with other labels."""
        return replace(self, labels=labels, classes=classes)


def open_shards(
    root: Path | str,
    files: Sequence[RangeFile],
    kind: str,
    index_file: Callable[[RangeFile], FileIndex],
    class_names: Sequence[str] = (),
) -> ShardImages:
    """Return the images of a list of files.

    Args:
        root: for messages.
        kind: of the files; part of the cache's key.
        index_file: makes a pass over one file.
        class_names: names of the classes 0 .. C - 1, if they are known.

    Raises:
        InputError: there are no images, or a file or a label is damaged.
    """
    cache = _cache_path(files, kind)
    indices = None if cache is None else _read(cache)
    if indices is None:
        total = sum(file.size for file in files)
        if total > _WORTH_A_LINE:
            logger.info(f"{root}: indexing {len(files)} files, {total / 1e9:.1f} GB, once")
        indices = list(map_in_order(index_file, files, min(_INDEXERS, len(files))))
        if cache is not None:
            with suppress(OSError):  # without a cache the next start makes the pass again
                _write(cache, indices)
    names = [name for index in indices for name in index.names]
    if not names:
        raise InputError(
            f"{root}: there is no image in its {len(files)} file(s); archives in archives must be unpacked"
        )
    values = [label for index in indices for label in index.labels]
    try:
        labels, classes = label_images(values)
    except ValueError as error:
        raise InputError(f"{root}: {error}") from None
    if class_names and len(class_names) >= len(classes):
        classes = list(class_names)
    counts = [len(index.names) for index in indices]
    positions = np.concatenate([index.positions for index in indices])
    file_of = np.repeat(np.arange(len(files), dtype=np.int32), counts)
    empty = sum(count == 0 for count in counts)
    notes = (f"{root}: {empty} of {len(files)} files hold no image",) if empty else ()
    if left_out := [name for index in indices for name in index.left_out]:
        notes += (
            f"{root}: {len(left_out)} links and further images of a sample are left out: {join_names(left_out, 3)}",
        )
    return ShardImages(root, labels, classes, files, file_of, positions, names, notes)


def as_positions(positions: Sequence[Position]) -> NDArray[np.int64]:
    """Return positions as an array (n, 6)."""
    return np.array(positions, dtype=np.int64).reshape(-1, len(Position._fields))


def _cache_path(files: Sequence[RangeFile], kind: str) -> Path | None:
    """Return the path of the cached index of these files; None if there is no home folder."""
    folder = own_folder()
    if folder is None:
        return None
    key = hashlib.sha256(f"{_FORMAT} {kind}".encode())
    for file in files:
        path = os.path.abspath(file.path) if not is_url(file.path) else file.path  # noqa: PTH100
        key.update(os.fsencode(f"\0{path}\0{file.size}\0{file.stamp}"))
    return folder / f"shards-{key.hexdigest()[:24]}.npz"


def _write(path: Path, indices: Sequence[FileIndex]) -> None:
    """Write an index; a list of names is one array of bytes, since pickles are never loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = np.array([len(index.names) for index in indices])
    names = pack_names(name for index in indices for name in index.names)
    labels = json.dumps([label for index in indices for label in index.labels]).encode()
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            counts=counts,
            positions=np.concatenate([index.positions for index in indices]),
            names=np.frombuffer(names, dtype=np.uint8),
            labels=np.frombuffer(labels, dtype=np.uint8),
            left_out=np.frombuffer(json.dumps([index.left_out for index in indices]).encode(), dtype=np.uint8),
        )


def _read(path: Path) -> list[FileIndex] | None:
    """Return a cached index; None if there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            counts, positions = stored["counts"].tolist(), stored["positions"]
            names = os.fsdecode(stored["names"].tobytes()).split("\0")[:-1]
            labels, left_out = (json.loads(stored[name].tobytes()) for name in ("labels", "left_out"))
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    ends = np.cumsum(counts).tolist()
    if not (len(names) == len(labels) == len(positions) == (ends[-1] if ends else 0) and len(left_out) == len(counts)):
        return None
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    found = zip(parts, left_out, strict=True)
    return [FileIndex(positions[part], names[part], labels[part], others) for part, others in found]
