"""Remote storage through fsspec: s3://, gs://, https://, hf:// and others.

Every request has a time limit and is repeated a few times. What the storage denies is not repeated.
An image that does not exist is a bad image, as on a disk; a storage that does not answer ends the
run, since skipping its images would change the run's result.

Credentials come from the environment and from the services' own files, never from settings.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastbyol.data.cache import CachedRanges, DiskCache
from fastbyol.data.storage import RangeFile, is_url
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, StorageError, first_line

T = TypeVar("T")
ATTEMPTS = 5
TIMEOUT_S = 30.0  # of an attempt, plus a second per MB
FIRST_PAUSE_S = 0.5  # doubles with every attempt
READERS = 32  # threads of the loader: a request takes tens of milliseconds, a disk's read less than one
_OPENERS = 16
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3='{\"anon\": true}' reads public buckets",
    "gs": 'set GOOGLE_APPLICATION_CREDENTIALS; FSSPEC_GCS=\'{"token": "anon"}\' reads public buckets',
    "hf": "set HF_TOKEN, or run `hf auth login`",
}
_DENIED_NAMES = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError"}
_DENIED_NAMES |= {"GatedRepoError", "LocalTokenNotFoundError", "ProfileNotFound"}
_STAMPS = ("ETag", "etag", "blob_id", "generation", "LastModified", "last_modified", "mtime", "Last-Modified")


@dataclass(frozen=True)
class CacheOptions:
    """Disk cache of remote files."""

    folder: str | None = None  # None is the user's cache folder
    limit: int = 50 * 10**9  # bytes; 0 is off


@dataclass(frozen=True)
class Remote:
    """The storage of one data set.

    Args:
        url: of the data set, for messages and the cache.
        fs: fsspec's file system.
    """

    url: str
    fs: Any
    cache: DiskCache = field(repr=False)

    def call(self, path: str, function: Callable[[], T]) -> T:
        """Return function(), repeated after errors that may pass.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: access is denied, or no attempt succeeded.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.75, 1.25))
            try:
                return function()
            except Exception as error:  # every library has errors of its own
                reason, lasting = _classify(error)
                if lasting == "missing":
                    raise FileNotFoundError(2, "no such file", path) from None
                if lasting:
                    raise StorageError(f"{path}: access denied ({reason}): {_credentials(path)}") from None
        raise StorageError(
            f"{path}: {ATTEMPTS} attempts failed, the last one: {reason}; try again when the storage answers"
        )

    def request(self, name: str, *args: Any, size: int = 0, **kwargs: Any) -> Any:
        """Return the result of a method of the file system, within the time limit."""
        limit = TIMEOUT_S + size / 1e6
        if getattr(self.fs, "async_impl", False):
            from fsspec.asyn import sync

            return sync(self.fs.loop, getattr(self.fs, f"_{name}"), *args, timeout=limit, **kwargs)
        if name == "cat_file":
            kwargs["cache_type"] = "none"  # or else it would read 5 MB ahead
        return getattr(self.fs, name)(*args, **kwargs)

    def sends_ranges(self, path: str) -> bool:
        """Return True if the server of a file sends parts of it. Other storages than HTTP do."""
        if not path.startswith(("http://", "https://")):
            return True

        async def status() -> int:
            session = await self.fs.set_session()
            # The body is not read: without ranges, it is the whole file.
            async with session.get(self.fs.encode_url(path), headers={"Range": "bytes=0-0"}) as response:
                response.raise_for_status()
                return response.status

        from fsspec.asyn import sync

        return self.call(path, lambda: sync(self.fs.loop, status, timeout=TIMEOUT_S)) == 206

    def read_range(self, path: str, start: int, size: int) -> bytes:
        """Return a range of a file, complete."""

        def attempt() -> bytes:
            data = self.request("cat_file", path, start=start, end=start + size, size=size)
            if len(data) != size:
                raise EOFError(f"{len(data)} of {size} bytes arrived")
            return data

        return self.call(path, attempt)

    def read_file(self, path: str, stamp: str = "") -> bytes:
        """Return a whole file, from the cache if it is there.

        Args:
            stamp: of the file's version; "" if it is not known.
        """
        data = self.cache.get(f"{path} {stamp}")
        if data is None:
            data = self.download(path)
            self.cache.put(f"{path} {stamp}", data)
        return data

    def download(self, path: str) -> bytes:
        """Return a whole file, not from the cache."""
        return self.call(path, lambda: self.request("cat_file", path))

    def info(self, path: str) -> dict[str, Any]:
        """Return size, type and version of a file."""
        return self.call(path, lambda: self.request("info", path))

    def ls(self, path: str) -> dict[str, bool]:
        """Return the names in a folder: name -> is a folder. Empty if there is no such folder."""
        try:
            entries = self.call(path, lambda: self.request("ls", path, detail=True))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        found = {e["name"].rstrip("/").rpartition("/")[2]: e["type"] == "directory" for e in entries}
        found.pop("", None)
        return found

    def find(self, path: str) -> dict[str, str]:
        """Return the paths of all files below a folder, relative to it, and their versions."""
        base = self.fs._strip_protocol(path).rstrip("/") + "/"
        found = self.call(path, lambda: self.request("find", path, detail=True))
        return {name.removeprefix(base): stamp_of(info) for name, info in sorted(found.items())}

    def glob(self, pattern: str) -> list[str]:
        """Return the URLs of the files of a pattern with wildcards, sorted."""
        found = self.call(pattern, lambda: self.fs.glob(pattern))
        return sorted(self.fs.unstrip_protocol(path) for path in found)

    def open_files(self, paths: Sequence[str]) -> list[RangeFile]:
        """Open files for reading by ranges.

        Raises:
            InputError: one does not exist, or its server does not send ranges.
        """
        return list(map_in_order(lambda path: RemoteFile(self, path), paths, _OPENERS))


class RemoteFile(RangeFile):
    """A file that is read by ranges, through the cache."""

    def __init__(self, remote: Remote, path: str) -> None:
        self._remote, self.path = remote, path
        try:
            info = remote.info(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        if info.get("size") is None:
            raise InputError(f"{path}: the server does not tell its size")
        self.size = int(info["size"])
        self.stamp = stamp_of(info)
        if not remote.sends_ranges(path):
            raise InputError(f"{path}: the server does not send ranges of a file; download the files")
        self._cached: CachedRanges | None = remote.cache.open_ranges(f"{path} {self.size} {self.stamp}", self.size)

    def read(self, start: int, size: int) -> bytes:
        """Return bytes start .. start + size - 1."""
        if start < 0 or start + size > self.size:
            raise OSError(f"the file has {self.size} bytes, not {start + size}")
        if self._cached is None:
            return self._remote.read_range(self.path, start, size)
        data = self._cached.get(start, size)
        if data is None:
            low, whole = self._cached.aligned(start, size)
            blocks = self._remote.read_range(self.path, low, whole)
            self._cached.put(low, blocks)
            data = blocks[start - low : start - low + size]
        return data


def stamp_of(info: dict[str, Any]) -> str:
    """Return what tells a version of a file from others."""
    names = ("size", *_STAMPS)
    return " ".join(str(info[name]) for name in names if info.get(name) is not None)


_remotes: dict[tuple[str, CacheOptions], Remote] = {}
_remotes_lock = threading.Lock()


def open_remote(url: str, options: CacheOptions | None = None) -> Remote:
    """Return the storage of a data set; the same one for the same URL.

    Raises:
        InputError: the scheme is unknown, its package is missing, or access is denied.
    """
    options = options or CacheOptions()
    with _remotes_lock:
        key = url, options
        if key not in _remotes:
            _remotes[key] = Remote(url, _file_system(url), _disk_cache(url, options))
        return _remotes[key]


def _disk_cache(url: str, options: CacheOptions) -> DiskCache:
    folder = None if options.folder is None else Path(options.folder)
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return DiskCache(url, options.limit, folder=folder, processes=int(processes) if processes.isdecimal() else 1)


def _file_system(url: str) -> Any:
    import fsspec

    scheme = url.partition("://")[0].lower()
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": True}
    if scheme in ("s3", "s3a"):
        # Attempts are counted here.
        limits = {"connect_timeout": TIMEOUT_S, "read_timeout": TIMEOUT_S, "retries": {"max_attempts": 0}}
        options["config_kwargs"] = limits
    try:
        if scheme in _PACKAGES:
            __import__(_PACKAGES[scheme])
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = _PACKAGES.get(scheme, getattr(error, "name", None) or f"fsspec's package for {scheme}")
        raise InputError(f"{url}: reading {scheme}:// needs a package: pip install {package}") from None
    except ValueError:
        raise InputError(
            f"{url}: {scheme}:// is not a known storage; use s3, gs, https or hf, or --import your image set"
        ) from None
    except Exception as error:
        reason, lasting = _classify(error)
        remedy = _credentials(url) if lasting else "check the URL"
        raise InputError(f"{url}: cannot be reached ({reason}): {remedy}") from None
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs


def _classify(error: BaseException) -> tuple[str, str]:
    """Return the reason in one line, and "missing", "denied", or "" for an error that may pass."""
    chain, cause = [error], error.__cause__ or error.__context__
    while cause is not None and len(chain) < 6:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    status = next((s for e in chain if isinstance(s := _status(e), int)), None)
    names = {type(e).__name__ for e in chain}
    reason = f"HTTP status {status}" if status is not None else first_line(error) or type(error).__name__
    if status in (401, 403) or names & _DENIED_NAMES or (status is None and isinstance(error, PermissionError)):
        return reason, "denied"
    if status is not None:
        return reason, "missing" if status in (404, 410) else ""
    if "FSTimeoutError" in names or "TimeoutError" in names:
        return "no answer within the time limit", ""
    connection = any(isinstance(e, ConnectionError) or "Connect" in type(e).__name__ for e in chain)
    if isinstance(error, FileNotFoundError) and not connection:
        return reason, "missing"
    return reason, ""


def _status(error: BaseException) -> Any:
    """Return the HTTP status of an error of aiohttp, httpx, requests, gcsfs or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in ((error, "status"), (response, "status_code"), (error, "code")):  # aiohttp warns of `code`
        if isinstance(found := getattr(holder, name, None), int):
            return found
    return None


def _credentials(path: str) -> str:
    scheme = path.partition("://")[0].lower() if is_url(path) else ""
    scheme = {"s3a": "s3", "gcs": "gs"}.get(scheme, scheme)
    return _CREDENTIALS.get(scheme, "the server wants other credentials than those of the environment")
