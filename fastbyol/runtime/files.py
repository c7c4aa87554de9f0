"""Atomic file writes, JSON files, and a lock for a folder."""

import errno
import fcntl
import json
import math
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastbyol.errors import InputError, RunError, error_reason
from fastbyol.runtime.logging import logger

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # from file systems without locks


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager: yield a temporary path, which is renamed to `path` if the body succeeds.

    The file is synced first. If the body raises, the temporary file is removed and `path` stays
    unchanged. The target of a symbolic link is replaced. A path that is not a regular file, such as
    /dev/null or a pipe, is yielded itself.

    Raises:
        OSError: the file cannot be written. Its `filename` is `path`.
    """
    temporary = None
    try:
        if path.exists() and not path.is_file():
            yield path
            return
        target = Path(os.path.realpath(path))
        handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, error_reason(error), str(path)) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically. Text is encoded as UTF-8, with escapes for other bytes.

    Raises:
        OSError: the file cannot be written. Its `filename` is `path`.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if missing.

    Raises:
        OSError: it cannot be created. The text names the file that is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), path)
        raise NotADirectoryError(errno.ENOTDIR, f"{file} is not a folder", str(path)) from None


def check_output(path: Path, key: str) -> None:
    """Check that an output file can be written, before the work starts.

    Args:
        path: the file.
        key: how messages name it, e.g. "--out x.json".

    Raises:
        InputError: the path is a folder, or its folder does not exist or cannot be written.
    """
    target = os.path.realpath(path)  # the target of a link is replaced
    folder = os.path.dirname(target)  # noqa: PTH120 - Path raises in a folder that cannot be searched
    if os.path.isdir(target):  # noqa: PTH112
        raise InputError(f"{key}: is a folder; name a file")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise InputError(f"{key}: cannot be written: there is no folder {folder}")
    special = os.path.exists(target) and not os.path.isfile(target)  # noqa: PTH110, PTH113 - such as /dev/null
    if not os.access(target if special else folder, os.W_OK):
        raise InputError(f"{key}: cannot be written: {os.strerror(errno.EACCES)}")


def check_replaceable(path: Path, key: str, start: bytes, kind: str) -> None:
    """Check that an output file replaces nothing but an earlier one of its kind, or an empty file.

    Args:
        path: the file.
        key: how messages name it, e.g. "--out x.png".
        start: the first bytes of a file of this kind.
        kind: what messages call it, e.g. "a PNG file".

    Raises:
        InputError: the file exists and is of another kind, or cannot be read.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            found = file.read(len(start))
    except OSError as error:
        raise InputError(f"{key}: cannot be read: {error.strerror}") from None
    if found not in (b"", start):
        raise InputError(f"{key}: exists and is not {kind}, so it is not overwritten; name another file")


def write_output(path: Path, content: bytes | str, key: str) -> None:
    """Write a command's output file atomically.

    Args:
        path: the file.
        content: bytes, or text as in `write_file`.
        key: how messages name it, e.g. "--out x.json".

    Raises:
        RunError: the file cannot be written.
    """
    try:
        write_file(path, content)
    except OSError as error:
        raise RunError(f"{key}: cannot be written: {error.strerror}") from None


def json_text(values: dict[str, Any]) -> str:
    """Return indented JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, values: dict[str, Any], key: str) -> None:
    """Write a command's output as JSON. See `write_output` and `json_text`."""
    write_output(path, json_text(values), key)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty dict if there is no such file.

    Raises:
        InputError: the file cannot be read, is damaged, or does not hold an object.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise InputError(f"{path}: is not a file")
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        problem = "is empty" if path.stat().st_size == 0 else f"is damaged: not valid JSON{line}"
        raise InputError(f"{path}: {problem}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object")
    return values


def read_json_or(path: Path, warn: Callable[[str], object] = logger.warning) -> dict[str, Any]:
    """Return the object in a JSON file, or warn and return {} if it cannot be read."""
    try:
        return read_json(path)
    except InputError as error:
        warn(f"{error}; it is ignored")
        return {}


class FolderLock:
    """Context manager: only one process at a time is inside, among those that lock the same folder.

    The kernel holds the lock (flock; over NFS the server), so it ends with the process and is never
    stale. On exit, a folder that was created for the lock is removed if nothing was written into
    it.

    Args:
        folder: created if missing.
        wait_s: seconds to wait for another process to leave.
        option: that names the folder, for messages; default: those of a run.

    Raises (on entering):
        InputError: another process is inside, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, wait_s: float = 0.0, option: str = "") -> None:
        self._folder, self._wait_s, self._option = folder, wait_s, option
        self._handle: int | None = None
        self._created: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._created = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
            if self._folder.is_symlink() and not self._folder.exists():
                raise InputError(
                    f"{self._folder} is a link to a folder that does not exist: create it, or remove the link"
                )
            make_folder(self._folder)
            deadline = time.monotonic() + self._wait_s
            while (handle := self._try()) is None:
                if time.monotonic() >= deadline:
                    owner = _read_owner(self._folder / LOCK)
                    raise InputError(
                        f"{self._folder}: another run writes into it ({owner}): wait until it ends, or choose another "
                        f"{self._option or '--name'}"
                    )
                time.sleep(0.2)
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written: {error_reason(error)}; choose another "
                f"{self._option or '--runs or --name'}"
            ) from None
        self._handle = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._handle is None:
            return
        with suppress(OSError):  # the folder may be gone or not empty
            if self._created and os.listdir(self._folder) == [LOCK]:
                (self._folder / LOCK).unlink()
                for folder in self._created:
                    folder.rmdir()
        os.close(self._handle)
        self._handle = None

    def renew(self) -> bool:
        """Lock a new folder if the old one was moved or removed. Return True if it was.

        Raises:
            InputError: as on entering.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if self._handle is None or os.path.samestat(os.fstat(self._handle), (self._folder / LOCK).stat()):
                return False
        os.close(self._handle)
        self._handle = None
        self.__enter__()
        return True

    def _try(self) -> int | None:
        """Return the locked file's descriptor, or None if another process holds the lock."""
        path = self._folder / LOCK
        while True:
            handle = _open_lock_file(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    if error.errno in (errno.EAGAIN, errno.EACCES):
                        return None
                    raise
                logger.warning(
                    f"{self._folder}: its file system has no locks: make sure that no other run writes into it"
                )
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                    return handle
            os.close(handle)  # its owner has deleted the file meanwhile


def _open_lock_file(path: Path) -> int:
    """Open a lock file, created if missing. A link is not followed, to spare its target.

    Raises:
        InputError: the path is not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        handle = None
    if handle is not None and stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    if handle is not None:
        os.close(handle)
    raise InputError(f"{path} is not a regular file, but runs use it as a lock: remove it")


def _read_owner(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "a process"
    return "a process"
