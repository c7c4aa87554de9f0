"""Linear probe on cached features: all learning rates of the sweep are trained together as one batched matrix.

Protocol: Grill et al. 2020, appendix C.1: softmax regression on frozen features, 80 epochs, SGD with Nesterov
momentum 0.9, lr = base * batch / 256, cosine to 0, no warm-up, no weight decay; the learning rate is picked on a
held-out part of the training images. Different here, for speed: the features are those of one centre crop, computed
once and standardised per dimension with the training split's mean and deviation (the classifier stays linear).

Shapes: L learning rates, N images, F features, C classes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbyol.errors import InputError
from fastbyol.evaluate.features import Features
from fastbyol.evaluate.knn import top_accuracies

_MOMENTUM = 0.9


def train_probes(
    x: Tensor, labels: Tensor, classes: int, *, base_lrs: Sequence[float], epochs: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Trains one linear classifier per learning rate; they share the batches and nothing else.

    Args:
        x: (N, F) features; labels: (N,).

    Returns:
        weights (L, C, F) and biases (L, C).
    """
    batch_size = min(batch_size, len(x))
    weight = torch.zeros(len(base_lrs), classes, x.shape[1], device=x.device)
    bias = torch.zeros(len(base_lrs), classes, device=x.device)
    moments = torch.zeros_like(weight), torch.zeros_like(bias)
    peak = torch.tensor(base_lrs, device=x.device)[:, None] * batch_size / 256  # (L, 1)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(x) // batch_size
    total, step = epochs * steps_per_epoch, 0
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for chunk in order.split(batch_size)[:steps_per_epoch]:
            lr = peak * (1 + math.cos(math.pi * step / total)) / 2
            batch = x[chunk]
            # Gradient of the mean cross-entropy: softmax minus one-hot, for all L classifiers at once.
            residual = (torch.einsum("bf,lcf->lbc", batch, weight) + bias[:, None]).softmax(2)
            residual = (residual - F.one_hot(labels[chunk], classes)) / len(chunk)
            gradients = torch.einsum("lbc,bf->lcf", residual, batch), residual.sum(1)
            for parameter, moment, gradient in zip((weight, bias), moments, gradients, strict=True):
                moment.mul_(_MOMENTUM).add_(gradient)
                parameter.sub_(lr.view(-1, *[1] * (parameter.ndim - 1)) * (gradient + _MOMENTUM * moment))
            step += 1
    return weight, bias


def linear_accuracy(
    train: Features,
    val: Features,
    *,
    base_lrs: Sequence[float],
    epochs: int = 80,
    batch_size: int = 256,
    holdout: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """Top-1 and top-5 in [0, 1] on `val` of the probe whose learning rate did best on held-out training images.

    The chosen rate is trained again on all training images before `val` is touched.

    Returns:
        top1, top5, the chosen base_lr and its held-out accuracy.

    Raises:
        InputError: too few training images for a held-out part, or a feature is not finite.
    """
    if not (torch.isfinite(train.x).all() and torch.isfinite(val.x).all()):
        raise InputError("the features hold NaN or infinity: the network has diverged")
    mean, std = train.x.mean(0), train.x.std(0)
    std = torch.where(std > 1e-6, std, 1.0)
    x, x_val = (train.x - mean) / std, (val.x - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    held = max(1, round(holdout * len(x)))
    if held >= len(x):
        raise InputError(f"{len(x)} training images are too few to hold some out")
    options = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    fit, test = order[held:], order[:held]
    weight, bias = train_probes(x[fit], train.labels[fit], train.classes, base_lrs=base_lrs, **options)
    scores = torch.einsum("bf,lcf->lbc", x[test], weight) + bias[:, None]
    accuracy = (scores.argmax(2) == train.labels[test]).float().mean(1)
    best = int(accuracy.argmax())
    weight, bias = train_probes(x, train.labels, train.classes, base_lrs=base_lrs[best : best + 1], **options)
    scores = x_val @ weight[0].T + bias[0]
    return top_accuracies(scores, val.labels) | {"base_lr": base_lrs[best], "held_out_top1": accuracy[best].item()}
