"""Finding the splits of a data set: what data.root, data.train_split and data.val_split mean."""

import difflib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastbyol.config import DataConfig
from fastbyol.data.beton import SUFFIX
from fastbyol.data.folder import index_folder, is_split_name
from fastbyol.data.formats import (
    FILES,
    NoImages,
    find_shards,
    is_archive,
    open_file,
    open_paths,
    open_pattern,
    open_url,
    shards_in,
    split_of,
)
from fastbyol.data.images import Images
from fastbyol.data.objects import as_images
from fastbyol.data.remote import CacheOptions
from fastbyol.data.storage import is_pattern, is_url
from fastbyol.data.subset import select_classes, select_training_images
from fastbyol.errors import InputError
from fastbyol.plugins import open_image_set
from fastbyol.settings.limits import absolute_path


class Sources(NamedTuple):
    """Images that replace the splits of data.root; None takes the split.

    Each is a path, a URL, or what `as_images` accepts.
    """

    train: Any = None
    val: Any = None


def open_split(
    root: str | Path | None, split: str, *, key: str = "data.root", option: str = "", cache: CacheOptions | None = None
) -> Images:
    """Open all images of a split: a folder, a file or shards (see formats.py).

    If ROOT is a file, SPLIT is looked for in ROOT's folder.

    Args:
        root: folder or URL of the data set.
        split: name of the split; '.' is `root` itself, which may then be a file or a pattern.
        key: config key of `root`, for error messages.
        option: config key of `split`, for error messages.
        cache: of remote files; None is the default one.

    Raises:
        InputError: the split is missing, damaged or holds no images.
        StorageError: a remote storage does not answer.
    """
    cache = cache or CacheOptions()
    if root is None:
        raise InputError(f"{key} is not set: name the folder that holds {split}/ or {split}{SUFFIX}")
    if is_url(root) and (found := open_image_set(str(root), split, key)) is not None:
        return as_images(found, name=str(root))
    if is_url(split) or (is_url(root) and not os.path.isabs(split)):  # noqa: PTH117 - a split may be a URL
        return open_url(str(root), split, cache, key)
    try:
        base = _split_path(Path(root), split)
        if is_pattern(base):
            return open_pattern(str(base), f"{key}={root}")
        if base.is_dir():
            shards = shards_in(base)
            return open_paths(base, shards) if shards else index_folder(base, key=f"{key}={root}")
        for file in (base, *(Path(f"{base}{suffix}") for suffix in FILES)):
            if file.suffix.lower() in FILES and file.is_file():
                return open_file(file, split, cache)
        if split != "." and (shards := find_shards(Path(root), split)):
            return open_paths(Path(root), shards)
        raise InputError(f"{key}={root}: {_explain_missing(Path(root), split, option)}")
    except OSError as error:
        raise InputError(f"{key}={root}: cannot access {error.filename}: {error.strerror}") from None


def find_images(
    config: DataConfig, split: Literal["train", "val"], *, root: Any = None, key: str = "data.root"
) -> Images:
    """Open the images of a split that a run uses, as selected by data.classes, data.fraction etc.

    Args:
        config: the data section of the config.
        split: "train" or "val".
        root: folder or URL of the data set, or the images of the split (see `as_images`); None is
            data.root.
        key: config key of `root`, for error messages.

    Raises:
        InputError: as `open_split` or `as_images`; data.classes or another selection does not fit
            the data set.
    """
    if root is None or isinstance(root, str | os.PathLike):
        images = _find_split(config, split, config.root if root is None else _absolute(root, key), key)
    else:
        images = as_images(root)
    if config.classes:
        images = select_classes(images, config.classes)
    return select_training_images(images, config) if split == "train" else images


def _absolute(path: str | os.PathLike, key: str) -> str:
    return path if isinstance(path, str) and is_url(path) else absolute_path(os.fspath(path), key)


def _find_split(config: DataConfig, split: Literal["train", "val"], root: str | None, key: str) -> Images:
    """Open ROOT/SPLIT, or `root` itself if it is a file, a pattern or a folder without splits.

    Raises:
        InputError: as `open_split`; `root` is one split and the other is wanted.
    """
    name = config.train_split if split == "train" else config.val_split
    option = f"{key.removesuffix('root')}{split}_split"
    cache = CacheOptions(config.cache_dir, round(config.cache_gb * 1e9))
    if root is None or name != getattr(DataConfig, f"{split}_split"):
        return open_split(root, name, key=key, option=option, cache=cache)
    try:
        is_single = is_pattern(root) or (root.lower().endswith(FILES) if is_url(root) else Path(root).is_file())
        is_split = split == "train" and not is_single and not is_url(root) and _holds_no_splits(Path(root), config)
    except OSError as error:
        raise InputError(f"{key}={root}: cannot access {error.filename}: {error.strerror}") from None
    if is_single and root.lower().endswith(".npz"):  # it may hold all splits
        return open_file(Path(root), name, cache)
    if is_single and split == "val":
        raise InputError(f"{key}={root} is one file, the training split; {option} names another for validation")
    if is_single:
        return _as_split(open_split(root, ".", key=key, cache=cache), f"{key}={root}")
    why = f", since it has no {name}/"
    if not is_split:
        try:
            return open_split(root, name, key=key, option=option, cache=cache)
        except NoImages:  # of a URL
            if split == "val":
                raise
            return _as_split(open_split(root, ".", key=key, cache=cache), f"{key}={root}", why)
    try:
        images = open_split(root, ".", key=key, cache=cache)
    except InputError as error:
        raise InputError(f"{error} (it has no folder {name}/ and no file {name}{SUFFIX})") from None
    nested = [path for path in getattr(images, "paths", ()) if any(map(is_split_name, path.split("/")[1:-1]))]
    if nested:
        raise InputError(
            f"{key}={root}: there is no folder {Path(root) / name}, but {nested[0]} lies in a split: name the folder that holds "
            f"the splits; {option}=. takes all of {root}"
        )
    return _as_split(images, f"{key}={root}", why)


def _as_split(images: Images, root: str, why: str = "") -> Images:
    """Return the images with a note that the root is the training split."""
    images.add_note(f"{root} is the training split itself{why}")
    return images


def _holds_no_splits(root: Path, config: DataConfig) -> bool:
    """Return True if a folder holds neither the config's splits nor anything like a split."""
    if not root.is_dir() or _list_splits(root) or find_shards(root, config.train_split):
        return False
    named = [root / name for name in (config.train_split, config.val_split)]
    return not any(path.exists() and path.resolve().is_relative_to(root.resolve()) for path in named)


def _list_splits(root: Path) -> list[str]:
    """Return what looks like a split in a folder: folders with a split's name, .beton files, and
    the names of the splits of other files.
    """
    with os.scandir(root) as entries:
        found = {
            split_of(e.name) if e.is_file() else e.name if is_split_name(e.name) and e.is_dir() else "" for e in entries
        }
    return sorted(found - {""})


def _split_path(root: Path, split: str) -> Path:
    """Return the path of a split: below `root`, or next to it if `root` is a file or a pattern."""
    return root.parent / split if split != "." and (root.is_file() or is_pattern(root)) else root / split


def _explain_missing(root: Path, split: str, option: str) -> str:
    """Return why there is no such split, and which splits there are."""
    base = _split_path(root, split)
    if root.is_file() and root.suffix.lower() in FILES:
        itself = f"; {option}=. is the file itself" if option.endswith("train_split") else ""
        return f"this file is one split, and there is no {base} next to it{itself}"
    if root.is_file():
        remedy = "unpack it" if is_archive(root) else f"fastbyol reads folders and {', '.join(FILES)} files"
        return f"this is a file, not a folder or a file of images: {remedy}"
    text = f"there is no folder {base}" + (f" or file {base}{SUFFIX}" if base.suffix != SUFFIX else "")
    available = _list_splits(root) if root.is_dir() else []
    stems = {name.removesuffix(SUFFIX).casefold(): name for name in available}
    wanted = split.removesuffix(SUFFIX).casefold()
    similar = [s for s in stems if s.startswith(wanted)] or difflib.get_close_matches(wanted, stems)
    if similar and option:
        return f"{text}; did you mean {option}={stems[similar[0]]}?"
    if available:
        text += f"; there is {', '.join(available)}"
    if option.endswith("val_split"):
        return f"{text}; {option}=PATH names another"
    return f"{text}; {option}=. takes all of {root}" if available and option else text
