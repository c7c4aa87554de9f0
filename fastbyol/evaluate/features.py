"""Labeled splits of a data set, and their frozen features: of a backbone, or its raw pixels."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config import Config, EvalConfig
from fastbyol.data import find_images
from fastbyol.data.crops import center_crops, random_crops
from fastbyol.data.images import ImageSet
from fastbyol.errors import InputError, join_names
from fastbyol.evaluate.protocol import EvalContext
from fastbyol.layers import one_view
from fastbyol.precision import autocast

CENTER_FRACTION = 0.875  # 224/256 of the short side, BYOL's evaluation crop
RAW_PIXELS_SIDE = 64  # raw pixels above this size are averaged down to it, so that a query stays 12,288 numbers


class Splits(NamedTuple):
    """The labeled images of a data set."""

    train: ImageSet
    val: ImageSet

    @property
    def classes(self) -> list[str]:
        """Of both."""
        return self.train.classes


def open_splits(options: EvalConfig, config: Config) -> Splits:
    """Both splits, with the run's classes, but every image of them: what pre-training left out is evaluated all the same.

    Raises:
        InputError: a split is missing, or the two do not fit each other.
    """
    data = replace(
        config.data,
        root=options.root or config.data.root,
        train_split=options.train_split or config.data.train_split,
        val_split=options.val_split or config.data.val_split,
        fraction=1.0,
        images_per_class=0,
        file_list=None,
    )
    elsewhere = Path(data.train_split).is_absolute() and Path(data.val_split).is_absolute()
    if data.root is not None and not elsewhere and not os.path.lexists(data.root):
        remedy = "" if options.root else "; name it with --root"
        raise InputError(f"root: the data set {data.root} is not there{remedy}")
    splits = Splits(*(find_images(data, split, key="root") for split in ("train", "val")))
    check_splits(*splits)
    return splits


Alter = Callable[[Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Features:
    """Features and labels of one split."""

    x: Tensor  # (N, F) float32, on the device
    labels: Tensor  # (N,) int64, on the device
    classes: int
    bad: dict[int, str]  # images left out: index -> why


def extract_features(
    backbone: nn.Module | None, split: ImageSet, frame: EvalContext, what: str = "features"
) -> Features:
    """Features of a split as a protocol wants them: with a progress bar, unreadable images named.

    Raises:
        InputError: no image can be read, or a feature is not finite.
    """
    return extract_features_each(backbone, split, frame, [_unaltered], what)[0]


def extract_features_each(
    backbone: nn.Module | None, split: ImageSet, frame: EvalContext, alters: Sequence[Alter], what: str
) -> list[Features]:
    """As `extract_features`, once per alteration; every image is decoded once.

    Raises:
        InputError: no image can be read, or a feature is not finite.
    """
    found = extract_each(
        backbone,
        split,
        alters,
        size=frame.size,
        device=frame.device,
        dtype=frame.dtype,
        threads=frame.threads,
        track=lambda batches, each: frame.track(what, batches, len(split), each=each),
    )
    frame.skipped(split, found[0].bad)
    check_finite(*found)
    return found


def check_finite(*features: Features) -> None:
    """Raises InputError where a feature is NaN or infinite."""
    if not all(torch.isfinite(f.x).all() for f in features):
        raise InputError("the features hold NaN or infinity: the network has diverged")


def _unaltered(crops: Tensor, indices: NDArray[np.int64]) -> Tensor:
    return crops


def extract(backbone: nn.Module | None, split: ImageSet, **options: Any) -> Features:
    """Features of all images of a split in index order; options and errors as for `extract_each`."""
    return extract_each(backbone, split, [_unaltered], **options)[0]


def extract_each(
    backbone: nn.Module | None,
    split: ImageSet,
    alters: Sequence[Alter],
    *,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    batch_size: int = 256,
    track: Callable[[Any, int], Any] = lambda batches, each: batches,
) -> list[Features]:
    """Features of all images of a split in index order: center crop, eval mode, autocast to `dtype`; one for each alteration.

    Args:
        backbone: (n, 3, S, S) -> (n, F); None gives raw pixels. Its train/eval mode is restored.
        alters: each (normalized crops (n, 3, S, S), their indices (n,)) -> other crops, before the backbone sees them.
        size: S.
        track: (batches, images in each) -> the batches, beside a progress bar.

    Raises:
        InputError: no image of the split can be read.
    """
    training = backbone is not None and backbone.training
    rows: list[list[Tensor]] = [[] for _ in alters]
    kept: list[NDArray[np.int64]] = []
    bad: dict[int, str] = {}
    try:
        if backbone is not None:
            backbone.eval()
        # A network whose parts are compiled for training would be compiled again for eval mode, and for the last, smaller batch.
        with torch.no_grad(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            crops = center_crops(
                split, size=size, fraction=CENTER_FRACTION, batch_size=batch_size, threads=threads, bad=bad
            )
            for images, indices in track(crops, batch_size):
                for mine, alter in zip(rows, alters, strict=True):
                    crops_of_one = alter(images, indices).to(device)
                    mine.append((raw_pixels(crops_of_one) if backbone is None else backbone(crops_of_one)).float())
                kept.append(indices)
    finally:
        if backbone is not None:
            backbone.train(training)
    if not kept:
        raise none_readable(split, bad)
    labels = torch.from_numpy(split.labels[np.concatenate(kept)]).to(device)
    return [Features(torch.cat(mine), labels, len(split.classes), bad) for mine in rows]


def none_readable(images: ImageSet, bad: dict[int, str]) -> InputError:
    """What to raise where no image of a set is left."""
    first = min(bad)
    return InputError(
        f"{images.root}: none of the {len(images)} images can be read, for example {images.location(first)}: {bad[first]}"
    )


def feature_count(backbone: nn.Module | None, frame: EvalContext) -> int:
    """F: how many features an image of the frame's size has; None are raw pixels."""
    image = torch.zeros(1, 3, frame.size, frame.size, device=frame.device)
    if backbone is None:
        return raw_pixels(image).shape[1]
    training = backbone.training
    with torch.no_grad():
        features = backbone.eval()(image).shape[1]
    backbone.train(training)
    return features


def training_batches(
    images: ImageSet, frame: EvalContext, *, epochs: int, batch_size: int, seed: int, what: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a classifier is trained on: crops and flips anew every epoch, with a progress bar; unreadable images are named.

    Yields:
        crops (n, 3, S, S) and labels (n,) on the device, and the images' indices (n,) on the CPU; n is `batch_size` less unreadable ones.

    Raises:
        InputError: no image can be read.
    """
    labels = torch.from_numpy(images.labels)
    steps_per_epoch = len(images) // batch_size

    def epochs_of_batches() -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        for epoch in range(epochs):
            bad: dict[int, str] = {}
            yield from random_crops(
                images, size=frame.size, seed=seed, epoch=epoch, batch_size=batch_size, threads=frame.threads, bad=bad
            )
            if len(bad) >= steps_per_epoch * batch_size:
                raise none_readable(images, bad)
            frame.skipped(images, bad)

    for crops, indices in frame.track(what, epochs_of_batches(), epochs * steps_per_epoch, unit="steps"):
        rows = torch.from_numpy(indices)
        yield crops.to(frame.device), labels[rows].to(frame.device), rows


def calibrate_batchnorm(backbone: nn.Module, split: ImageSet, frame: EvalContext, *, batch_size: int = 256) -> None:
    """Replaces BatchNorm's running statistics by their average over the split's images (float32); unreadable ones are named.

    An untrained network has none yet; with the initial ones (mean 0, variance 1) it would be a weaker baseline than
    random weights deserve.

    Raises:
        InputError: fewer than two images can be read.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    one_view(backbone).train()
    bad: dict[int, str] = {}
    crops = center_crops(
        split, size=frame.size, fraction=CENTER_FRACTION, batch_size=batch_size, threads=frame.threads, bad=bad
    )
    batches = 0
    with torch.no_grad():
        for images, _ in frame.track("BatchNorm's statistics", crops, len(split), each=batch_size):
            if len(images) > 1:  # of one image there may be one value per channel, which has no variance
                backbone(images.to(frame.device))
                batches += 1
    frame.skipped(split, bad)
    if not batches:
        raise InputError(
            f"{split.root}: {len(split) - len(bad)} of its images can be read, the statistics of the untrained network's "
            "BatchNorm need 2; leave that row out with --baselines false"
        )
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum  # of who trains it further


def check_splits(train: ImageSet, val: ImageSet) -> None:
    """What every classifier needs of the two splits.

    Raises:
        InputError: fewer than two classes, or other classes in val than in train.
    """
    if len(train.classes) < 2:
        raise InputError(f"{train.root} has {len(train.classes)} class(es): a classifier needs at least 2")
    if train.classes != val.classes:
        differences = [text for a, b in ((train, val), (val, train)) if (text := _lacking(a, b))]
        order = f"the order of their classes differs ({train.classes[:3]} and {val.classes[:3]}); pack both with fastbyol pack"
        raise InputError(f"{train.root} and {val.root} have different classes: {'; '.join(differences) or order}")


def _lacking(a: ImageSet, b: ImageSet) -> str:
    """Which classes of `a` are none of `b`'s; empty where there are none."""
    known = set(b.classes)
    names = [name for name in a.classes if name not in known]
    if not names:
        return ""
    if not b.classes:
        return f"{len(names)} of {len(a.classes)} in {a.root} are not in {b.root}, which has no classes"
    empty = [name for name in names if os.path.lexists(b.root / name)]
    why = f", where the folder {empty[0]} holds no image" if empty else ""
    return f"{len(names)} of {len(a.classes)} in {a.root} are not in {b.root}: {join_names(names)}{why}"


def raw_pixels(images: Tensor) -> Tensor:
    """(n, 3, S, S) -> (n, 3 * s * s), s = S up to 64 pixels, else averaged down to 64."""
    if images.shape[-1] > RAW_PIXELS_SIDE:
        images = F.adaptive_avg_pool2d(images, RAW_PIXELS_SIDE)
    return images.flatten(1)
