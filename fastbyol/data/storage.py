"""Files that images are parts of, on a disk or behind a URL, read by ranges."""

import glob
import io
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from fastbyol.errors import InputError, error_reason
from fastbyol.settings.limits import URL

_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
_MAX_FILES = 1_000_000  # of a pattern
_OPEN_FILES = 256  # of a split are kept open, of 1,024 that a process usually may; others are opened for every read
_READAHEAD = 1 << 22  # bytes, of a pass over a whole file


class RangeFile(ABC):
    """A file that is read by ranges, by several threads at the same time."""

    path: str  # or URL, for messages
    size: int  # in bytes
    stamp: str  # changes if the file does

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    @abstractmethod
    def read(self, start: int, size: int) -> bytes:
        """Return bytes start .. start + size - 1.

        Raises:
            OSError: they cannot be read.
            RunError: its storage does not answer.
        """

    def stream(self) -> io.BufferedReader:
        """Return a file object for one pass from the start, with few, large reads."""
        return io.BufferedReader(_Stream(self), _READAHEAD)


class LocalFile(RangeFile):
    """A file on a disk.

    Args:
        path: of the file.
        keep_open: False opens it for every read.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str | Path, *, keep_open: bool = True) -> None:
        self.path = str(path)
        file = open(path, "rb", buffering=0, opener=_open_nonblocking)
        status = os.fstat(file.fileno())
        self.size, self.stamp = status.st_size, f"{status.st_mtime_ns}"
        self._file = file if keep_open else None
        if not keep_open:
            file.close()

    def read(self, start: int, size: int) -> bytes:
        """Return bytes start .. start + size - 1."""
        if self._file is not None:
            return _pread(self._file.fileno(), start, size)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            return _pread(handle, start, size)
        finally:
            os.close(handle)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for a writer


def _pread(handle: int, start: int, size: int) -> bytes:
    data = os.pread(handle, size, start)
    while len(data) < size:
        more = os.pread(handle, size - len(data), start + len(data))
        if not more:
            end = os.fstat(handle).st_size
            raise OSError(f"the file ends at byte {end}, {start + size - end} bytes early")
        data += more
    return data


class _Stream(io.RawIOBase):
    """A seekable file object of a RangeFile."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(self._at, min(len(buffer), max(self._file.size - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def is_url(path: str | Path) -> bool:
    """Return True for URLs, such as s3://bucket/folder. file:// is one too."""
    return URL.match(str(path)) is not None


def is_pattern(path: str | Path) -> bool:
    """Return True if a path or URL has braces or wildcards, as in train-{0000..0146}.tar."""
    if is_url(path):
        return any(c in str(path) for c in "{*[")  # ? begins the query of a URL
    return bool(_split_pattern(path)[1])


def _split_pattern(path: str | Path) -> tuple[Path, str]:
    """Return the part of a path that exists, and the pattern below it; "" if that is none.

    Names of existing folders may have braces and brackets too.
    """
    folder = Path(path)
    if os.path.lexists(folder):
        return folder, ""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    rest = str(Path(path).relative_to(folder))
    return folder, rest if any(c in rest for c in "{*?[") else ""


def may_exist(path: str | Path) -> bool:
    """Return False if a path on a disk leads to nothing. URLs and patterns are not looked at."""
    return is_url(path) or is_pattern(path) or os.path.lexists(path)


def expand_braces(pattern: str) -> list[str]:
    """Return the paths of a pattern: {0000..0146} counts, {a,b} lists.

    Raises:
        InputError: a range has no end or counts down, or there are too many paths.
    """
    parts, alternatives, end = [], [], 0
    for found in _BRACES.finditer(pattern):
        parts.append(pattern[end : found.start()])
        alternatives.append(_alternatives(found[1], pattern))
        end = found.end()
    total = 1
    for choices in alternatives:
        total *= len(choices)
    if total > _MAX_FILES:
        raise InputError(f"{pattern}: stands for {total:,} files, more than {_MAX_FILES:,}")
    tail = pattern[end:]
    return ["".join(p + c for p, c in zip(parts, chosen, strict=True)) + tail for chosen in product(*alternatives)]


def _alternatives(text: str, pattern: str) -> Sequence[str]:
    numbers = _NUMBERS.fullmatch(text)
    if numbers is None:
        return text.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if last < first:
        raise InputError(f"{pattern}: the range {{{text}}} counts down; write {{{numbers[2]}..{numbers[1]}}}")
    if last - first >= _MAX_FILES:
        raise InputError(f"{pattern}: stands for {last - first + 1:,} files, more than {_MAX_FILES:,}")
    width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
    return [f"{k:0{width}d}" for k in range(first, last + 1)]


def expand_local(pattern: str | Path) -> list[str]:
    """Return the files of a pattern on a disk: braces in their order, wildcards sorted.

    A file named by braces alone may be missing; opening it reports that.
    """
    folder, rest = _split_pattern(pattern)
    found: list[str] = []
    for part in expand_braces(rest):
        wild = any(c in part for c in "*?[")
        found += [str(folder / name) for name in (sorted(glob.glob(part, root_dir=folder)) if wild else [part])]  # noqa: PTH207
    return found


def open_local(paths: Iterable[str | Path], key: str) -> list[RangeFile]:
    """Open files on a disk.

    Raises:
        InputError: one cannot be opened.
    """
    files: list[RangeFile] = []
    for k, path in enumerate(paths):
        try:
            files.append(LocalFile(path, keep_open=k < _OPEN_FILES))
        except OSError as error:
            raise InputError(f"{key}: {path}: {error_reason(error)}") from None
    return files
