"""Data backends: which library reads and decodes the images, and the loader that uses it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.batch import Loader
from fastbyol.data.beton import SUFFIX, BetonFile
from fastbyol.data.crops import DecoderName
from fastbyol.data.images import Images
from fastbyol.data.native import NativeLoader
from fastbyol.data.remote import READERS
from fastbyol.data.views import AUGMENTATIONS
from fastbyol.data.workers import preserve_torch_threads
from fastbyol.errors import InputError
from fastbyol.runtime.environment import FFCV_COMMAND, dali_install_command, has_module

_DISK_READERS = 4


def choose_backend(config: DataConfig, images: Images, device: torch.device) -> tuple[str, str]:
    """Return the backend, "native", "dali" or "ffcv", and the reason for it.

    Raises:
        InputError: the backend of data.backend is not installed or cannot read these images.
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
                f"data.backend=ffcv reads .beton files only, {images.root} is none: fastbyol pack {images.root} "
                f"{str(images.root).rpartition('/')[2]}{SUFFIX}"
            )
    return config.backend, "set by data.backend"


def choose_decoder(config: DataConfig, device: torch.device) -> DecoderName:
    """Return what decodes the images of evaluations.

    That is DALI on a GPU where it decodes for training too.
    """
    is_dali = device.type == "cuda" and config.backend in ("auto", "dali") and has_module("nvidia.dali")
    return "dali" if is_dali else "native"


def build_loader(
    config: DataConfig,
    images: Images,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    shard: NDArray[np.int64] | None = None,
) -> Loader:
    """Build the loader of a training split.

    Args:
        config: the data section of the config.
        images: the split.
        seed: seed of the order and the views.
        device: where batches are delivered.
        dtype: dtype of the views.
        shard: positions within every batch that this rank makes, in order; None is all of them.

    Raises:
        InputError: there are fewer images than one batch, or `choose_backend` raises it.
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
    readers = config.readers or (READERS if images.is_remote else _DISK_READERS)
    options |= {"readers": readers, "readahead_images": config.readahead_images}
    if backend == "dali":
        from fastbyol.data.dali import DaliLoader

        return DaliLoader(**options, hw_decoder_load=config.hw_decoder_load, preallocate_px=config.preallocate_px)
    return NativeLoader(**options, dct_scaling=config.dct_scaling)
