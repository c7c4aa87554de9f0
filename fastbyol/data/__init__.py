"""Images -> batches of two views. `find_images` (`open_split` for all of a split) and `build_loader` are the only doors."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.batch import Batch, Loader
from fastbyol.data.beton import BetonFile, open_beton
from fastbyol.data.folder import index_folder
from fastbyol.data.images import ImageSet
from fastbyol.data.native import NativeLoader
from fastbyol.data.subset import only_classes, training_part
from fastbyol.data.workers import torchs_threads_kept
from fastbyol.environment import FFCV_COMMAND, dali_command, has_module
from fastbyol.errors import InputError
from fastbyol.views import RECIPES

__all__ = ["Batch", "ImageSet", "Loader", "build_loader", "choose_backend", "find_images", "open_split"]

BETON = ".beton"


def open_split(root: str | Path | None, split: str, *, key: str = "data.root") -> ImageSet:
    """All images of a split: the folder ROOT/SPLIT, or the file ROOT/SPLIT or ROOT/SPLIT.beton.

    Args:
        root: the data set's folder.
        split: '.' is `root` itself.
        key: the config key named in error messages.

    Raises:
        InputError: the split is missing, damaged or holds no images.
    """
    if root is None:
        raise InputError(f"{key} is not set: name the folder that holds {split}/ or {split}{BETON}")
    base = Path(root) / split
    if base.is_dir():
        return index_folder(base, key=f"{key}={root}")
    for file in (base, base.with_name(base.name + BETON)):
        if file.suffix == BETON and file.is_file():
            return open_beton(file)
    beton = f" or file {base}{BETON}" if base.suffix != BETON else ""
    raise InputError(f"{key}={root}: there is no folder {base}{beton}")


def find_images(
    config: DataConfig, split: Literal["train", "val"], *, root: str | Path | None = None, key: str = "data.root"
) -> ImageSet:
    """The images of a split that a run uses: its classes and, of the training split, its part.

    Args:
        root: another data set's folder than the config's.

    Raises:
        InputError: as `open_split`; data.classes and the like do not fit the data set.
    """
    name = config.train_split if split == "train" else config.val_split
    images = open_split(config.root if root is None else root, name, key=key)
    if config.classes:
        images = only_classes(images, config.classes)
    return training_part(images, config) if split == "train" else images


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
        return "native", f"DALI is not installed: {dali_command()}"
    if config.backend == "dali" and not has_module("nvidia.dali"):
        raise InputError(f"data.backend=dali: DALI is not installed: {dali_command()}")
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
        "recipe": RECIPES[config.recipe],
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "max_bad_fraction": config.max_bad_fraction,
        "timeout_s": config.timeout_s,
        "threads": config.threads,
        "prefetch_batches": config.prefetch_batches,
    }
    if backend == "ffcv":
        with torchs_threads_kept():
            from fastbyol.data.ffcv import FfcvLoader

            return FfcvLoader(**options)
    options |= {"readers": config.readers, "readahead_images": config.readahead_images}
    if backend == "dali":
        from fastbyol.data.dali import DaliLoader

        return DaliLoader(**options, hw_decoder_load=config.hw_decoder_load, preallocate_px=config.preallocate_px)
    return NativeLoader(**options, dct_scaling=config.dct_scaling)
