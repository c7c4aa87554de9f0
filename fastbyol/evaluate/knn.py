"""Weighted k-nearest-neighbor classification on frozen features.

Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4: each of the k nearest training images votes
for its class with weight exp(s / temperature), where s is the cosine similarity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from fastbyol.evaluate.context import EvalContext, Row
from fastbyol.evaluate.features import Features, Splits, check_finite, extract_features
from fastbyol.evaluate.options import KnnEval
from fastbyol.evaluate.task import EvalTask

_QUERY_CHUNK = 1024


def knn_scores(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, k: int, temperature: float, classes: int
) -> Tensor:
    """Return the votes of the k nearest neighbors.

    Args:
        bank: (N, F) features of the training images.
        bank_labels: (N,).
        queries: (M, F).
        k: number of neighbors, at most N.

    Returns:
        (M, classes) float32 sums of weights, relative to the weight of the query's nearest
        neighbor, so that they neither overflow nor all vanish.
    """
    scores = torch.zeros(len(queries), classes, device=queries.device)
    for start in range(0, len(queries), _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        similarity, index = nearest(bank, queries[rows], k)
        # float64: divided by a low temperature, it may exceed float32.
        difference = (similarity - similarity[:, :1]).double()
        scores[rows].scatter_add_(1, bank_labels[index], (difference / temperature).exp().float())
    return scores


def nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return similarities, descending, and indices of the k nearest rows of `bank`, each (M, k).

    Args:
        bank: (N, F).
        queries: (M, F).
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    values, index = similarity.topk(min(k, len(bank)), dim=1)
    return values, index


def knn_accuracy(train: Features, val: Features, *, k: int, temperature: float) -> dict[str, float]:
    """Return the top-1 and top-5 accuracy of `val`, classified by its neighbors in `train`.

    Raises:
        InputError: a feature is not finite.
    """
    check_finite(train, val)
    scores = knn_scores(train.x, train.labels, val.x, k=k, temperature=temperature, classes=train.classes)
    return top_accuracies(scores, val.labels)


def top_accuracies(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Return top-1 and top-5 accuracy of scores (M, C). With C < 5 classes, top-5 is top-C."""
    classes = scores.shape[1]
    return {
        f"top{top}": multiclass_accuracy(
            scores, labels, num_classes=classes, top_k=min(top, classes), average="micro"
        ).item()
        for top in (1, 5)
    }


class KnnTask(EvalTask):
    """Weighted kNN."""

    name = "knn"
    title = "Weighted kNN on frozen features"

    def measure(self, backbone: nn.Module | None, data: Splits, options: KnnEval, context: EvalContext) -> Row:
        """Return top-1 and top-5 accuracy."""
        train, val = (extract_features(backbone, split, context) for split in data)
        return knn_accuracy(train, val, k=options.k, temperature=options.temperature)


KNN = KnnTask()
