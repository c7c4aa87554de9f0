"""Weighted k-nearest-neighbor classification on frozen features.

Source: Wu et al. 2018 (arXiv 1805.01978), section 3.4: each of the k nearest training images votes
for its class with weight exp(s / temperature), where s is the cosine similarity.

Each rank compares all queries with the training features that it stores, one block at a time, and
keeps the k best. The result has the same bits for any number of ranks: a block's products do not
depend on them (features.py), and of equally similar images of two blocks the first is taken.

Memory of a rank, for N training and M validation images: (2 F + 12) N / R for its training features
(rounded up to whole blocks), (4 F + 12) M for the validation features and their copy on all ranks,
16 k M for the neighbors, and 24,576 F + 134 MB for the products of 2,048 queries with a block.

Shapes: N training images, M validation images, F features, C classes, k neighbors, R ranks.
"""

import torch
from torch import Tensor, nn

from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.features import Features, Splits, check_finite, extract_features, feature_bytes
from fastbyol.evaluation.options import KnnEval
from fastbyol.evaluation.task import EvalTask
from fastbyol.runtime.distributed import World

_QUERY_CHUNK = 2048
_VOTE_CHUNK = 1024


def nearest(bank: Features, queries: Features, k: int) -> tuple[Tensor, Tensor]:
    """Return similarities, descending, and positions of the k nearest of all training images.

    Every rank must call this; all return the same.

    Returns:
        (M, k) float32 and int64, for the queries of all ranks; fewer than k if the bank has fewer
        images.
    """
    k = min(k, len(bank.all_labels))
    chunks = queries.gather_units().split(_QUERY_CHUNK)
    best = [torch.empty(len(chunk), 0, dtype=torch.int64, device=bank.device) for chunk in chunks]
    for unit, position in zip(bank.unit.split(bank.blocks), bank.position.split(bank.blocks), strict=True):
        block = unit.float().T
        for c, chunk in enumerate(chunks):
            values, index = (chunk.float() @ block).topk(min(k, len(position)), dim=1)
            best[c] = _largest(torch.cat((best[c], _encode(values, position[index])), 1), k)
    for c, own in enumerate(best):
        padded = torch.full((len(own), k), torch.iinfo(torch.int64).min, device=own.device)
        padded[:, : own.shape[1]] = own  # a rank may store fewer than k images
        best[c] = _largest(bank.world.gather_tensors(padded).permute(1, 0, 2).flatten(1), k)
    return _decode(torch.cat(best))


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def _encode(similarity: Tensor, position: Tensor) -> Tensor:
    """Return int64 keys that order pairs by similarity, and equal ones by descending position.

    The upper half is an integer with the order of the float32: the bits of a negative one descend.
    """
    bits = similarity.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - position)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Invert `_encode`."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def votes(similarity: Tensor, labels: Tensor, *, temperature: float, classes: int) -> Tensor:
    """Return the votes of the neighbors.

    Args:
        similarity: (M, k), descending.
        labels: (M, k), of the neighbors.

    Returns:
        (M, C) float32 sums of weights, relative to the weight of the query's nearest neighbor, so
        that they neither overflow nor all vanish.
    """
    scores = torch.zeros(len(similarity), classes, device=similarity.device)
    # float64: divided by a low temperature, it may exceed float32.
    difference = (similarity - similarity[:, :1]).double()
    return scores.scatter_add_(1, labels, (difference / temperature).exp().float())


def knn_accuracy(train: Features, val: Features, *, k: int, temperature: float) -> dict[str, float]:
    """Return the top-1 and top-5 accuracy of `val`, classified by its neighbors in `train`.

    Every rank must call this; all return the same.

    Raises:
        InputError: a feature is not finite.
    """
    check_finite(train, val)
    similarity, position = nearest(train, val, k)
    hits = torch.zeros(2, dtype=torch.int64, device=train.device)
    for start in range(0, len(similarity), _VOTE_CHUNK):
        rows = slice(start, start + _VOTE_CHUNK)
        labels = train.all_labels[position[rows]]
        scores = votes(similarity[rows], labels, temperature=temperature, classes=train.classes)
        hits += top_hits(scores, val.all_labels[rows])
    # GPUs add votes in any order: where two classes are a rounding apart, ranks may disagree.
    return accuracies(train.world.gather_tensors(hits)[0], len(val.all_labels))


def top_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Return how often the label is among the 1 and the 5 highest scores: (..., M, C) -> (..., 2).

    With C < 5 classes, the second is top-C.
    """
    hits = scores.topk(min(5, scores.shape[-1]), dim=-1).indices == labels[:, None]
    return torch.stack((hits[..., 0].sum(-1), hits.sum((-1, -2))), -1)


def accuracies(hits: Tensor, count: int) -> dict[str, float]:
    """Return top-1 and top-5 accuracy of the hits (2,) on `count` images of all ranks."""
    top1, top5 = hits.tolist()
    return {"top1": top1 / count, "top5": top5 / count}


def knn_bytes(train: int, val: int, features: int, k: int, world: World) -> int:
    """Return the memory of a rank in bytes; the formula is at the top of this file."""
    products = 4 * (_QUERY_CHUNK + 4096) * features + 16 * _QUERY_CHUNK * 4096
    shards = feature_bytes(train, features, world) + feature_bytes(val, features, world)
    return shards + (2 * features + 16 * k) * val + products


class KnnTask(EvalTask):
    """Weighted kNN."""

    name = "knn"
    title = "Weighted kNN on frozen features"

    def memory(self, data: Splits, features: int, options: KnnEval, world: World) -> int:
        """See EvalTask.memory."""
        k = min(options.k, len(data.train))
        return knn_bytes(len(data.train), len(data.val), features, k, world)

    def measure(self, backbone: nn.Module, data: Splits, options: KnnEval, context: EvalContext) -> Row:
        """Return top-1 and top-5 accuracy."""
        train, val = (extract_features(backbone, split, context) for split in data)
        return knn_accuracy(train, val, k=options.k, temperature=options.temperature)


KNN = KnnTask()
