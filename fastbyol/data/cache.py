"""Disk cache of remote files, bounded, shared by the processes of a machine.

    FOLDER/SET/           one folder per data set, named after its URL and the machine's boot
        x.data, x.map     ranges of a large file: a sparse copy, and a byte per block that is there
        x.file            a small file as a whole

Images are read in a new random order every epoch. Under such an order, dropping what was used least
recently keeps nothing that is needed soon. So a full cache keeps what it has, and serves that share
of every epoch; only other data sets make room, the least recently used first.

Blocks count after the data is written, so a killed process leaves a valid cache. After a crash of
the machine the order of both is unknown: another boot is another cache.
"""

import fcntl
import hashlib
import mmap
import os
import re
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from fastbyol.runtime.caches import own_folder
from fastbyol.runtime.logging import logger

BLOCK = 1 << 12
_MARKER = ".fastbyol-cache"
_SPARE_SHARE, _SPARE_BYTES = 0.05, 2 << 30  # of the disk, that stay free
_CHECK_EVERY = 1 << 28  # bytes written between two looks at the disk
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Budget:
    """What this process may still write below a folder, for all of its data sets."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.left = self.unchecked = 0  # bytes; bytes until the next look at the disk


_budgets: dict[Path, _Budget] = {}


class DiskCache:
    """Cache of one data set.

    A cache that cannot be written is off, with one warning.

    Args:
        url: of the data set.
        limit: largest size in bytes of all data sets together; 0 is off.
        folder: None is the user's cache folder. Data sets lie in a sub-folder of it.
        processes: that share the limit.
    """

    def __init__(self, url: str, limit: int, *, folder: Path | None = None, processes: int = 1) -> None:
        own = own_folder()
        parent = folder / "fastbyol-remote" if folder is not None else own and own / "remote"
        self.folder: Path | None = None
        self._budget = _Budget()
        if parent is None or not limit:
            return
        boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
        name = re.sub(r"[^\w.-]+", "_", url.split("://")[-1])[-60:]
        self.folder = parent / f"{name}-{hashlib.sha256(f'{boot} {url}'.encode()).hexdigest()[:12]}"
        self._budget = _budgets.setdefault(parent, self._budget)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._in_use = open(self.folder / _MARKER, "ab")  # locked, so that nobody makes room of it
            fcntl.flock(self._in_use, fcntl.LOCK_SH)
            os.utime(self.folder)
            room = max(self._room(limit), 0) // processes
            with self._budget.lock:
                self._budget.left = room
        except OSError as error:
            self._turn_off(error)

    def _room(self, limit: int) -> int:
        """Make room for half of the limit; return how many bytes may be written."""
        assert self.folder is not None
        sizes = {folder: _size(folder) for folder in self.folder.parent.iterdir() if _is_cache(folder)}
        used = sum(sizes.values())
        for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
            if used <= limit // 2:
                break
            with open(folder / _MARKER, "ab") as marker, suppress(BlockingIOError):
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not what a process uses, this one included
                shutil.rmtree(folder, ignore_errors=True)
                used -= sizes[folder]
        return limit - used

    def reserve(self, size: int) -> bool:
        """Return True if `size` bytes may be written."""
        budget, folder = self._budget, self.folder
        with budget.lock:
            if budget.left < size or folder is None:
                return False
            budget.unchecked -= size
            if budget.unchecked <= 0:
                disk = shutil.disk_usage(folder)
                if disk.free - size < max(_SPARE_SHARE * disk.total, min(_SPARE_BYTES, disk.total // 4)):
                    budget.left = 0
                    logger.info(f"the cache of remote images in {folder} stops growing: the disk is nearly full")
                    return False
                budget.unchecked = _CHECK_EVERY
            budget.left -= size
            return True

    def open_ranges(self, key: str, size: int) -> "CachedRanges | None":
        """Return the cache of a file of `size` bytes; None if the cache is off.

        Args:
            key: identifies the file and its version.
        """
        if (path := self._path(key)) is None:
            return None
        try:
            return CachedRanges(self, path, size)
        except OSError as error:
            self._turn_off(error)
            return None

    def get(self, key: str) -> bytes | None:
        """Return a small file, None if it is not there."""
        if (path := self._path(key)) is None:
            return None
        try:
            return Path(f"{path}.file").read_bytes()
        except OSError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Keep a small file if there is room."""
        base = self._path(key)
        if base is None or not self.reserve(-(-len(data) // BLOCK) * BLOCK):
            return
        path = Path(f"{base}.file")
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            partial.rename(path)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            self._turn_off(error)

    def _path(self, key: str) -> Path | None:
        """Return the path of a file without its suffix; None if the cache is off."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return None if (folder := self.folder) is None else folder / digest[:2] / digest[2:26]

    def _turn_off(self, error: OSError) -> None:
        with self._budget.lock:
            folder, self.folder = self.folder, None
        if folder is not None:
            logger.warning(f"remote images are not cached any more: {folder}: {error.strerror or error}")


def _is_cache(folder: Path) -> bool:
    """Return True for folders of this module. Others are never removed."""
    return re.search("-[0-9a-f]{12}$", folder.name) is not None and (folder / _MARKER).is_file()


class CachedRanges:
    """Blocks of one file."""

    def __init__(self, cache: DiskCache, path: Path, size: int) -> None:
        self._cache, self._size = cache, size
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = max(-(-size // BLOCK), 1)
        self._data = f"{path}.data"  # not kept open: a set may have more files than a process may open
        with open(self._data, "ab") as file:
            self._inode = os.fstat(file.fileno()).st_ino
        handle = os.open(f"{path}.map", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(handle).st_size < blocks:
                os.posix_fallocate(handle, 0, blocks)  # a full disk must not become a SIGBUS
            self._map = mmap.mmap(handle, blocks)
        finally:
            os.close(handle)

    def get(self, start: int, size: int) -> bytes | None:
        """Return a range, None if a block of it is not there."""
        first, last = start // BLOCK, -(-(start + size) // BLOCK)
        if self._map.find(b"\0", first, last) >= 0:
            return None
        try:
            with open(self._data, "rb", buffering=0) as file:
                # Another process may have removed the file to make room, and a third made it again.
                is_same = os.fstat(file.fileno()).st_ino == self._inode
                data = os.pread(file.fileno(), size, start) if is_same else b""
        except OSError:
            return None
        return data if len(data) == size else None

    def aligned(self, start: int, size: int) -> tuple[int, int]:
        """Return the range of whole blocks around a range."""
        low = start // BLOCK * BLOCK
        return low, min(-(-(start + size) // BLOCK) * BLOCK, self._size) - low

    def put(self, start: int, data: bytes) -> None:
        """Keep whole blocks if there is room."""
        first, last = start // BLOCK, -(-(start + len(data)) // BLOCK)
        missing = (last - first) - self._map[first:last].count(1)
        if not missing or not self._cache.reserve(missing * BLOCK):
            return
        try:
            handle = os.open(self._data, os.O_WRONLY)
            try:
                if os.fstat(handle).st_ino != self._inode or os.pwrite(handle, data, start) != len(data):
                    return
            finally:
                os.close(handle)
        except OSError as error:
            self._cache._turn_off(error)
            return
        self._map[first:last] = b"\1" * (last - first)


def _size(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.stat(f"{base}/{name}").st_blocks * 512  # noqa: PTH116
    return total
