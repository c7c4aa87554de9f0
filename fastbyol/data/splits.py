"""Finding the splits of a data set: what data.root, data.train_split and data.val_split mean."""

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

from fastbyol.config import DataConfig
from fastbyol.data.beton import SUFFIX, open_beton
from fastbyol.data.folder import index_folder, is_split_name
from fastbyol.data.images import ImageSet
from fastbyol.data.subset import select_classes, select_training_images
from fastbyol.errors import InputError, printable


def open_split(root: str | Path | None, split: str, *, key: str = "data.root", option: str = "") -> ImageSet:
    """Open all images of a split: the folder ROOT/SPLIT or the file ROOT/SPLIT[.beton].

    If ROOT is a file, SPLIT is looked for in ROOT's folder.

    Args:
        root: folder of the data set.
        split: name of the split; '.' is `root` itself, which may then be a .beton file.
        key: config key of `root`, for error messages.
        option: config key of `split`, for error messages.

    Raises:
        InputError: the split is missing, damaged or holds no images.
    """
    if root is None:
        raise InputError(f"{key} is not set: name the folder that holds {split}/ or {split}{SUFFIX}")
    try:
        base = _split_path(Path(root), split)
        if base.is_dir():
            return index_folder(base, key=f"{key}={root}")
        for file in (base, Path(f"{base}{SUFFIX}")):
            if file.suffix == SUFFIX and file.is_file():
                return open_beton(file)
        raise InputError(f"{key}={root}: {_explain_missing(Path(root), split, option)}")
    except OSError as error:
        raise InputError(f"{key}={root}: cannot access {error.filename}: {error.strerror}") from None


def find_images(
    config: DataConfig, split: Literal["train", "val"], *, root: str | Path | None = None, key: str = "data.root"
) -> ImageSet:
    """Open the images of a split that a run uses, as selected by data.classes, data.fraction etc.

    Args:
        config: the data section of the config.
        split: "train" or "val".
        root: folder of the data set; None is data.root.
        key: config key of `root`, for error messages.

    Raises:
        InputError: as `open_split`; data.classes or another selection does not fit the data set.
    """
    images = _find_split(config, split, config.root if root is None else root, key)
    if config.classes:
        images = select_classes(images, config.classes)
    return select_training_images(images, config) if split == "train" else images


def _find_split(config: DataConfig, split: Literal["train", "val"], root: str | Path | None, key: str) -> ImageSet:
    """Open ROOT/SPLIT, or `root` itself if it is a .beton file or a folder without splits.

    Raises:
        InputError: as `open_split`; `root` is one split and the other is wanted.
    """
    name = config.train_split if split == "train" else config.val_split
    is_default = name == getattr(DataConfig, f"{split}_split")
    option = f"{key.removesuffix('root')}{split}_split"
    if root is None or not is_default:
        return open_split(root, name, key=key, option=option)
    try:
        is_file = Path(root).is_file()
        is_split = is_file or (split == "train" and _holds_no_splits(Path(root), config))
    except OSError as error:
        raise InputError(f"{key}={root}: cannot access {error.filename}: {error.strerror}") from None
    if not is_split:
        return open_split(root, name, key=key, option=option)
    if split == "val":
        raise InputError(f"{key}={root} is one file, the training split; {option} names another for validation")
    try:
        images = open_split(root, ".", key=key)
    except InputError as error:
        raise (
            error if is_file else InputError(f"{error} (it has no folder {name}/ and no file {name}{SUFFIX})")
        ) from None
    nested = [path for path in getattr(images, "paths", ()) if any(map(is_split_name, path.split("/")[1:-1]))]
    if nested:
        raise InputError(
            f"{key}={root}: there is no folder {Path(root) / name}, but {nested[0]} lies in a split: name the folder that holds "
            f"the splits; {option}=. takes all of {root}"
        )
    why = "" if is_file else f", since it has no {name}/"
    return replace(images, notes=(printable(f"{key}={root} is the training split itself{why}"), *images.notes))


def _holds_no_splits(root: Path, config: DataConfig) -> bool:
    """Return True if a folder holds neither the config's splits nor anything like a split."""
    if not root.is_dir() or _list_splits(root):
        return False
    named = [root / name for name in (config.train_split, config.val_split)]
    return not any(path.exists() and path.resolve().is_relative_to(root.resolve()) for path in named)


def _list_splits(root: Path) -> list[str]:
    """Return what looks like a split in a folder: folders with a split's name, and .beton files."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.name.endswith(SUFFIX) or (is_split_name(e.name) and e.is_dir()))


def _split_path(root: Path, split: str) -> Path:
    """Return the path of a split: below `root`, or next to it if `root` is a file."""
    return root.parent / split if split != "." and root.is_file() else root / split


def _explain_missing(root: Path, split: str, option: str) -> str:
    """Return why there is no such split, and which splits there are."""
    base = _split_path(root, split)
    if root.is_file() and root.suffix == SUFFIX:
        itself = f"; {option}=. is the file itself" if option.endswith("train_split") else ""
        return f"this file is one split, and there is no {base} next to it{itself}"
    if root.is_file():
        return f"this is a file, not a folder or a {SUFFIX} file; if it is an archive, unpack it"
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
