"""Few-shot episodes on frozen features, classified by the nearest class mean.

An episode draws `ways` classes and, per class, `shots` training images as support and `queries`
validation images. Features are centered on the mean of the training split and l2-normalized. A
query gets the class whose support mean is nearest. Source: Wang et al. 2019, "SimpleShot" (arXiv
1911.04623), variant CL2N.

Shapes: W ways, K shots, F features.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config import Config
from fastbyol.errors import InputError
from fastbyol.evaluation.context import EvalContext, Row, Track
from fastbyol.evaluation.features import Features, Splits, extract_features, feature_bytes, open_splits
from fastbyol.evaluation.options import FewshotEval
from fastbyol.evaluation.task import EvalTask
from fastbyol.runtime.distributed import World


def episode_accuracies(
    train: Features,
    val: Features,
    options: FewshotEval,
    shots: int,
    track: Track = lambda episodes, total: episodes,
) -> NDArray[np.float64]:
    """Return the top-1 accuracy of each episode, (episodes,). Every rank must call this.

    The draws depend only on seed, shots and labels.

    Raises:
        InputError: fewer than `ways` classes have enough features.
    """
    mean, device = train.mean(), train.device
    labels = train.all_labels.cpu().numpy(), val.all_labels.cpu().numpy()
    eligible = _eligible_classes(*labels, train.classes, shots, options, "classes have readable images:")
    members = [[np.flatnonzero(part == c) for c in range(train.classes)] for part in labels]
    truth = torch.arange(options.ways, device=device).repeat_interleave(options.queries)
    accuracies = []
    for episode in track(range(options.episodes), options.episodes):
        rng = np.random.default_rng([options.seed, shots, episode])
        classes = rng.choice(eligible, options.ways, replace=False)
        support, query = (
            np.stack([rng.choice(part[c], count, replace=False) for c in classes])
            for part, count in zip(members, (shots, options.queries), strict=True)
        )
        x, y = (
            F.normalize(part.gather(torch.from_numpy(positions).flatten().to(device)) - mean, dim=1)
            for part, positions in ((train, support), (val, query))
        )
        scores = nearest_mean_scores(x.unflatten(0, support.shape), y)
        accuracies.append((scores.argmax(1) == truth).float().mean().item())
    return np.array(accuracies)


def nearest_mean_scores(support: Tensor, queries: Tensor) -> Tensor:
    """Return the negative Euclidean distances of queries to class means.

    Args:
        support: (W, K, F).
        queries: (M, F).

    Returns:
        (M, W).
    """
    return -torch.cdist(queries, support.mean(1))


def _eligible_classes(
    train: NDArray[np.int64], val: NDArray[np.int64], classes: int, shots: int, options: FewshotEval, subject: str
) -> NDArray[np.int64]:
    """Return the classes with at least `shots` training and `options.queries` validation images.

    Args:
        train: labels.
        val: labels.
        subject: of the error message.

    Raises:
        InputError: there are fewer than `options.ways`.
    """
    ways, queries = options.ways, options.queries
    enough = (np.bincount(train, minlength=classes) >= shots) & (np.bincount(val, minlength=classes) >= queries)
    if enough.sum() < ways:
        raise InputError(
            f"ways={ways}: only {enough.sum()} of {classes} {subject} {shots} training and {queries} validation images; "
            "lower ways, shots or queries"
        )
    return np.flatnonzero(enough)


class FewshotTask(EvalTask):
    """Few-shot episodes."""

    name = "fewshot"
    title = "Few-shot episodes"

    def open(self, options: FewshotEval, config: Config, context: EvalContext) -> Splits:
        """Return splits with enough images of enough classes.

        Raises:
            InputError: they have too few.
        """
        splits = open_splits(options, config, context.sources, context.world)
        root = splits.train.root
        classes, root = len(splits.classes), root.parent if isinstance(root, Path) else root
        if options.ways > classes:
            raise InputError(f"ways={options.ways}: {root} has {classes} classes; lower ways")
        labels = [split.labels for split in splits]
        for shots in options.shots:
            _eligible_classes(*labels, classes, shots, options, f"classes of {root} have")
        return splits

    def memory(self, data: Splits, features: int, options: FewshotEval, world: World) -> int:
        """See EvalTask.memory. The images of an episode are few."""
        return sum(feature_bytes(len(split), features, world) for split in data)

    def measure(self, backbone: nn.Module, data: Splits, options: FewshotEval, context: EvalContext) -> Row:
        """Return mean accuracy and half-width of its 95 % interval for each number of shots."""
        train, val = (extract_features(backbone, split, context) for split in data)
        row: Row = {}

        def track(episodes: Iterable[int], total: int) -> Iterator[int]:
            return context.track("episodes", episodes, total, unit="episodes")

        for shots in options.shots:
            found = episode_accuracies(train, val, options, shots, track)
            row[f"top1_{shots}shot"] = float(found.mean())
            # Normal approximation of the mean over episodes.
            row[f"ci95_{shots}shot"] = float(1.96 * found.std(ddof=1) / math.sqrt(len(found)))
        return row

    def format_row(self, row: Row) -> str:
        """Return mean and interval as text."""
        shots = [key.removeprefix("top1_").removesuffix("shot") for key in row if key.startswith("top1_")]
        return "  ".join(
            f"{k}-shot {100 * row[f'top1_{k}shot']:.1f} ± {100 * row[f'ci95_{k}shot']:.1f} %" for k in shots
        )


FEWSHOT = FewshotTask()
