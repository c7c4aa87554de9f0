"""Files of a data set, from a folder or a tar archive, and how they become OUT/SPLIT/CLASS/NAME.

An archive is read in one pass and never unpacked: only the contents of members that the caller
recognizes reach the disk, under names that the caller chooses.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastbyol.data.decode import EXTENSIONS
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, error_reason, first_line, join_names
from fastbyol.runtime.logging import logger
from fastbyol.tools.corpora import Progress

SPLITS = ("train", "val")
_SPLIT_FOLDERS = {"train": "train", "val": "val", "test": "val"}
_DECOMPRESSORS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),  # type: ignore[dict-item]
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
# What tarfile and the decompressors raise on damaged files. gzip and bz2 raise subclasses of
# OSError, and tarfile reads chains of long names recursively.
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, RecursionError, OSError)


@dataclass(frozen=True)
class Entry:
    """One regular file of a source."""

    path: str
    """Relative to the source, with '/'."""
    where: str
    """For messages: the file, or the archive and the member."""
    file: str | None = None
    """Path on disk; None in an archive."""
    content: Callable[[], IO[bytes]] | None = None
    """Opens a member of an archive, until the next member is taken."""
    seekable: bool = True

    @property
    def name(self) -> str:
        """Last component of the path."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> str:
        """Name of the folder that holds the file, or ''."""
        return self.path.rpartition("/")[0].rpartition("/")[2]

    def read(self) -> bytes:
        """Return the content.

        Raises:
            InputError: it cannot be read, or the archive is truncated or damaged.
        """
        if self.content is None:
            with _one_line(self.where, "cannot be read"):
                return Path(self.file or "").read_bytes()
        with _one_line(self.where):
            return self.content().read()

    def members(self) -> Iterator["Entry"]:
        """Yield the files of an uncompressed tar archive that is a member of another one.

        Raises:
            InputError: as `Archive.entries`.
        """
        assert self.content is not None
        yield from _members(self.content(), self.where, self.seekable)


@dataclass(frozen=True)
class Folder:
    """All files below a folder, sorted. Hidden ones are left out; links are followed."""

    root: Path
    paths: list[str]

    def entries(self) -> Iterator[Entry]:
        """Yield the files."""
        for path in self.paths:
            file = f"{self.root}/{path}"
            yield Entry(path, file, file)


@dataclass(frozen=True)
class Archive:
    """A tar archive, plain or compressed with gzip, bzip2 or xz."""

    root: Path

    def entries(self) -> Iterator[Entry]:
        """Yield the files in the archive's order. Each must be read before the next is taken.

        Hidden files are left out.

        Raises:
            InputError: the archive is no tar archive, truncated or damaged; a member is a link, a
                device or a pipe, or has a path that leaves the archive.
        """
        with _one_line(str(self.root)):
            file = open(self.root, "rb")
            magic = file.read(6)
            file.seek(0)
        with file:
            decompress = next((d for m, d in _DECOMPRESSORS.items() if magic.startswith(m)), None)
            if decompress is None:
                yield from _members(file, str(self.root), seekable=True)
                return
            # As a stream: seeking one byte back would decompress everything again.
            unpacked = decompress(file)
            yield from _members(unpacked, str(self.root), seekable=False)
            with _one_line(str(self.root)):  # the checksum is at the end
                while unpacked.read(1 << 20):
                    pass


def open_source(path: Path, option: str = "--source") -> Folder | Archive:
    """Open a folder or a tar archive.

    Args:
        path: of the folder or archive.
        option: that names it, for messages.

    Raises:
        InputError: there is no such folder or file, or a folder in it cannot be listed.
    """
    try:
        if stat.S_ISDIR(path.stat().st_mode):
            return Folder(path, list(_list_files(path, "", frozenset())))
    except OSError as error:
        name = error.filename if error.filename is not None else path
        raise InputError(f"{option} {name}: {error_reason(error)}") from None
    if not path.is_file():
        raise InputError(f"{option} {path}: neither a folder nor a file")
    return Archive(path)


def _list_files(folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Yield the sorted paths of the files below a folder; a link to a folder above it is skipped.

    Dangling links count as files, since what they stand for would be missing silently.
    """
    status = folder.stat()
    if (status.st_dev, status.st_ino) in ancestors:
        return
    ancestors |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as listing:
        entries = sorted((entry for entry in listing if entry.name[0] != "."), key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir():
            yield from _list_files(folder / entry.name, f"{prefix}{entry.name}/", ancestors)
        elif entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path)):  # noqa: PTH110
            yield prefix + entry.name


class _StrictHeader(tarfile.TarInfo):
    """A header of a tar archive. tarfile would take a cut or damaged one for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictHeader":
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark of the end
                raise
            reason = "the end is missing" if len(buf) < tarfile.BLOCKSIZE else first_line(error)
            raise tarfile.ReadError(reason) from None


def _members(file: IO[bytes], where: str, seekable: bool) -> Iterator[Entry]:
    with _one_line(where, "not a tar archive, or truncated or damaged"):
        archive = tarfile.open(fileobj=file, mode="r:" if seekable else "r|", tarinfo=_StrictHeader)
    with archive:
        while True:
            with _one_line(where):
                info = archive.next()
            if info is None:
                return
            path = info.name.removeprefix("./")
            if path.startswith("/") or ".." in path.split("/") or "\0" in path:
                raise InputError(
                    f"{where}: its member {info.name!r} has a path that leaves the archive or is invalid: not used"
                )
            if not (info.isreg() or info.isdir()):
                raise InputError(f"{where}: its member {info.name!r} is a link, a device or a pipe: not used")
            if info.isreg() and not any(part.startswith(".") for part in path.split("/")):
                # extractfile returns None only for members that are no files
                yield Entry(
                    path,
                    f"{where}: {path}",
                    content=lambda info=info: archive.extractfile(info),  # type: ignore[misc]
                    seekable=seekable,
                )


@contextmanager
def _one_line(where: str, problem: str = "cannot be read, truncated or damaged") -> Iterator[None]:
    """Context manager: errors of reading become one line."""
    try:
        yield
    except _DAMAGE as error:
        raise InputError(f"{where}: {problem}: {error_reason(error)}") from None


@dataclass(frozen=True)
class NewImage:
    """An image to write as SPLIT/LABEL/NAME."""

    split: str
    label: str
    name: str
    content: bytes | Entry | NDArray[np.uint8]
    """The file's bytes; a file on disk, to be hard-linked; or pixels (H, W, 3), to be PNG."""


@dataclass
class Written:
    """What `write_images` has written."""

    counts: Counter[tuple[str, str]]
    """Images by split and class."""
    linked: int
    copied: int
    """Files of a folder that could not be hard-linked."""

    def images(self, split: str) -> int:
        """Return the number of images of a split."""
        return sum(count for (name, _), count in self.counts.items() if name == split)

    def summary(self) -> str:
        """Return text such as "10 in train/, no val/ (10 hard-linked)"."""
        splits = ", ".join(f"{self.images(s)} in {s}/" if self.images(s) else f"no {s}/" for s in SPLITS)
        how = [f"{count} {word}" for word, count in (("hard-linked", self.linked), ("copied", self.copied)) if count]
        return splits + (f" ({', '.join(how)})" if how else "")


def image_of(entry: Entry, split: str, label: str) -> NewImage:
    """Return the image in an entry, with its name. A member of an archive is read now."""
    return NewImage(split, label, entry.name, entry if entry.content is None else entry.read())


def find_image(entry: Entry, classes: Sequence[str], title: str) -> NewImage | None:
    """Return the image at .../SPLIT/CLASS/NAME, or None if the entry is no image in such a folder.

    The split is train, val or test; test is val/.

    Args:
        entry: of the source.
        classes: known classes.
        title: name of the data set, for messages.

    Raises:
        InputError: the class is unknown, or the entry cannot be read.
    """
    parts = entry.path.split("/")
    if len(parts) < 3 or parts[-3] not in _SPLIT_FOLDERS or not entry.name.lower().endswith(EXTENSIONS):
        return None
    if parts[-2] not in classes:
        raise InputError(f"{entry.where}: {parts[-2]} is no class of {title}")
    return image_of(entry, _SPLIT_FOLDERS[parts[-3]], parts[-2])


def write_images(folder: Path, images: Iterable[NewImage], total: int, progress: Progress) -> Written:
    """Write images below a folder, in threads.

    Args:
        folder: must exist.
        images: may be an iterator that reads an archive.
        total: expected number of images.
        progress: called after each image with the number done and the total.

    Raises:
        InputError: two images have the same split, class and name; or a file cannot be read.
        OSError: an image cannot be written.
    """
    written = Written(Counter(), 0, 0)

    def make_folders() -> Iterator[NewImage]:
        made = set()
        for image in images:
            place = (image.split, image.label)
            if place not in made:
                folder.joinpath(*place).mkdir(parents=True, exist_ok=True)
                made.add(place)
            yield image

    def write(image: NewImage) -> tuple[tuple[str, str], str]:
        target = folder / image.split / image.label / image.name
        try:
            return (image.split, image.label), _write(image.content, target)
        except FileExistsError:
            raise InputError(f"the source has {image.split}/{image.label}/{image.name} twice") from None

    for place, how in map_in_order(write, make_folders()):
        written.counts[place] += 1
        written.linked += how == "linked"
        written.copied += how == "copied"
        progress(done := written.counts.total(), max(done, total))
    return written


def _write(content: bytes | Entry | NDArray[np.uint8], target: Path) -> str:
    """Write a new file and return how."""
    how = "written"
    if isinstance(content, Entry):
        try:
            os.link(os.path.realpath(content.file or ""), target)
            return "linked"
        except FileExistsError:
            raise
        except OSError:  # another file system or owner, or no links here: a copy shows what is wrong otherwise
            content, how = content.read(), "copied"
    elif isinstance(content, np.ndarray):
        buffer = io.BytesIO()
        Image.fromarray(content).save(buffer, "PNG")
        content = buffer.getvalue()
    with open(target, "xb") as file:
        file.write(content)
    return how


def check_counts(written: Written, where: str, expected: dict[tuple[str, str], int]) -> None:
    """Check that no class is missing, and warn of different numbers of images.

    Args:
        written: result of `write_images`.
        where: the source, for messages.
        expected: (split, class) -> published number of images.

    Raises:
        InputError: a class has no images.
    """
    if missing := [f"{split}/{label}" for split, label in expected if not written.counts[split, label]]:
        raise InputError(f"{where}: no images of {join_names(missing)}: it is incomplete")
    warn_of_counts(written, where, expected)


def warn_of_counts(written: Written, where: str, expected: dict[tuple[str, str], int]) -> None:
    """Warn if a class has another number of images than published.

    Only a warning: copies without a few broken images are in use, and a truncated archive has
    raised an error before.
    """
    different = [
        f"{split}/{label} has {written.counts[split, label]} images instead of {count}"
        for (split, label), count in expected.items()
        if written.counts[split, label] != count
    ]
    if different:
        logger.warning(f"{where}: {join_names(different)}")
