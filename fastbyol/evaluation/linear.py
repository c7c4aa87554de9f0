"""Linear probe: softmax regression on frozen features, with a sweep of learning rates.

Protocol: Grill et al. 2020, appendix C.1: 80 epochs, SGD with Nesterov momentum 0.9, lr = base_lr *
batch_size / 256 with a cosine schedule to 0, no warm-up, no weight decay, random crops and flips.
The learning rate is selected on held-out training images, and large data sets use the paper's batch
of 1024 (`probe_batch_size`). `features=augmented` follows this protocol. `features=cached` is
faster: it extracts the features of one center crop per image once, and standardizes each dimension
with the training split's mean and standard deviation (the classifier stays linear).

Ranks share every batch, and add up the gradients; the batches are the same for any number of ranks.

Memory of a rank, for N training and M validation images: (2 F + 12) (N + M) / R for the features,
rounded up to whole blocks; no further copy of them is made. The classifiers take 16 L C (F + 1),
their logits 12 L B C.

Shapes: L classifiers, N images, B images per step, F features, C classes, R ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.errors import InputError, RunError
from fastbyol.evaluation.context import EvalContext, Row, Track
from fastbyol.evaluation.features import (
    BATCH,
    Features,
    Splits,
    check_finite,
    crop_dtype,
    extract_features,
    feature_bytes,
    feature_dim,
    inference_function,
    training_batches,
)
from fastbyol.evaluation.knn import accuracies, top_hits
from fastbyol.evaluation.options import LinearEval, ProbeTraining
from fastbyol.evaluation.task import EvalTask
from fastbyol.runtime.distributed import World

CACHED_BASE_LRS = (0.003, 0.01, 0.03, 0.1, 0.3)  # for standardized features
PAPER_BASE_LRS = (0.05, 0.1, 0.2, 0.3, 0.4)  # for unscaled features
_MOMENTUM = 0.9
_HELD_OUT_FRACTION, _MAX_HELD_OUT = 0.1, 10_009  # the paper holds out 10,009 of ImageNet's images
_LARGE_BATCH, _SMALL_BATCH = 1024, 256
_MIN_STEPS_PER_EPOCH = 16  # on cached features


class Probes:
    """L independent linear classifiers, trained on the same batches. All ranks hold the same ones.

    Args:
        base_lrs: L learning rates per 256 images.
    """

    def __init__(
        self, base_lrs: Sequence[float], classes: int, features: int, device: torch.device, world: World | None = None
    ) -> None:
        self.weight = torch.zeros(len(base_lrs), classes, features, device=device)
        self.bias = torch.zeros(len(base_lrs), classes, device=device)
        self._momentum_buffers = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self._base_lrs = torch.tensor(base_lrs, device=device)[:, None]
        self._world = world or World()

    def step(self, x: Tensor, labels: Tensor, *, batch_size: int, progress: float, used: Tensor | None = None) -> None:
        """Take a step of SGD with Nesterov momentum on the mean of the cross-entropy.

        Every rank must call this, with its part of the batch.

        Args:
            x: (B, F); B may be 0 on some ranks.
            labels: (B,).
            batch_size: of all ranks; the learning rate is base_lr * batch_size / 256.
            progress: fraction of the training that is done, in [0, 1).
            used: (B, L) float32, 1 for images that the classifier learns from, otherwise 0. None is
                all of them.
        """
        lr = self._base_lrs * (batch_size / 256 * (1 + math.cos(math.pi * progress)) / 2)
        # Gradient of the cross-entropy with respect to the logits: softmax - one-hot, (B, L, C).
        residual = self.scores(x).softmax(2)
        at_label = labels[:, None, None].expand(-1, len(self.weight), 1)
        residual.scatter_add_(2, at_label, residual.new_full((), -1).expand(at_label.shape))
        count = torch.full_like(self._base_lrs[:, 0], batch_size)
        if used is not None:
            residual *= used[..., None]
            count = self._world.sum(used.sum(0)).clamp(min=1)
        gradients = (residual.flatten(1).T @ x).view_as(self.weight), residual.sum(0)
        for parameter, buffer, gradient in zip(
            (self.weight, self.bias), self._momentum_buffers, gradients, strict=True
        ):
            ones = [1] * (parameter.ndim - 1)
            gradient = self._world.sum(gradient).div_(count.view(-1, *ones))
            buffer.mul_(_MOMENTUM).add_(gradient)
            parameter.sub_(gradient.add_(buffer, alpha=_MOMENTUM).mul_(lr.view(-1, *ones)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return weights, biases and their momentum."""
        weight, bias = self._momentum_buffers
        return {"weight": self.weight, "bias": self.bias, "weight_momentum": weight, "bias_momentum": bias}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def check_finite(self, which: slice = slice(None)) -> None:
        """Raise RunError if a weight of the selected classifiers is NaN or infinite."""
        for base_lr, weight in zip(self._base_lrs[which, 0].tolist(), self.weight[which], strict=True):
            if not torch.isfinite(weight).all():
                raise RunError(f"base_lrs={base_lr:g}: the classifier became NaN or infinite; choose lower ones")

    def scores(self, x: Tensor) -> Tensor:
        """Return the logits of features: (B, F) -> (B, L, C)."""
        return F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).view(len(x), *self.bias.shape)


def train_probes(
    train: Features,
    standardize: "Standardization",
    chosen: Tensor,
    *,
    base_lrs: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    track: Track = lambda epochs, total: epochs,
) -> Probes:
    """Train one classifier per learning rate on cached features. Every rank must call this.

    Args:
        chosen: (K,) int64, positions of the images to learn from, ascending.
        track: (epochs, total) -> the epochs, with a progress bar.
    """
    batch_size = min(batch_size, len(chosen))
    probes = Probes(base_lrs, train.classes, train.dim, train.device, train.world)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(chosen) // batch_size
    total, step = epochs * steps_per_epoch, 0
    row_of = torch.full((len(train.all_labels),), -1)  # position -> row of this rank
    row_of[train.position.cpu()] = torch.arange(len(train.position))
    labels = train.labels
    for _ in track(range(epochs), epochs):
        order = chosen[torch.randperm(len(chosen), generator=generator)[: steps_per_epoch * batch_size]]
        of_batch = row_of[order].view(steps_per_epoch, batch_size)
        is_own = of_batch >= 0
        counts = is_own.sum(1).tolist()
        for rows in of_batch[is_own].to(train.device).split(counts):  # one copy per epoch: each waits for a GPU
            probes.step(standardize(train.rows(rows)), labels[rows], batch_size=batch_size, progress=step / total)
            step += 1
    return probes


class Standardization(NamedTuple):
    """Shift and scale of every feature, from the training split's mean and standard deviation."""

    shift: Tensor  # (F,)
    scale: Tensor  # (F,)

    @classmethod
    def of(cls, train: Features) -> "Standardization":
        """Measure the training split, over all ranks."""
        mean = train.mean()
        std = train.std(mean)
        scale = torch.where(std > 1e-6, std, 1.0).reciprocal()
        return cls(-mean * scale, scale)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, F)."""
        return torch.addcmul(self.shift, x, self.scale)


class LinearClassifier(NamedTuple):
    """A probe fitted on standardized features."""

    standardize: Standardization
    probes: Probes  # L = 1
    base_lr: float
    held_out_top1: float

    def accuracies(self, val: Features) -> dict[str, float]:
        """Return top-1 and top-5 accuracy over all ranks. Every rank must call this."""
        hits, _ = _score(self.probes, val, self.standardize)
        return accuracies(hits[0], len(val.all_labels))


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

    Every rank must call this.

    Args:
        batch_size: upper limit, see _MIN_STEPS_PER_EPOCH.

    Raises:
        InputError: too few images to hold some out, or a feature is not finite.
        RunError: the classifier became NaN or infinite.
    """
    check_finite(train)
    standardize, count = Standardization.of(train), len(train.all_labels)
    held_out = _held_out_mask(count, seed)
    # With few images, 80 epochs at the full batch size are too few steps to converge.
    batch_size = max(1, min(batch_size, count // _MIN_STEPS_PER_EPOCH))
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "track": track}
    fitted = train_probes(train, standardize, (~held_out).nonzero()[:, 0], base_lrs=base_lrs, **options)
    best, accuracy = _best_classifier(*_score(fitted, train, standardize, held_out), int(held_out.sum()))
    probes = train_probes(train, standardize, torch.arange(count), base_lrs=base_lrs[best : best + 1], **options)
    probes.check_finite()
    return LinearClassifier(standardize, probes, base_lrs[best], accuracy)


def linear_accuracy(train: Features, val: Features, **options: Any) -> dict[str, float]:
    """Return top-1 and top-5 of `val`, the selected base_lr and its held-out accuracy.

    Options and errors are those of `fit_linear`.
    """
    check_finite(val)
    probe = fit_linear(train, **options)
    return probe.accuracies(val) | {"base_lr": probe.base_lr, "held_out_top1": probe.held_out_top1}


def augmented_accuracy(
    backbone: nn.Module,
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
        backbone: (n, 3, S, S) -> (n, F).

    Raises:
        InputError: too few training images, or a feature is not finite.
        RunError: the classifier became NaN or infinite.
    """
    train, world = splits.train, context.world
    batch_size = min(batch_size, len(train))
    held_out = _held_out_mask(len(train), seed=0)
    device, rates = context.device, [*base_lrs, *base_lrs]
    probes = Probes(rates, len(splits.classes), feature_dim(backbone, context), device, world)
    steps = len(train) // batch_size  # per epoch
    first = 0
    if (saved := context.partial.stage("probe")) is not None:
        probes.load_state_dict(saved["probes"])
        first = saved["epoch"]
    batches = training_batches(
        train,
        context,
        epochs=range(first, epochs),
        batch_size=batch_size,
        seed=0,
        description="linear probe, augmented",
        dtype=crop_dtype(backbone, context),
    )
    forward = inference_function(
        backbone, context, images=len(train) * epochs, batch_size=batch_size // context.world.size
    )
    for step, (images, labels, rows) in enumerate(batches, start=first * steps):
        x = forward(images)
        fit = (~held_out[rows]).to(x)
        used = torch.stack((torch.ones_like(fit), fit), 1).repeat_interleave(len(base_lrs), 1)  # (B, L)
        probes.step(x, labels, batch_size=batch_size, progress=step / (epochs * steps), used=used)
        if (step + 1) % steps == 0:
            context.partial.save("probe", {"epoch": (step + 1) // steps, "probes": probes.state_dict()})
    test = extract_features(backbone, train.subset(held_out.nonzero()[:, 0].numpy()), context)
    hits, losses = (values[len(base_lrs) :] for values in _score(probes, test))
    best, accuracy = _best_classifier(hits, losses, len(test.all_labels))
    probes.check_finite(slice(best, best + 1))
    val = extract_features(backbone, splits.val, context)
    result = accuracies(_score(probes, val)[0][best], len(val.all_labels))
    return result | {"base_lr": base_lrs[best], "held_out_top1": accuracy}


def _score(
    probes: Probes,
    features: Features,
    transform: Callable[[Tensor], Tensor] = lambda x: x,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return hits (L, 2), see `top_hits`, and sums of the cross-entropy (L,) over all ranks.

    Args:
        transform: of the features.
        chosen: (M,) bool, the images to score; None is all of them.
    """
    classifiers = len(probes.weight)
    hits = torch.zeros(classifiers, 2, dtype=torch.int64, device=features.device)
    losses = torch.zeros(classifiers, dtype=torch.float64, device=features.device)
    labels = features.labels
    rows = torch.arange(len(labels), device=features.device)
    if chosen is not None:
        rows = rows[chosen.to(features.device)[features.position]]
    for part in rows.split(BATCH):
        scores = probes.scores(transform(features.rows(part))).transpose(0, 1)  # (L, B, C)
        hits += top_hits(scores, labels[part])
        losses += torch.stack([F.cross_entropy(logits, labels[part], reduction="sum") for logits in scores]).double()
    return features.world.sum(hits), features.world.sum(losses)


def _best_classifier(hits: Tensor, losses: Tensor, count: int) -> tuple[int, float]:
    """Return index and top-1 of the classifier with the lowest cross-entropy.

    On few images, cross-entropy separates the classifiers better than accuracy.

    Args:
        hits, losses: of `_score`, on `count` images.
    """
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    return best, hits[best, 0].item() / count


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


def probe_bytes(train: int, val: int, features: int, classes: int, options: ProbeTraining, world: World) -> int:
    """Return the memory of a rank in bytes; the formula is at the top of this file."""
    classifiers, batch = len(options.base_lrs) or len(CACHED_BASE_LRS), probe_batch_size(options.batch_size, train)
    if getattr(options, "features", "cached") == "augmented":  # two per rate; only held-out features are cached
        classifiers, train, batch = 2 * classifiers, _held_out_count(train), min(batch, train)
    else:
        batch = min(batch, -(-train // _MIN_STEPS_PER_EPOCH))
    shards = feature_bytes(train, features, world) + feature_bytes(val, features, world)
    return shards + 16 * classifiers * classes * (features + 1) + 12 * classifiers * batch * classes


class LinearTask(EvalTask):
    """Linear probe."""

    name = "linear"
    title = "Linear probe"

    def memory(self, data: Splits, features: int, options: LinearEval, world: World) -> int:
        """See EvalTask.memory."""
        return probe_bytes(len(data.train), len(data.val), features, len(data.classes), options, world)

    def measure(self, backbone: nn.Module, data: Splits, options: LinearEval, context: EvalContext) -> Row:
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
