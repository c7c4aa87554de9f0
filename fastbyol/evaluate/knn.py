"""Weighted k-nearest-neighbor classification on frozen features.

Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4: cosine similarity s, each of the k nearest training images
votes for its class with weight exp(s / temperature).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from fastbyol.config import KnnEval
from fastbyol.evaluate.features import Features, Splits, check_finite, extract_features, open_splits
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row

_QUERIES_AT_ONCE = 1024


def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, temperature: float, classes: int
) -> Tensor:
    """Votes of the k nearest neighbors.

    Args:
        bank: (N, F) features of the training images; bank_labels: (N,).
        queries: (M, F).
        k: neighbors, at most N of them vote.

    Returns:
        (M, classes) float32: the summed weights, of each query divided by its nearest neighbor's: they neither overflow nor all vanish.
    """
    scores = torch.zeros(len(queries), classes, device=queries.device)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        similarity, index = nearest(bank, queries[rows], k)
        distance = (similarity - similarity[:, :1]).double()  # the temperature may be too small for float32
        scores[rows].scatter_add_(1, bank_labels[index], (distance / temperature).exp().float())
    return scores


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities (M, k), largest first, and indices (M, k) of the k nearest rows of `bank` (N, F) to `queries` (M, F)."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    values, index = similarity.topk(min(k, len(bank)), dim=1)
    return values, index


def knn_accuracy(train: Features, val: Features, *, k: int, temperature: float) -> dict[str, float]:
    """Top-1 and top-5 accuracy in [0, 1] of `val` classified by `train`.

    Raises:
        InputError: a feature is not finite.
    """
    check_finite(train, val)
    scores = knn_scores(train.x, train.labels, val.x, k=k, temperature=temperature, classes=train.classes)
    return top_accuracies(scores, val.labels)


def top_accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 (all classes, if there are fewer) of scores (M, classes) by torchmetrics."""
    classes = scores.shape[1]
    return {
        f"top{top}": multiclass_accuracy(
            scores, labels, num_classes=classes, top_k=min(top, classes), average="micro"
        ).item()
        for top in (1, 5)
    }


def _measure(backbone: nn.Module | None, splits: Splits, options: KnnEval, frame: EvalContext) -> Row:
    train, val = (extract_features(backbone, split, frame) for split in splits)
    return knn_accuracy(train, val, k=options.k, temperature=options.temperature)


KNN = Protocol(
    name="knn",
    title="Weighted kNN on frozen features",
    open=lambda options, config, frame: open_splits(options, config),
    measure=_measure,
)
