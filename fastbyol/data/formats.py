"""Files of images other than plain folders: which ones a path or URL stands for, and their readers.

ROOT/train.beton, .csv, .tsv, .npz, .tar, .parquet         one file
ROOT/train/*.tar, ROOT/train-*.tar                         tar shards
ROOT/train/*.parquet, ROOT/data/train-*.parquet, ...       Parquet, as on the Hugging Face hub
train-{0000..0146}.tar, *.parquet                          patterns
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from fastbyol.data import beton
from fastbyol.data.beton import open_beton
from fastbyol.data.folder import is_split_name
from fastbyol.data.images import Images
from fastbyol.data.objects import open_npz
from fastbyol.data.parquet import open_parquet
from fastbyol.data.remote import CacheOptions, Remote, open_remote
from fastbyol.data.storage import RangeFile, expand_braces, expand_local, is_pattern, is_url, open_local
from fastbyol.data.table import SUFFIXES, open_remote_folder, open_table, read_list
from fastbyol.data.tar import open_tars
from fastbyol.errors import InputError

SHARDS = (".tar", ".parquet")
FILES = (beton.SUFFIX, *SUFFIXES, ".npz", *SHARDS)
"""Suffixes of files that are a split, or a part of one."""
_ARCHIVES = (".zip", ".tgz", ".gz", ".xz", ".bz2", ".zst", ".rar", ".7z")


class NoImages(InputError):
    """A URL holds no images of a split."""


def open_file(path: Path, split: str, cache: CacheOptions) -> Images:
    """Return the images of a file that is a whole split.

    Args:
        split: name of the split, for files that hold several.

    Raises:
        InputError: the file cannot be read or has no images.
    """
    suffix = path.suffix.lower()
    if suffix == beton.SUFFIX:
        return open_beton(path)
    if suffix == ".npz":
        return open_npz(path, split)
    if suffix in SUFFIXES:
        return open_table(str(path), read_list(path), cache)
    return _open_shards(path, open_local([path], str(path)))


def open_pattern(pattern: str, key: str) -> Images:
    """Return the images of the files on a disk that a pattern stands for.

    Raises:
        InputError: there is none, or they are no shards of one format.
    """
    paths = expand_local(pattern)
    if not paths:
        raise InputError(f"{key}: no file matches {pattern}")
    return _open_shards(pattern, open_local(paths, key))


def find_shards(root: Path, split: str) -> list[Path]:
    """Return the shards of a split in a folder, sorted: in ROOT/SPLIT or ROOT/data/SPLIT, or files
    there whose names begin with the split's name.
    """
    for base in (root, root / "data"):
        if base.is_dir():
            with os.scandir(str(base)) as entries:
                names = [entry.name for entry in entries if entry.name.startswith(split)]
            if shards := [base / name for name in _shard_names(names, split)]:
                return shards
            if split in names and (base / split).is_dir() and (shards := shards_in(base / split)):
                return shards
    return []


def shards_in(folder: Path) -> list[Path]:
    """Return the shards that lie in a folder, sorted; nothing if it holds anything else."""
    names = []
    with os.scandir(str(folder)) as entries:
        for entry in entries:
            if not entry.name.startswith((".", "_")):
                if not entry.name.lower().endswith(SHARDS) or not entry.is_file():
                    return []  # at once: an image folder may have a million entries
                names.append(entry.name)
    return [folder / name for name in sorted(names)]


def open_paths(root: Path, paths: list[Path]) -> Images:
    """Return the images of shards on a disk."""
    return _open_shards(root, open_local(paths, str(root)))


def open_url(root: str, split: str, cache: CacheOptions, key: str) -> Images:
    """Return the images of a split of a remote data set.

    Args:
        root: URL of a folder, a file or a pattern.
        split: name of the split below `root`, or "." for `root` itself.

    Raises:
        InputError: there is no such split, or access is denied.
        StorageError: the storage does not answer.
    """
    base, is_single = root.rstrip("/"), bool(_suffix(root)) or is_pattern(root)
    if is_url(split):
        base, is_single, url = split.rpartition("/")[0], False, split
    elif split == ".":
        base, url = (base.rpartition("/")[0] if is_single else base), base
    else:  # beside a file, below a folder
        base = base.rpartition("/")[0] if is_single else base
        url = f"{base}/{split}"
    remote = open_remote(base, cache)
    if is_pattern(url):
        parts = expand_braces(url)
        urls = [found for part in parts for found in (remote.glob(part) if any(c in part for c in "*[") else [part])]
        if not urls:
            raise InputError(f"{key}: no file matches {url}")
        return _open_shards(url, remote.open_files(urls))
    if _suffix(url):
        return _open_remote_file(url, remote, cache)
    names = remote.ls(url)
    visible = sorted(name for name in names if not name.startswith((".", "_")))
    if visible and all(name.lower().endswith(SHARDS) and not names[name] for name in visible):
        return _open_shards(url, remote.open_files([f"{url}/{name}" for name in visible]))
    if names and (images := open_remote_folder(url, remote)) is not None:
        return images
    if split != "." and not is_url(split):
        for folder in (base, f"{base}/data"):
            beside = remote.ls(folder)
            single = [f"{split}{suffix}" for suffix in FILES if f"{split}{suffix}" in beside]
            if single:
                return _open_remote_file(f"{folder}/{single[0]}", remote, cache)
            if shards := _shard_names(beside, split):
                return _open_shards(url, remote.open_files([f"{folder}/{name}" for name in shards]))
    scheme = url.partition("://")[0]
    hint = "; name the files, as in train-{0000..0146}.tar" if scheme in ("http", "https") else ""
    raise NoImages(f"{key}: there are no images in {url}{hint}")


def _open_remote_file(url: str, remote: Remote, cache: CacheOptions) -> Images:
    suffix = _suffix(url)
    try:
        if suffix in SUFFIXES:
            return open_table(url, remote.download(url), cache)
        if suffix in SHARDS:
            return _open_shards(url, remote.open_files([url]))
    except FileNotFoundError:
        raise InputError(f"{url}: no such file") from None
    raise InputError(f"{url}: {suffix} files are read from a disk only; use tar shards or Parquet")


def _open_shards(root: Path | str, files: list[RangeFile]) -> Images:
    suffixes = {_suffix(file.path) for file in files}
    if suffixes == {".tar"}:
        return open_tars(root, files)
    if suffixes == {".parquet"}:
        return open_parquet(root, files)
    others = sorted(suffixes - set(SHARDS)) or sorted(suffixes)
    raise InputError(f"{root}: stands for {', '.join(s or 'other' for s in others)} files; name .tar or .parquet files")


def _suffix(path: str) -> str:
    """Return the suffix of a file of images, "" for another name."""
    found = os.path.splitext(path)[1].lower()  # noqa: PTH122 - a URL is no Path
    return found if found in FILES else ""


def _shard_names(names: Iterable[str], split: str) -> list[str]:
    """Return the sorted names of a split's shards: SPLIT-... with their suffix."""
    pattern = re.compile(re.escape(split) + r"[-_.].*(\.tar|\.parquet)", re.IGNORECASE)
    return sorted(name for name in names if pattern.fullmatch(name))


def split_of(name: str) -> str:
    """Return the split that a file belongs to by its name: its own name for a .beton file, "train"
    for train.csv and train-0000.tar; "" for other files.
    """
    suffix = _suffix(name)
    if suffix == beton.SUFFIX:
        return name
    stem = re.split(r"[-_.]", name.removesuffix(suffix))[0] if suffix else ""
    return stem if is_split_name(stem) else ""


def is_archive(path: Path) -> bool:
    """Return True for names of archives that must be unpacked."""
    return path.name.lower().endswith(_ARCHIVES)
