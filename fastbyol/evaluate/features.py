"""Labeled splits of a data set, and features of their images: a backbone's, or raw pixels."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config import Config
from fastbyol.data import find_images
from fastbyol.data.crops import CENTER_FRACTION, center_crops, random_crops
from fastbyol.data.images import ImageSet
from fastbyol.errors import InputError, join_names
from fastbyol.evaluate.context import EvalContext
from fastbyol.evaluate.options import EvalConfig
from fastbyol.layers import set_num_views
from fastbyol.precision import autocast

RAW_PIXELS_SIDE = 64  # larger images are pooled to it: at most 12,288 values per image


class Splits(NamedTuple):
    """The labeled images of a data set."""

    train: ImageSet
    val: ImageSet

    @property
    def classes(self) -> list[str]:
        """Class names, the same in both splits."""
        return self.train.classes


def open_splits(options: EvalConfig, config: Config) -> Splits:
    """Open both splits: the run's classes, but all of their images, not only its training subset.

    Raises:
        InputError: a split is missing, or the splits do not match.
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
    needs_root = not (Path(data.train_split).is_absolute() and Path(data.val_split).is_absolute())
    if data.root is not None and needs_root and not os.path.lexists(data.root):
        remedy = "" if options.root else "; name it with --root"
        raise InputError(f"root: data set {data.root} does not exist{remedy}")
    splits = Splits(*(find_images(data, split, key="root") for split in ("train", "val")))
    check_splits(*splits)
    return splits


def check_splits(train: ImageSet, val: ImageSet) -> None:
    """Check that a classifier can be trained on one split and evaluated on the other.

    Raises:
        InputError: fewer than two classes, or the splits' classes differ.
    """
    if len(train.classes) < 2:
        raise InputError(f"{train.root} has {len(train.classes)} class(es): a classifier needs at least 2")
    if train.classes != val.classes:
        differences = [text for a, b in ((train, val), (val, train)) if (text := _extra_classes(a, b))]
        order = (
            f"the order of their classes differs ({train.classes[:3]} and {val.classes[:3]}); "
            "pack both with fastbyol pack"
        )
        raise InputError(f"{train.root} and {val.root} have different classes: {'; '.join(differences) or order}")


def _extra_classes(a: ImageSet, b: ImageSet) -> str:
    """Describe the classes of `a` that `b` does not have; empty if there are none."""
    known = set(b.classes)
    names = [name for name in a.classes if name not in known]
    if not names:
        return ""
    if not b.classes:
        return f"{len(names)} of {len(a.classes)} in {a.root} are not in {b.root}, which has no classes"
    empty = [name for name in names if os.path.lexists(b.root / name)]
    why = f", where folder {empty[0]} has no images" if empty else ""
    return f"{len(names)} of {len(a.classes)} in {a.root} are not in {b.root}: {join_names(names)}{why}"


Transform = Callable[[Tensor, NDArray[np.int64]], Tensor]
"""(normalized crops (n, 3, S, S), image indices (n,)) -> crops."""


@dataclass(frozen=True)
class Features:
    """Features and labels of one split."""

    x: Tensor  # (N, F) float32, on the device
    labels: Tensor  # (N,) int64, on the device
    classes: int
    bad: dict[int, str]  # index of an unreadable image -> reason


def extract_features(
    backbone: nn.Module | None, split: ImageSet, context: EvalContext, description: str | None = "features"
) -> Features:
    """Return the features of a split. Arguments and errors are those of `extract_each`."""
    return extract_each(backbone, split, context, [lambda crops, indices: crops], description)[0]


def extract_each(
    backbone: nn.Module | None,
    split: ImageSet,
    context: EvalContext,
    transforms: Sequence[Transform],
    description: str | None,
    *,
    batch_size: int = 256,
) -> list[Features]:
    """Return the features of center crops under each transform, in index order.

    Decodes every image once.

    Args:
        backbone: (n, 3, S, S) -> (n, F), run in eval mode under autocast; None stands for raw
            pixels.
        description: of the progress bar. None shows no progress, logs no unreadable images and
            accepts any values.

    Raises:
        InputError: no image of the split is readable, or a feature is not finite.
    """
    device, rows = context.device, [list[Tensor]() for _ in transforms]
    kept: list[NDArray[np.int64]] = []
    bad: dict[int, str] = {}
    # force_eager: a backbone compiled for training would be recompiled for eval mode.
    with (
        eval_mode(backbone),
        torch.no_grad(),
        autocast(device, context.dtype),
        torch.compiler.set_stance("force_eager"),
    ):
        batches = center_crops(
            split, size=context.size, fraction=CENTER_FRACTION, batch_size=batch_size, threads=context.threads, bad=bad
        )
        if description is not None:
            batches = context.track(description, batches, len(split), each=batch_size)
        for crops, indices in batches:
            for features, transform in zip(rows, transforms, strict=True):
                images = transform(crops, indices).to(device)
                features.append((raw_pixels(images) if backbone is None else backbone(images)).float())
            kept.append(indices)
    if not kept:
        raise no_readable_images(split, bad)
    labels = torch.from_numpy(split.labels[np.concatenate(kept)]).to(device)
    found = [Features(torch.cat(features), labels, len(split.classes), bad) for features in rows]
    if description is not None:
        context.skipped(split, bad)
        check_finite(*found)
    return found


def check_finite(*features: Features) -> None:
    """Raise InputError if a feature is NaN or infinite."""
    if not all(torch.isfinite(f.x).all() for f in features):
        raise InputError("the features hold NaN or infinity: the network has diverged")


@contextmanager
def eval_mode(backbone: nn.Module | None) -> Iterator[None]:
    """Put a backbone into eval mode; restore its mode on exit."""
    if backbone is None:
        yield
        return
    training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(training)


def no_readable_images(images: ImageSet, bad: dict[int, str]) -> InputError:
    """Return the error for a set in which no image is readable."""
    first = min(bad)
    return InputError(
        f"{images.root}: none of the {len(images)} images can be read, for example {images.location(first)}: {bad[first]}"
    )


def feature_dim(backbone: nn.Module | None, context: EvalContext) -> int:
    """Return F, the number of features of an image of the context's size."""
    image = torch.zeros(1, 3, context.size, context.size, device=context.device)
    with eval_mode(backbone), torch.no_grad():
        return (raw_pixels(image) if backbone is None else backbone(image)).shape[1]


def training_batches(
    images: ImageSet, context: EvalContext, *, epochs: int, batch_size: int, seed: int, description: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of random crops and flips. Shows progress, logs unreadable images.

    Yields:
        Crops (n, 3, S, S) and labels (n,) on the device, and the images' indices (n,) on the CPU. n
        is `batch_size` minus the unreadable images.

    Raises:
        InputError: no image is readable.
    """
    labels = torch.from_numpy(images.labels)
    steps_per_epoch = len(images) // batch_size

    def batches() -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        for epoch in range(epochs):
            bad: dict[int, str] = {}
            yield from random_crops(
                images,
                size=context.size,
                seed=seed,
                epoch=epoch,
                batch_size=batch_size,
                threads=context.threads,
                bad=bad,
            )
            if len(bad) >= steps_per_epoch * batch_size:
                raise no_readable_images(images, bad)
            context.skipped(images, bad)

    for crops, indices in context.track(description, batches(), epochs * steps_per_epoch, unit="steps"):
        rows = torch.from_numpy(indices)
        yield crops.to(context.device), labels[rows].to(context.device), rows


def calibrate_batchnorm(backbone: nn.Module, split: ImageSet, context: EvalContext, *, batch_size: int = 256) -> None:
    """Set BatchNorm's running statistics to their average over a split, in float32.

    With its initial statistics (mean 0, variance 1), an untrained network would be a weaker
    baseline than random weights need to be.

    Raises:
        InputError: fewer than two images are readable.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    set_num_views(backbone, 1).train()
    bad: dict[int, str] = {}
    batches = center_crops(
        split, size=context.size, fraction=CENTER_FRACTION, batch_size=batch_size, threads=context.threads, bad=bad
    )
    used = 0
    with torch.no_grad():
        for crops, _ in context.track("BatchNorm statistics", batches, len(split), each=batch_size):
            if len(crops) > 1:  # one value per channel has no variance
                backbone(crops.to(context.device))
                used += 1
    context.skipped(split, bad)
    if not used:
        raise InputError(
            f"{split.root}: only {len(split) - len(bad)} image(s) can be read, but the BatchNorm statistics of the "
            "untrained network need 2; leave that row out with --baselines false"
        )
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def raw_pixels(images: Tensor) -> Tensor:
    """(n, 3, S, S) -> (n, 3 * s * s), where s is S, but at most 64 by average pooling."""
    if images.shape[-1] > RAW_PIXELS_SIDE:
        images = F.adaptive_avg_pool2d(images, RAW_PIXELS_SIDE)
    return images.flatten(1)
