"""Images -> batches of two views. `build_loader` is the only door."""

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config import DataConfig
from fastbyol.data.batch import Batch, Loader
from fastbyol.data.folder import ImageFolder, index_folder
from fastbyol.data.native import NativeLoader
from fastbyol.errors import InputError
from fastbyol.views import RECIPES

__all__ = ["Batch", "ImageFolder", "Loader", "build_loader", "index_folder"]


def build_loader(
    config: DataConfig,
    folder: ImageFolder,
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
        InputError: the folder has fewer images than one batch.
    """
    if len(folder) < config.batch_size:
        raise InputError(
            f"data.batch_size={config.batch_size} but {folder.root} has {len(folder)} images: "
            f"lower data.batch_size to at most {len(folder)}"
        )
    return NativeLoader(
        folder,
        batch_size=config.batch_size,
        shard=np.arange(config.batch_size) if shard is None else shard,
        size=config.image_size_px,
        recipe=RECIPES[config.recipe],
        seed=seed,
        threads=config.threads,
        prefetch_batches=config.prefetch_batches,
        readers=config.readers,
        readahead_images=config.readahead_images,
        dct_scaling=config.dct_scaling,
        dtype=dtype,
        device=device,
        max_bad_fraction=config.max_bad_fraction,
        timeout_s=config.timeout_s,
    )
