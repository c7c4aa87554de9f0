"""Linear probe: softmax regression on frozen features, with a sweep of learning rates.

Protocol: Grill et al. 2020, appendix C.1: 80 epochs, SGD with Nesterov momentum 0.9, lr = base_lr *
batch_size / 256 with a cosine schedule to 0, no warm-up, no weight decay, random crops and flips.
The learning rate is selected on held-out training images, and large data sets use the paper's batch
of 1024 (`probe_batch_size`). `features=augmented` follows this protocol. `features=cached` is
faster: it extracts the features of one center crop per image once, and standardizes each dimension
with the training split's mean and standard deviation (the classifier stays linear).

Shapes: L classifiers, N images, B images per step, F features, C classes.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.errors import InputError, RunError
from fastbyol.evaluate.context import EvalContext, Row, Track
from fastbyol.evaluate.features import (
    Features,
    Splits,
    check_finite,
    eval_mode,
    extract_features,
    feature_dim,
    raw_pixels,
    training_batches,
)
from fastbyol.evaluate.knn import top_accuracies
from fastbyol.evaluate.options import LinearEval
from fastbyol.evaluate.task import EvalTask
from fastbyol.precision import autocast

CACHED_BASE_LRS = (0.003, 0.01, 0.03, 0.1, 0.3)  # for standardized features
PAPER_BASE_LRS = (0.05, 0.1, 0.2, 0.3, 0.4)  # for unscaled features
_MOMENTUM = 0.9
_HELD_OUT_FRACTION, _MAX_HELD_OUT = 0.1, 10_009  # the paper holds out 10,009 of ImageNet's images
_LARGE_BATCH, _SMALL_BATCH = 1024, 256
_MIN_STEPS_PER_EPOCH = 16  # on cached features


class Probes:
    """L independent linear classifiers, trained on the same batches.

    Args:
        base_lrs: L learning rates per 256 images.
    """

    def __init__(self, base_lrs: Sequence[float], classes: int, features: int, device: torch.device) -> None:
        self.weight = torch.zeros(len(base_lrs), classes, features, device=device)
        self.bias = torch.zeros(len(base_lrs), classes, device=device)
        self._momentum_buffers = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._base_lrs = torch.tensor(base_lrs, device=device)[:, None]

    def step(self, x: Tensor, labels: Tensor, sample_weight: Tensor, *, batch_size: int, progress: float) -> None:
        """Take a step of SGD with Nesterov momentum on the weighted mean of the cross-entropy.

        Args:
            x: (B, F).
            labels: (B,).
            sample_weight: (L or 1, B), rows sum to 1.
            batch_size: the learning rate is base_lr * batch_size / 256.
            progress: fraction of the training that is done, in [0, 1).
        """
        lr = self._base_lrs * (batch_size / 256 * (1 + math.cos(math.pi * progress)) / 2)
        # Gradient of the cross-entropy with respect to the logits: softmax - one-hot.
        residual = self.scores(x).softmax(2) - F.one_hot(labels, self.weight.shape[1])  # (L, B, C)
        residual = residual * sample_weight[..., None]
        gradients = torch.einsum("lbc,bf->lcf", residual, x), residual.sum(1)
        for parameter, buffer, gradient in zip(
            (self.weight, self.bias), self._momentum_buffers, gradients, strict=True
        ):
            buffer.mul_(_MOMENTUM).add_(gradient)
            parameter.sub_(lr.view(-1, *[1] * (parameter.ndim - 1)) * (gradient + _MOMENTUM * buffer))

    def check_finite(self, which: slice = slice(None)) -> None:
        """Raise RunError if a weight of the selected classifiers is NaN or infinite."""
        for base_lr, weight in zip(self._base_lrs[which, 0].tolist(), self.weight[which], strict=True):
            if not torch.isfinite(weight).all():
                raise RunError(f"base_lrs={base_lr:g}: the classifier became NaN or infinite; choose lower ones")

    def scores(self, x: Tensor) -> Tensor:
        """Return the logits of features: (B, F) -> (L, B, C)."""
        return torch.einsum("bf,lcf->lbc", x, self.weight) + self.bias[:, None]


def train_probes(
    x: Tensor,
    labels: Tensor,
    classes: int,
    *,
    base_lrs: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    track: Track = lambda epochs, total: epochs,
) -> Probes:
    """Train one classifier per learning rate on cached features.

    Args:
        x: (N, F).
        labels: (N,).
        track: (epochs, total) -> the epochs, with a progress bar.
    """
    batch_size = min(batch_size, len(x))
    probes = Probes(base_lrs, classes, x.shape[1], x.device)
    sample_weight = torch.full((1, batch_size), 1 / batch_size, device=x.device)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(x) // batch_size
    total, step = epochs * steps_per_epoch, 0
    for _ in track(range(epochs), epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for rows in order.split(batch_size)[:steps_per_epoch]:
            probes.step(x[rows], labels[rows], sample_weight, batch_size=batch_size, progress=step / total)
            step += 1
    return probes


class LinearClassifier(NamedTuple):
    """A probe fitted on standardized features."""

    mean: Tensor  # (F,) of the training features
    std: Tensor  # (F,)
    probes: Probes  # L = 1
    base_lr: float
    held_out_top1: float

    def scores(self, x: Tensor) -> Tensor:
        """Return the logits of features: (M, F) -> (M, C)."""
        return self.probes.scores((x - self.mean) / self.std)[0]


def fit_linear(
    train: Features,
    *,
    base_lrs: Sequence[float],
    epochs: int = 80,
    batch_size: int = 256,
    seed: int = 0,
    track: Track = lambda epochs, total: epochs,
) -> LinearClassifier:
    """Select the learning rate on held-out images, then train a probe on all cached features.

    Args:
        batch_size: upper limit, see _MIN_STEPS_PER_EPOCH.

    Raises:
        InputError: too few images to hold some out, or a feature is not finite.
        RunError: the classifier became NaN or infinite.
    """
    check_finite(train)
    mean, std = train.x.mean(0), train.x.std(0)
    std = torch.where(std > 1e-6, std, 1.0)
    x = (train.x - mean) / std
    held_out = _held_out_mask(len(x), seed).to(x.device)
    # With few images, 80 epochs at the full batch size are too few steps to converge.
    batch_size = max(1, min(batch_size, len(x) // _MIN_STEPS_PER_EPOCH))
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "track": track}
    probes = train_probes(x[~held_out], train.labels[~held_out], train.classes, base_lrs=base_lrs, **options)
    best, accuracy = _best_classifier(probes.scores(x[held_out]), train.labels[held_out])
    probes = train_probes(x, train.labels, train.classes, base_lrs=base_lrs[best : best + 1], **options)
    probes.check_finite()
    return LinearClassifier(mean, std, probes, base_lrs[best], accuracy)


def linear_accuracy(train: Features, val: Features, **options: Any) -> dict[str, float]:
    """Return top-1 and top-5 of `val`, the selected base_lr and its held-out accuracy.

    Options and errors are those of `fit_linear`.
    """
    check_finite(val)
    probe = fit_linear(train, **options)
    accuracy = top_accuracies(probe.scores(val.x), val.labels)
    return accuracy | {"base_lr": probe.base_lr, "held_out_top1": probe.held_out_top1}


def augmented_accuracy(
    backbone: nn.Module | None,
    splits: Splits,
    context: EvalContext,
    *,
    base_lrs: Sequence[float],
    epochs: int,
    batch_size: int,
) -> dict[str, float]:
    """As `linear_accuracy`, by the paper's protocol: new crops and flips every epoch.

    One pass of the backbone serves two classifiers per learning rate. One learns from all images.
    The other skips the held-out images, and its held-out accuracy selects the rate.

    Args:
        backbone: (n, 3, S, S) -> (n, F); None stands for raw pixels.

    Raises:
        InputError: too few training images, or a feature is not finite.
        RunError: the classifier became NaN or infinite.
    """
    train = splits.train
    batch_size = min(batch_size, len(train))
    held_out = _held_out_mask(len(train), seed=0)
    features = feature_dim(backbone, context)
    probes = Probes([*base_lrs, *base_lrs], len(splits.classes), features, context.device)
    total = epochs * (len(train) // batch_size)
    batches = training_batches(
        train, context, epochs=epochs, batch_size=batch_size, seed=0, description="linear probe, augmented"
    )
    with eval_mode(backbone):
        for step, (images, labels, rows) in enumerate(batches):
            with torch.no_grad(), autocast(context.device, context.dtype):
                x = (raw_pixels(images) if backbone is None else backbone(images)).float()
            fit = (~held_out[rows]).to(x)
            weights = torch.stack([mask / mask.sum().clamp(min=1) for mask in (torch.ones_like(fit), fit)])
            weights = weights.repeat_interleave(len(base_lrs), 0)  # (2 * len(base_lrs), B)
            probes.step(x, labels, weights, batch_size=batch_size, progress=step / total)
    test = extract_features(backbone, train.subset(held_out.nonzero()[:, 0].numpy()), context)
    best, accuracy = _best_classifier(probes.scores(test.x)[len(base_lrs) :], test.labels)
    probes.check_finite(slice(best, best + 1))
    val = extract_features(backbone, splits.val, context)
    result = top_accuracies(probes.scores(val.x)[best], val.labels)
    return result | {"base_lr": base_lrs[best], "held_out_top1": accuracy}


def _best_classifier(scores: Tensor, labels: Tensor) -> tuple[int, float]:
    """Return index and top-1 of the classifier with the lowest cross-entropy.

    On few images, cross-entropy separates the classifiers better than accuracy.

    Args:
        scores: (L, M, C).
        labels: (M,).
    """
    losses = torch.stack([F.cross_entropy(logits, labels) for logits in scores])
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    return best, (scores[best].argmax(1) == labels).float().mean().item()


def _held_out_count(count: int) -> int:
    return min(max(1, round(_HELD_OUT_FRACTION * count)), _MAX_HELD_OUT)


def probe_batch_size(batch_size: int | Literal["auto"], images: int) -> int:
    """Return the batch size that an option means for a number of training images."""
    if batch_size != "auto":
        return batch_size
    return _LARGE_BATCH if _held_out_count(images) == _MAX_HELD_OUT else _SMALL_BATCH


def _held_out_mask(count: int, seed: int) -> Tensor:
    """Return which training images select the learning rate: (count,) bool."""
    held_out = _held_out_count(count)
    if held_out >= count:
        raise InputError(f"{count} training image(s) are too few: some must be held out to select the learning rate")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:held_out]] = True
    return mask


class LinearTask(EvalTask):
    """Linear probe."""

    name = "linear"
    title = "Linear probe"

    def measure(self, backbone: nn.Module | None, data: Splits, options: LinearEval, context: EvalContext) -> Row:
        """Return top-1, top-5, the selected learning rate and its held-out accuracy."""
        batch_size = probe_batch_size(options.batch_size, len(data.train))
        training = {"epochs": options.epochs, "batch_size": batch_size}
        if options.features == "augmented":
            base_lrs = options.base_lrs or PAPER_BASE_LRS
            return augmented_accuracy(backbone, data, context, base_lrs=base_lrs, **training)
        train, val = (extract_features(backbone, split, context) for split in data)
        return linear_accuracy(
            train,
            val,
            base_lrs=options.base_lrs or CACHED_BASE_LRS,
            track=lambda epochs, total: context.track("linear probe", epochs, total, unit="epochs"),
            **training,
        )


LINEAR = LinearTask()
