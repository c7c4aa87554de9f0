"""Linear probe: softmax regression on frozen features, all learning rates of a sweep trained side by side.

Protocol: Grill et al. 2020, appendix C.1: 80 epochs, SGD with Nesterov momentum 0.9, lr = base * batch / 256, cosine to 0,
no warm-up, no weight decay, training images cropped and flipped anew every epoch; the learning rate is picked on a
held-out part of the training images. `features=augmented` is that. `features=cached` is fast: the features are those of
one center crop, computed once and standardized per dimension with the training split's mean and deviation (the
classifier stays linear).

Shapes: L classifiers, N images, B images of a step, F features, C classes.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.config import LinearEval
from fastbyol.errors import InputError, RunError
from fastbyol.evaluate.features import (
    Features,
    Splits,
    check_finite,
    extract_features,
    feature_count,
    open_splits,
    raw_pixels,
    training_batches,
)
from fastbyol.evaluate.knn import top_accuracies
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row, Track
from fastbyol.precision import autocast

CACHED_BASE_LRS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of standardized features
PAPER_BASE_LRS = (0.05, 0.1, 0.2, 0.3, 0.4)  # of features as they are
_MOMENTUM = 0.9
_HOLDOUT = 0.1
_LEAST_STEPS_PER_EPOCH = 16  # of cached features


class Probes:
    """L linear classifiers that see the same images and have nothing else in common.

    Args:
        base_lrs: L learning rates per 256 images.
    """

    def __init__(self, base_lrs: Sequence[float], classes: int, features: int, device: torch.device) -> None:
        self.weight = torch.zeros(len(base_lrs), classes, features, device=device)
        self.bias = torch.zeros(len(base_lrs), classes, device=device)
        self._moments = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._base = torch.tensor(base_lrs, device=device)[:, None]

    def step(self, x: Tensor, labels: Tensor, share: Tensor, *, batch_size: int, progress: float) -> None:
        """One step of SGD with Nesterov momentum on the mean cross-entropy.

        Args:
            x: (B, F); labels: (B,).
            share: (L or 1, B) each image's weight in the mean, rows that sum to 1.
            batch_size: of the learning rate's rule.
            progress: share of the training that is done, in [0, 1).
        """
        lr = self._base * (batch_size / 256 * (1 + math.cos(math.pi * progress)) / 2)
        # Gradient of the cross-entropy: softmax minus one-hot, for all L classifiers at once.
        residual = self.scores(x).softmax(2) - F.one_hot(labels, self.weight.shape[1])
        residual = residual * share[..., None]
        gradients = torch.einsum("lbc,bf->lcf", residual, x), residual.sum(1)
        for parameter, moment, gradient in zip((self.weight, self.bias), self._moments, gradients, strict=True):
            moment.mul_(_MOMENTUM).add_(gradient)
            parameter.sub_(lr.view(-1, *[1] * (parameter.ndim - 1)) * (gradient + _MOMENTUM * moment))

    def check_finite(self, which: slice = slice(None)) -> None:
        """Raises RunError where a weight of one of the classifiers is NaN or infinite."""
        for base_lr, weight in zip(self._base[which, 0].tolist(), self.weight[which], strict=True):
            if not torch.isfinite(weight).all():
                raise RunError(f"base_lrs={base_lr:g}: the classifier became NaN or infinite; choose lower ones")

    def scores(self, x: Tensor) -> Tensor:
        """(B, F) -> (L, B, C)."""
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
    """Trains one classifier per learning rate on cached features x (N, F) with labels (N,), `track` beside a progress bar."""
    batch_size = min(batch_size, len(x))
    probes = Probes(base_lrs, classes, x.shape[1], x.device)
    share = torch.full((1, batch_size), 1 / batch_size, device=x.device)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(x) // batch_size
    total, step = epochs * steps_per_epoch, 0
    for _ in track(range(epochs), epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chunk in order.split(batch_size)[:steps_per_epoch]:
            probes.step(x[chunk], labels[chunk], share, batch_size=batch_size, progress=step / total)
            step += 1
    return probes


class LinearClassifier(NamedTuple):
    """A fitted probe."""

    mean: Tensor  # (F,) of the training features
    std: Tensor  # (F,)
    probes: Probes  # one
    base_lr: float
    held_out_top1: float

    def scores(self, x: Tensor) -> Tensor:
        """Features (M, F) -> (M, C)."""
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
    """The probe on cached features whose learning rate did best on held-out images, trained again on all of them.

    Args:
        batch_size: at most; see _LEAST_STEPS_PER_EPOCH.

    Raises:
        InputError: too few images for a held-out part, or a feature is not finite.
        RunError: the classifier became NaN or infinite.
    """
    check_finite(train)
    mean, std = train.x.mean(0), train.x.std(0)
    std = torch.where(std > 1e-6, std, 1.0)
    x = (train.x - mean) / std
    held = _held_out(len(x), seed).to(x.device)
    # 80 epochs of a few steps each do not get far: small sets take smaller batches, whose rate follows by the rule.
    batch_size = max(1, min(batch_size, len(x) // _LEAST_STEPS_PER_EPOCH))
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "track": track}
    probes = train_probes(x[~held], train.labels[~held], train.classes, base_lrs=base_lrs, **options)
    best, accuracy = _best(probes.scores(x[held]), train.labels[held])
    probes = train_probes(x, train.labels, train.classes, base_lrs=base_lrs[best : best + 1], **options)
    probes.check_finite()
    return LinearClassifier(mean, std, probes, base_lrs[best], accuracy)


def linear_accuracy(train: Features, val: Features, **options: Any) -> dict[str, float]:
    """Top-1 and top-5 in [0, 1] of `val`, the chosen base_lr and its held-out accuracy; options as for `fit_linear`."""
    check_finite(val)
    probe = fit_linear(train, **options)
    accuracy = top_accuracies(probe.scores(val.x), val.labels)
    return accuracy | {"base_lr": probe.base_lr, "held_out_top1": probe.held_out_top1}


def augmented_accuracy(
    backbone: nn.Module | None,
    splits: Splits,
    frame: EvalContext,
    *,
    base_lrs: Sequence[float],
    epochs: int,
    batch_size: int,
) -> dict[str, float]:
    """The paper's protocol: every epoch crops and flips anew. As `linear_accuracy` otherwise.

    One pass of the backbone serves two classifiers per learning rate: one learns from all images, its twin leaves the
    held-out ones aside, and the twins' held-out accuracies pick the rate.

    Args:
        backbone: (n, 3, S, S) -> (n, F); None gives raw pixels. Its train/eval mode is restored.

    Raises:
        InputError: too few training images, or a feature is not finite.
        RunError: the classifier became NaN or infinite.
    """
    train = splits.train
    batch_size = min(batch_size, len(train))
    held = _held_out(len(train), seed=0)
    features = feature_count(backbone, frame)
    probes = Probes([*base_lrs, *base_lrs], len(splits.classes), features, frame.device)
    total = epochs * (len(train) // batch_size)
    batches = training_batches(
        train, frame, epochs=epochs, batch_size=batch_size, seed=0, what="linear probe, augmented"
    )
    training = backbone is not None and backbone.training
    if backbone is not None:
        backbone.eval()
    for step, (images, labels, rows) in enumerate(batches):
        with torch.no_grad(), autocast(frame.device, frame.dtype):
            x = (raw_pixels(images) if backbone is None else backbone(images)).float()
        others = (~held[rows]).to(x)
        share = torch.stack([row / row.sum().clamp(min=1) for row in (torch.ones_like(others), others)])
        probes.step(x, labels, share.repeat_interleave(len(base_lrs), 0), batch_size=batch_size, progress=step / total)
    if backbone is not None:
        backbone.train(training)
    test = extract_features(backbone, train.subset(held.nonzero()[:, 0].numpy()), frame)
    best, accuracy = _best(probes.scores(test.x)[len(base_lrs) :], test.labels)
    probes.check_finite(slice(best, best + 1))
    val = extract_features(backbone, splits.val, frame)
    result = top_accuracies(probes.scores(val.x)[best], val.labels)
    return result | {"base_lr": base_lrs[best], "held_out_top1": accuracy}


def _best(scores: Tensor, labels: Tensor) -> tuple[int, float]:
    """Which of L classifiers has the least cross-entropy on held-out images, and its top-1.

    Of few images, the share that is right says less than how sure the classifier was.

    Args:
        scores: (L, M, C); labels: (M,).
    """
    losses = torch.stack([F.cross_entropy(of_one, labels) for of_one in scores])
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    return best, (scores[best].argmax(1) == labels).float().mean().item()


def _held_out(count: int, seed: int) -> Tensor:
    """(N,) bool: which training images pick the learning rate."""
    held = max(1, round(_HOLDOUT * count))
    if held >= count:
        raise InputError(f"{count} training image(s) are too few: a part is held out to pick the learning rate")
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:held]] = True
    return mask


def _measure(backbone: nn.Module | None, splits: Splits, options: LinearEval, frame: EvalContext) -> Row:
    training = {"epochs": options.epochs, "batch_size": options.batch_size}
    if options.features == "augmented":
        return augmented_accuracy(backbone, splits, frame, base_lrs=options.base_lrs or PAPER_BASE_LRS, **training)
    train, val = (extract_features(backbone, split, frame) for split in splits)
    return linear_accuracy(
        train,
        val,
        base_lrs=options.base_lrs or CACHED_BASE_LRS,
        track=lambda epochs, total: frame.track("linear probe", epochs, total, unit="epochs"),
        **training,
    )


def _text(row: Row) -> str:
    return f"top-1 {row['top1']:6.1%}  top-5 {row['top5']:6.1%}  (base lr {row['base_lr']:g})"


LINEAR = Protocol(
    name="linear",
    title="Linear probe",
    open=lambda options, config, frame: open_splits(options, config),
    measure=_measure,
    row_text=_text,
)
