"""Files that are written whole or not at all, and folders that one process at a time writes into."""

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

LOCK = ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which is synced and takes its name when the body has succeeded, else removed.

    A link's target is replaced. What is no regular file (/dev/null, a pipe) is written as it is.

    Raises:
        OSError: it cannot be written; names `path`. What was there before is there still.
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
    """Writes a file whole or not at all; text as UTF-8, in which bytes of names that are not UTF-8 are escaped.

    Raises:
        OSError: as `atomic_write`.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are missing.

    Raises:
        OSError: it cannot be made; its text names the file that stands in its way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next((p for p in (path, *path.parents) if os.path.lexists(p) and not p.is_dir()), path)
        raise NotADirectoryError(errno.ENOTDIR, f"{file} is not a folder", str(path)) from None


def check_output(path: Path, key: str) -> None:
    """Refuses, before any work is done, a path at which no file can be written.

    Raises:
        InputError: it is a folder, or its folder is missing or cannot be written.
    """
    target = os.path.realpath(path)  # a link's target is replaced
    folder = os.path.dirname(target)  # noqa: PTH120 - of a path that may be in a folder that cannot be searched
    if os.path.isdir(target):  # noqa: PTH112
        raise InputError(f"{key}: is a folder; name a file")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise InputError(f"{key}: cannot be written: there is no folder {folder}")
    special = os.path.exists(target) and not os.path.isfile(target)  # noqa: PTH110, PTH113 - such as /dev/null
    if not os.access(target if special else folder, os.W_OK):
        raise InputError(f"{key}: cannot be written: {os.strerror(errno.EACCES)}")


def write_output(path: Path, content: bytes | str, key: str) -> None:
    """As `write_file`, for what the option `key` names.

    Raises:
        RunError: it cannot be written.
    """
    try:
        write_file(path, content)
    except OSError as error:
        raise RunError(f"{key}: cannot be written: {error.strerror}") from None


def json_text(values: dict[str, Any]) -> str:
    """JSON that people read too; NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_finite(values), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, values: dict[str, Any], key: str) -> None:
    """As `write_output`, of `json_text`."""
    write_output(path, json_text(values), key)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        InputError: it cannot be read, or holds no object.
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
        raise InputError(
            f"{path}: {'is empty' if path.stat().st_size == 0 else f'is damaged: not valid JSON{line}'}"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no JSON object")
    return values


def read_json_or(path: Path, warn: Callable[[str], None]) -> dict[str, Any]:
    """As `read_json`; one that cannot be read is named and counts as missing."""
    try:
        return read_json(path)
    except InputError as error:
        warn(f"{error}; it is left out")
        return {}


class FolderLock:
    """Context: of all processes that lock a folder one at a time is inside.

    The lock is the kernel's (flock; over NFS the server's), so it ends with its owner, however that ended: none is ever stale. A folder
    that is made for the lock and in which nothing was written is removed again.

    Args:
        folder: made where it is missing.
        wait_s: how long to wait for another process to leave.
        warn: gets a line where the file system has no locks.

    Raises (on entering):
        InputError: another process is inside, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, wait_s: float = 0.0, warn: Callable[[str], None]) -> None:
        self._folder, self._wait_s, self._warn = folder, wait_s, warn
        self._handle: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._made = [p for p in (self._folder, *self._folder.parents) if not p.exists()]
            if self._folder.is_symlink() and not self._folder.exists():
                raise InputError(
                    f"{self._folder} is a link to a folder that does not exist: make that, or remove the link"
                )
            make_folder(self._folder)
            limit = time.monotonic() + self._wait_s
            while (handle := self._try()) is None:
                if time.monotonic() >= limit:
                    owner = _read_owner(self._folder / LOCK)
                    raise InputError(
                        f"{self._folder}: another run writes into it ({owner}): wait for its end, or choose another --name"
                    )
                time.sleep(0.2)
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be written: {error_reason(error)}; choose another --runs or --name"
            ) from None
        self._handle = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._handle is None:
            return
        with suppress(OSError):  # the folder may be gone, or hold what the run has written
            if self._made and os.listdir(self._folder) == [LOCK]:
                (self._folder / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        os.close(self._handle)
        self._handle = None

    def renew(self) -> bool:
        """Takes the lock of a new folder where the old one was moved or removed; whether it was.

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
        """The locked file; None while another process has it."""
        path = self._folder / LOCK
        while True:
            handle = _open_plain(path)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    if error.errno in (errno.EAGAIN, errno.EACCES):
                        return None
                    raise
                self._warn(f"{self._folder}: its file system has no locks: make sure that no other run writes into it")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                    return handle
            os.close(handle)  # its owner has removed it meanwhile: the lock would be on a file without a name


def _open_plain(path: Path) -> int:
    """Opens a lock file, which is made where it is missing; a link is not followed, since its target would be overwritten.

    Raises:
        InputError: something else stands there.
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
    raise InputError(f"{path} is not a plain file, which a run uses as its lock: remove it")


def _read_owner(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "a process"
    return "a process"
