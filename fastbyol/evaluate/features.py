"""Frozen features of a data set's splits: of a backbone, or its raw pixels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.data.images import ImageSet
from fastbyol.data.native import centre_crops
from fastbyol.errors import InputError
from fastbyol.layers import batch_norms
from fastbyol.precision import autocast

CENTRE_FRACTION = 0.875  # 224/256 of the short side, BYOL's evaluation crop
RAW_PIXELS_SIDE = 64  # raw pixels above this size are averaged down to it, so that a query stays 12,288 numbers


@dataclass(frozen=True)
class Features:
    """Features and labels of one split."""

    x: Tensor  # (N, F) float32, on the device
    labels: Tensor  # (N,) int64, on the device
    classes: int
    bad: dict[int, str]  # images left out: index -> why


def extract(
    backbone: nn.Module | None,
    split: ImageSet,
    *,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    batch_size: int = 256,
) -> Features:
    """Features of all images of a split in index order: centre crop, eval mode, autocast to `dtype`.

    Args:
        backbone: (n, 3, S, S) -> (n, F); None gives raw pixels. Its train/eval mode is restored.
        size: S.

    Raises:
        InputError: no image of the split can be read.
    """
    training = backbone is not None and backbone.training
    rows: list[Tensor] = []
    kept: list[NDArray[np.int64]] = []
    bad: dict[int, str] = {}
    try:
        if backbone is not None:
            backbone.eval()
        with torch.no_grad(), autocast(device, dtype):
            crops = centre_crops(
                split, size=size, fraction=CENTRE_FRACTION, batch_size=batch_size, threads=threads, bad=bad
            )
            for images, indices in crops:
                images = images.to(device)
                rows.append((_raw_pixels(images) if backbone is None else backbone(images)).float())
                kept.append(indices)
    finally:
        if backbone is not None:
            backbone.train(training)
    if not rows:
        raise InputError(f"{split.root}: none of the {len(split)} images can be read")
    labels = torch.from_numpy(split.labels[np.concatenate(kept)]).to(device)
    return Features(torch.cat(rows), labels, len(split.classes), bad)


def calibrate_batchnorm(
    backbone: nn.Module, split: ImageSet, *, size: int, device: torch.device, threads: int, batch_size: int = 256
) -> None:
    """Replaces BatchNorm's running statistics by their average over the split's images (float32).

    An untrained network has none yet; with the initial ones (mean 0, variance 1) it would be a weaker baseline than
    random weights deserve.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    for norm in batch_norms(backbone):
        norm.views = 1  # plain batches
    backbone.train()
    with torch.no_grad():
        for images, _ in centre_crops(
            split, size=size, fraction=CENTRE_FRACTION, batch_size=batch_size, threads=threads, bad={}
        ):
            if len(images) > 1:
                backbone(images.to(device))


def check_splits(train: ImageSet, val: ImageSet) -> None:
    """What every classifier needs of the two splits.

    Raises:
        InputError: fewer than two classes, or other classes in val than in train.
    """
    if len(train.classes) < 2:
        raise InputError(f"{train.root} has {len(train.classes)} class(es): a classifier needs at least 2")
    if train.classes != val.classes:
        extra = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"{train.root} and {val.root} have different classes, for example {extra[0]!r}")


def _raw_pixels(images: Tensor) -> Tensor:
    if images.shape[-1] > RAW_PIXELS_SIDE:
        images = F.adaptive_avg_pool2d(images, RAW_PIXELS_SIDE)
    return images.flatten(1)
