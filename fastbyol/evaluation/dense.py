"""What segmentation and detection share: a backbone's feature maps and the training loop.

Shapes: n images, H x W pixels.
"""

import copy
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fastbyol.data.images import Images
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, RunError, first_line
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.image_files import unlabeled_set
from fastbyol.evaluation.options import DenseEval
from fastbyol.evaluation.task import EvalTask
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.parallel import GradientMean, share_of_batch

T = TypeVar("T")
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4
_WARMUP_STEPS = 50
_MAX_GRADIENT_NORM = 10.0  # far above the usual: clips only rare outliers, which could cause NaN


class DenseTask(EvalTask):
    """Base class of segmentation and detection."""

    uses_pixels = False
    uses_loader = False

    def identity(self, data: Any) -> Any:
        """See EvalTask.identity."""
        digest = hashlib.blake2b(digest_size=8)
        for image in (*data.train, *data.val):
            for value in image if isinstance(image, tuple) else vars(image).values():
                if isinstance(value, Path):  # of an image or mask; all are decoded when the folder is opened
                    stat = value.stat()
                    digest.update(f"{value}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
                else:
                    digest.update(value.tobytes())
        return digest.hexdigest()

    def calibration_images(self, data: Any) -> Images:
        """Return the training images, which have a `file` each."""
        return unlabeled_set([image.file for image in data.train])


class MapShape(NamedTuple):
    """Shape of one of a backbone's feature maps."""

    index: int  # in timm's forward_intermediates
    channels: int
    side: int  # for an S x S image


class FeatureMaps(nn.Module):
    """A backbone's feature maps: images (n, 3, H, W) -> one map per entry of `shapes`."""

    def __init__(self, backbone: nn.Module, shapes: Sequence[MapShape]) -> None:
        super().__init__()
        self.backbone, self.indices = backbone, [shape.index for shape in shapes]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps, shallowest first."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.backbone.forward_intermediates(images, indices=self.indices, intermediates_only=True)


def check_maps(backbone: nn.Module) -> None:
    """Raise InputError if a backbone does not expose its feature maps."""
    if not hasattr(backbone, "forward_intermediates"):
        raise InputError(
            f"model.backbone: timm's {type(backbone).__name__} does not expose its feature maps "
            "(forward_intermediates), so it cannot be used for dense tasks or patch features"
        )


def frozen_copy(backbone: nn.Module, size: int) -> nn.Module:
    """Return a frozen copy in eval mode for images of S x S pixels.

    timm resamples a transformer's position grid.

    Raises:
        InputError: the backbone does not support the size.
    """
    own = copy.deepcopy(backbone).eval().requires_grad_(False)
    if hasattr(own, "set_input_size"):
        with _size_errors(own, size):
            own.set_input_size(img_size=(size, size))
    return own


def map_shapes(backbone: nn.Module, size: int, *, extra_width: int = 0) -> list[MapShape]:
    """Return the shapes of a backbone's maps, finest first; of each size only the deepest map.

    Args:
        size: side of the images, S.
        extra_width: makes the images S x (S + extra_width).

    Raises:
        InputError: the backbone has no maps, or does not support the size.
    """
    check_maps(backbone)
    images = torch.zeros(1, 3, size, size + extra_width, device=next(backbone.parameters()).device)
    with _size_errors(backbone, size, extra_width), torch.no_grad():
        maps = backbone.forward_intermediates(images, intermediates_only=True)
    deepest = {x.shape[2]: MapShape(i, x.shape[1], x.shape[2]) for i, x in enumerate(maps)}
    return sorted(deepest.values(), key=lambda shape: -shape.side)


@contextmanager
def _size_errors(backbone: nn.Module, size: int, extra_width: int = 0) -> Iterator[None]:
    """Turn the errors of a backbone that does not support an image size into InputError."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InputError(
            f"image_size_px={size}: {type(backbone).__name__} cannot take images of {size + extra_width}x{size} "
            f"pixels: {first_line(error)}"
        ) from None


def resolve_image_size(option: int, context: EvalContext) -> int:
    """Return the side in pixels that option `image_size_px` stands for.

    0 is 9/4 of the run's, rounded up to a multiple of 32: the paper pre-trains at 224 and segments
    at 513.
    """
    return option or 32 * math.ceil(context.size * 9 / 4 / 32)


def head_channels(shape: MapShape) -> int:
    """Return 1/8 of the last map's channels, within 64..256: the usual 256 for a ResNet-50."""
    return min(max(shape.channels // 8, 64), 256)


def normalize(images: Tensor) -> Tensor:
    """Normalize as in pre-training: uint8 (n, H, W, 3) -> float32 (n, 3, H, W), channels_last."""
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def fit(
    network: nn.Module,
    loss_of: Callable[[list[T]], Tensor],
    make_sample: Callable[[int, np.random.Generator], T],
    images: int,
    options: DenseEval,
    context: EvalContext,
) -> None:
    """Train by SGD with momentum, linear warm-up and a cosine schedule to 0.

    Every rank must call this; ranks share every batch.

    Args:
        network: parameters that require no gradient stay unchanged.
        loss_of: this rank's part of a batch -> its loss; the mean over ranks is the batch's loss.
        make_sample: (image index, random generator) -> sample; called on threads.
        images: number of training images. An incomplete last batch of an epoch is dropped.
        options: epochs, batch size, learning rate and seed.

    Raises:
        RunError: the loss became NaN or infinite.
    """
    batch_size = min(options.batch_size, images)
    steps = options.epochs * (images // batch_size)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, options.lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    warmup_steps = min(_WARMUP_STEPS, steps // 4)
    average_gradients = GradientMean(parameters, context.world)
    batches = _batches(make_sample, images, batch_size, options, context)
    for step, batch in enumerate(context.track("training", batches, steps, unit="steps")):
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        optimizer.param_groups[0]["lr"] = options.lr * warmup * (1 + math.cos(math.pi * step / steps)) / 2
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients()
        nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        if (step + 1) % (images // batch_size) == 0 and not all(
            torch.isfinite(x).all() for x in (context.world.mean(loss.detach()), *parameters)
        ):
            raise RunError(f"lr={options.lr:g}: the loss became NaN or infinite; choose a lower one")


def validation_batches(
    images: Sequence[T], make_sample: Callable[[T], tuple[Any, ...]], batch_size: int, context: EvalContext
) -> Iterator[tuple[tuple[Any, ...], ...]]:
    """Yield this rank's batches of samples, transposed: one tuple per item of a sample.

    Shows progress.
    """
    chunks = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    own = chunks[context.world.rank :: context.world.size]
    for chunk in context.track("validation", own, sum(map(len, own)), each=batch_size):
        yield tuple(zip(*map_in_order(make_sample, chunk, context.threads), strict=True))


def _batches(
    make_sample: Callable[[int, np.random.Generator], T],
    images: int,
    batch_size: int,
    options: DenseEval,
    context: EvalContext,
) -> Iterator[list[T]]:
    """Yield this rank's part of the batches of all epochs, shuffled.

    A sample depends only on seed, epoch and index.
    """
    shard = share_of_batch(batch_size, images, context.world)
    own = (np.arange(images // batch_size)[:, None] * batch_size + shard).reshape(-1)
    keys = (
        (epoch, int(index))
        for epoch in range(options.epochs)
        for index in np.random.default_rng([options.seed, epoch]).permutation(images)[own]
    )
    samples = map_in_order(
        lambda key: make_sample(key[1], np.random.default_rng([options.seed, *key])), keys, context.threads
    )
    while batch := list(itertools.islice(samples, len(shard))):
        yield batch
