"""Images -> batches of two views. `find_images` (`open_split` for all of a split) and `build_loader` are the only doors."""

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.batch import Batch, Loader
from fastbyol.data.beton import BetonFile, open_beton
from fastbyol.data.folder import index_folder, is_split_name
from fastbyol.data.images import ImageSet
from fastbyol.data.native import NativeLoader
from fastbyol.data.subset import only_classes, training_part
from fastbyol.data.views import AUGMENTATIONS
from fastbyol.data.workers import preserve_torch_threads
from fastbyol.errors import InputError, printable
from fastbyol.runtime.environment import FFCV_COMMAND, dali_install_command, has_module

__all__ = ["Batch", "ImageSet", "Loader", "build_loader", "choose_backend", "find_images", "open_split"]

BETON = ".beton"


def open_split(root: str | Path | None, split: str, *, key: str = "data.root", option: str = "") -> ImageSet:
    """All images of a split: the folder ROOT/SPLIT, or the file ROOT/SPLIT or ROOT/SPLIT.beton; beside ROOT where that is a file.

    Args:
        root: the data set's folder.
        split: '.' is `root` itself, which may then be a .beton file.
        key: the config key named in error messages.
        option: the key that names the split, likewise.

    Raises:
        InputError: the split is missing, damaged or holds no images.
    """
    if root is None:
        raise InputError(f"{key} is not set: name the folder that holds {split}/ or {split}{BETON}")
    try:
        base = _place(Path(root), split)
        if base.is_dir():
            return index_folder(base, key=f"{key}={root}")
        for file in (base, Path(f"{base}{BETON}")):
            if file.suffix == BETON and file.is_file():
                return open_beton(file)
        raise InputError(f"{key}={root}: {_missing(Path(root), split, option)}")
    except OSError as error:
        raise InputError(f"{key}={root}: cannot look at {error.filename}: {error.strerror}") from None


def find_images(
    config: DataConfig, split: Literal["train", "val"], *, root: str | Path | None = None, key: str = "data.root"
) -> ImageSet:
    """The images of a split that a run uses: its classes and, of the training split, its part.

    Args:
        root: another data set's folder than the config's.

    Raises:
        InputError: as `open_split`; data.classes and the like do not fit the data set.
    """
    images = _find_split(config, split, config.root if root is None else root, key)
    if config.classes:
        images = only_classes(images, config.classes)
    return training_part(images, config) if split == "train" else images


def _find_split(config: DataConfig, split: Literal["train", "val"], root: str | Path | None, key: str) -> ImageSet:
    """ROOT/SPLIT, or `root` itself where it is a .beton file, or a folder of images or classes and not of splits.

    Raises:
        InputError: as `open_split`; `root` is one split and the other is asked for.
    """
    name = config.train_split if split == "train" else config.val_split
    left_at_default = name == getattr(DataConfig, f"{split}_split")
    option = f"{key.removesuffix('root')}{split}_split"
    if root is None or not left_at_default:
        return open_split(root, name, key=key, option=option)
    try:
        is_file = Path(root).is_file()
        is_split = is_file or (split == "train" and _holds_no_splits(Path(root), config))
    except OSError as error:
        raise InputError(f"{key}={root}: cannot look at {error.filename}: {error.strerror}") from None
    if not is_split:
        return open_split(root, name, key=key, option=option)
    if split == "val":
        raise InputError(f"{key}={root} is one file, the training split; {option} names another for validation")
    try:
        images = open_split(root, ".", key=key)
    except InputError as error:
        raise (
            error if is_file else InputError(f"{error} (it has no folder {name}/ and no file {name}{BETON})")
        ) from None
    deeper = [path for path in getattr(images, "paths", ()) if any(map(is_split_name, path.split("/")[1:-1]))]
    if deeper:
        raise InputError(
            f"{key}={root}: there is no folder {Path(root) / name}, but {deeper[0]} lies in a split: name the folder that holds "
            f"the splits; {option}=. takes all of {root}"
        )
    why = "" if is_file else f", since it has no {name}/"
    return replace(images, notes=(printable(f"{key}={root} is the training split itself{why}"), *images.notes))


def _holds_no_splits(root: Path, config: DataConfig) -> bool:
    """Whether a folder holds neither of the config's splits, nor anything else that looks like one."""
    if not root.is_dir() or _splits(root):
        return False
    named = [root / name for name in (config.train_split, config.val_split)]
    return not any(path.exists() and path.resolve().is_relative_to(root.resolve()) for path in named)


def _splits(root: Path) -> list[str]:
    """What a folder holds that looks like a split: folders with a split's name and .beton files."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.name.endswith(BETON) or (is_split_name(e.name) and e.is_dir()))


def _place(root: Path, split: str) -> Path:
    """Where a split lies: below `root`, or beside it where that is a file."""
    return root.parent / split if split != "." and root.is_file() else root / split


def _missing(root: Path, split: str, option: str) -> str:
    """Why there is no such split, and what there is instead."""
    base = _place(root, split)
    if root.is_file() and root.suffix == BETON:
        itself = f"; {option}=. is the file itself" if option.endswith("train_split") else ""
        return f"this file is one split, and there is no {base} beside it{itself}"
    if root.is_file():
        return f"this is a file, not a folder or a {BETON} file; if it is an archive, unpack it"
    text = f"there is no folder {base}" + (f" or file {base}{BETON}" if base.suffix != BETON else "")
    there = _splits(root) if root.is_dir() else []
    stems = {name.removesuffix(BETON).casefold(): name for name in there}
    wanted = split.removesuffix(BETON).casefold()
    alike = [s for s in stems if s.startswith(wanted)] or difflib.get_close_matches(wanted, stems)
    if alike and option:
        return f"{text}; did you mean {option}={stems[alike[0]]}?"
    if there:
        text += f"; there is {', '.join(there)}"
    if option.endswith("val_split"):
        return f"{text}; {option}=PATH names another"
    return f"{text}; {option}=. takes all of {root}" if there and option else text


def choose_backend(config: DataConfig, images: ImageSet, device: torch.device) -> tuple[str, str]:
    """What reads and decodes the images here: "native", "dali" or "ffcv", and why.

    Raises:
        InputError: data.backend asks for what is not installed or cannot read these images.
    """
    if config.backend == "auto":
        if device.type != "cuda":
            return "native", "the device is the CPU"
        if has_module("nvidia.dali"):
            return "dali", "the GPU decodes"
        return "native", f"DALI is not installed: {dali_install_command()}"
    if config.backend == "dali" and not has_module("nvidia.dali"):
        raise InputError(f"data.backend=dali: DALI is not installed: {dali_install_command()}")
    if config.backend == "ffcv":
        if not has_module("ffcv"):
            raise InputError(f"data.backend=ffcv: FFCV is not installed: {FFCV_COMMAND}")
        if not isinstance(images, BetonFile):
            raise InputError(
                f"data.backend=ffcv reads .beton files only, {images.root} is a folder: fastbyol pack {images.root} "
                f"{images.root}{BETON}"
            )
    return config.backend, "data.backend asks for it"


def build_loader(
    config: DataConfig,
    images: ImageSet,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    shard: NDArray[np.int64] | None = None,
) -> Loader:
    """The loader of a run's training split.

    Args:
        shard: the positions of every batch that this rank makes, in order; None is all of them.

    Raises:
        InputError: there are fewer images than one batch; data.backend cannot be used here.
    """
    if len(images) < config.batch_size:
        raise InputError(
            f"data.batch_size={config.batch_size} but {images.root} has {len(images)} images: "
            f"lower data.batch_size to at most {len(images)}"
        )
    backend, _ = choose_backend(config, images, device)
    options: dict[str, Any] = {
        "images": images,
        "batch_size": config.batch_size,
        "shard": np.arange(config.batch_size) if shard is None else shard,
        "size": config.image_size_px,
        "augmentation": AUGMENTATIONS[config.augmentation],
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "max_bad_fraction": config.max_bad_fraction,
        "timeout_s": config.timeout_s,
        "threads": config.threads,
        "prefetch_batches": config.prefetch_batches,
    }
    if backend == "ffcv":
        with preserve_torch_threads():
            from fastbyol.data.ffcv import FfcvLoader

            return FfcvLoader(**options)
    options |= {"readers": config.readers, "readahead_images": config.readahead_images}
    if backend == "dali":
        from fastbyol.data.dali import DaliLoader

        return DaliLoader(**options, hw_decoder_load=config.hw_decoder_load, preallocate_px=config.preallocate_px)
    return NativeLoader(**options, dct_scaling=config.dct_scaling)
