"""Few-shot episodes on frozen features, classified by the nearest class mean.

An episode draws `ways` classes, `shots` training images of each as support, and `queries` validation images of each. Features
are centered on the mean of the training split and l2-normalized; a query takes the class whose support mean is nearest.
Source: Wang et al. 2019, "SimpleShot" (arXiv 1911.04623), the variant CL2N.

Shapes: W ways, K shots, Q queries, F features.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config import Config, FewshotEval
from fastbyol.errors import InputError
from fastbyol.evaluate.features import Features, Splits, extract_features, open_splits
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row, Track


def open_episodes(options: FewshotEval, config: Config, frame: EvalContext) -> Splits:
    """Splits with enough images of enough classes.

    Raises:
        InputError: they are too few.
    """
    splits = open_splits(options, config)
    classes, where = len(splits.classes), splits.train.root.parent
    if options.ways > classes:
        raise InputError(f"ways={options.ways}: {where} has {classes} classes; lower ways")
    labels = [split.labels for split in splits]
    for shots in options.shots:
        _classes_with_enough(*labels, classes, shots, options.ways, options.queries, f"classes of {where} have")
    return splits


def episode_accuracies(
    train: Features,
    val: Features,
    *,
    shots: int,
    ways: int,
    queries: int,
    episodes: int,
    seed: int,
    track: Track = lambda episodes, total: episodes,
) -> NDArray[np.float64]:
    """(episodes,) top-1 in [0, 1] of each episode; the draws depend on the seed, the shots and the labels alone.

    Raises:
        InputError: fewer than `ways` classes have enough features.
    """
    mean = train.x.mean(0)
    x, y = (F.normalize(features.x - mean, dim=1) for features in (train, val))
    labels = train.labels.cpu().numpy(), val.labels.cpu().numpy()
    eligible = _classes_with_enough(*labels, train.classes, shots, ways, queries, "classes have readable images:")
    members = [[np.flatnonzero(part == c) for c in range(train.classes)] for part in labels]
    truth = torch.arange(ways, device=x.device).repeat_interleave(queries)
    accuracies = []
    for episode in track(range(episodes), episodes):
        rng = np.random.default_rng([seed, shots, episode])
        classes = rng.choice(eligible, ways, replace=False)
        support, asked = (
            np.stack([rng.choice(part[c], count, replace=False) for c in classes])
            for part, count in zip(members, (shots, queries), strict=True)
        )
        scores = nearest_mean_scores(x[torch.from_numpy(support)], y[torch.from_numpy(asked).flatten()])
        accuracies.append((scores.argmax(1) == truth).float().mean().item())
    return np.array(accuracies)


def nearest_mean_scores(support: Tensor, queries: Tensor) -> Tensor:
    """Minus the Euclidean distance of queries (M, F) to the means of support (W, K, F): (M, W)."""
    return -torch.cdist(queries, support.mean(1))


def _classes_with_enough(
    train: NDArray[np.int64], val: NDArray[np.int64], classes: int, shots: int, ways: int, queries: int, have: str
) -> NDArray[np.int64]:
    """Those that have `shots` training and `queries` validation images.

    Raises:
        InputError: they are fewer than `ways`.
    """
    enough = (np.bincount(train, minlength=classes) >= shots) & (np.bincount(val, minlength=classes) >= queries)
    if enough.sum() < ways:
        raise InputError(
            f"ways={ways}: only {enough.sum()} of {classes} {have} {shots} training and {queries} validation images; "
            "lower ways, shots or queries"
        )
    return np.flatnonzero(enough)


def _measure(backbone: nn.Module | None, splits: Splits, options: FewshotEval, frame: EvalContext) -> Row:
    train, val = (extract_features(backbone, split, frame) for split in splits)
    row: Row = {}
    for shots in options.shots:
        found = episode_accuracies(
            train,
            val,
            shots=shots,
            ways=options.ways,
            queries=options.queries,
            episodes=options.episodes,
            seed=options.seed,
            track=lambda episodes, total: frame.track("episodes", episodes, total, unit="episodes"),
        )
        row[f"top1_{shots}shot"] = float(found.mean())
        # Half of the 95 % interval of the mean over episodes, by the normal approximation.
        row[f"ci95_{shots}shot"] = float(1.96 * found.std(ddof=1) / math.sqrt(len(found)))
    return row


def _text(row: Row) -> str:
    shots = [key.removeprefix("top1_").removesuffix("shot") for key in row if key.startswith("top1_")]
    return "  ".join(f"{k}-shot {100 * row[f'top1_{k}shot']:.1f} ± {100 * row[f'ci95_{k}shot']:.1f} %" for k in shots)


FEWSHOT = Protocol(
    name="fewshot",
    title="Few-shot episodes",
    open=open_episodes,
    measure=_measure,
    row_text=_text,
)
