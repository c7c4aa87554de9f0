"""Labelled splits of a data set, and their frozen features: of a backbone, or its raw pixels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config import Config, EvalConfig
from fastbyol.data import find_images
from fastbyol.data.images import ImageSet
from fastbyol.data.native import centre_crops
from fastbyol.errors import InputError
from fastbyol.evaluate.protocol import Frame
from fastbyol.layers import batch_norms
from fastbyol.precision import autocast

CENTRE_FRACTION = 0.875  # 224/256 of the short side, BYOL's evaluation crop
RAW_PIXELS_SIDE = 64  # raw pixels above this size are averaged down to it, so that a query stays 12,288 numbers


class Splits(NamedTuple):
    """The labelled images of a data set."""

    train: ImageSet
    val: ImageSet


def open_splits(options: EvalConfig, config: Config) -> Splits:
    """Both splits, with the run's classes, but every image of them: what pre-training left out is evaluated all the same.

    Raises:
        InputError: a split is missing, or the two do not fit each other.
    """
    whole = replace(config.data, fraction=1.0, images_per_class=0, file_list=None)
    root = options.root or config.data.root
    splits = Splits(*(find_images(whole, split, root=root, key="root") for split in ("train", "val")))
    check_splits(*splits)
    return splits


def split_facts(splits: Splits) -> dict[str, Any]:
    """What a result file says of the data."""
    return {
        "train_images": len(splits.train),
        "val_images": len(splits.val),
        "classes": len(splits.train.classes),
    }


@dataclass(frozen=True)
class Features:
    """Features and labels of one split."""

    x: Tensor  # (N, F) float32, on the device
    labels: Tensor  # (N,) int64, on the device
    classes: int
    bad: dict[int, str]  # images left out: index -> why


def frozen(
    backbone: nn.Module | None,
    split: ImageSet,
    frame: Frame,
    what: str = "features",
    alter: Callable[[Tensor, NDArray[np.int64]], Tensor] | None = None,
) -> Features:
    """Features of a split as a protocol wants them: with a progress bar, unreadable images noted in frame.bad.

    Raises:
        InputError: no image can be read, or a feature is not finite.
    """
    found = extract(
        backbone,
        split,
        size=frame.size,
        device=frame.device,
        dtype=frame.dtype,
        threads=frame.threads,
        alter=alter,
        track=lambda items, total: frame.track(what, items, total),
    )
    frame.bad.update((split.where(index), reason) for index, reason in found.bad.items())
    check_finite(found)
    return found


def check_finite(*features: Features) -> None:
    """Raises InputError where a feature is NaN or infinite."""
    if not all(torch.isfinite(f.x).all() for f in features):
        raise InputError("the features hold NaN or infinity: the network has diverged")


def extract(
    backbone: nn.Module | None,
    split: ImageSet,
    *,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    batch_size: int = 256,
    alter: Callable[[Tensor, NDArray[np.int64]], Tensor] | None = None,
    track: Callable[[Any, int], Any] = lambda items, total: items,
) -> Features:
    """Features of all images of a split in index order: centre crop, eval mode, autocast to `dtype`.

    Args:
        backbone: (n, 3, S, S) -> (n, F); None gives raw pixels. Its train/eval mode is restored.
        size: S.
        alter: (normalised crops (n, 3, S, S), their indices (n,)) -> other crops, before the backbone sees them.
        track: (batches, their number) -> the batches, beside a progress bar.

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
            for images, indices in track(crops, -(-len(split) // batch_size)):
                images = images if alter is None else alter(images, indices)
                images = images.to(device)
                rows.append((raw_pixels(images) if backbone is None else backbone(images)).float())
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


def raw_pixels(images: Tensor) -> Tensor:
    """(n, 3, S, S) -> (n, 3 * s * s), s = S up to 64 pixels, else averaged down to 64."""
    if images.shape[-1] > RAW_PIXELS_SIDE:
        images = F.adaptive_avg_pool2d(images, RAW_PIXELS_SIDE)
    return images.flatten(1)
