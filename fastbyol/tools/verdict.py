"""What a run's metrics say without labels: no sign of collapse, unclear, or collapsed, and why.

docs/quality.md has the rules, what they are based on, and what they cannot tell.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from fastbyol.config import Config

SPREAD = 0.5  # least std of the projections, relative to a uniform spread
RANK_SHARE = 0.05  # least effective rank, relative to the number of features and of images
RANK_KEPT = 0.8  # least effective rank, relative to the highest of the run
RANK_LOST = 0.5  # a rank below this part of the highest one, and below RANK_SHARE, is a collapse
ONE_DIRECTION = 2.0  # an effective rank below this is a collapse
UNCORRELATED_LOSS = 4.0  # BYOL's loss of predictions that are orthogonal to their targets
_MIN_EVALUATIONS = 2


class Verdict(NamedTuple):
    """The outcome and one sentence that gives the reasons."""

    outcome: Literal["good", "unclear", "collapsed"]
    text: str


class Measured(NamedTuple):
    """What a run measured. Values that are missing or not finite are None."""

    epoch: float | None  # of the last training line
    std: float | None  # of the normalized projections, median of the last epoch
    uniform_std: float  # of vectors spread uniformly over the sphere
    loss: float | None  # median of the last epoch
    ranks: list[float]  # effective rank at each evaluation
    rank_limit: int  # number of features or, if smaller, of images
    alignment: float | None
    uniformity: float | None
    knn: float | None  # last online top-1

    @property
    def spread(self) -> float | None:
        """Std of the projections, relative to a uniform spread."""
        return None if self.std is None else self.std / self.uniform_std

    @property
    def rank_share(self) -> float | None:
        """Last effective rank, relative to the highest possible one."""
        return self.ranks[-1] / self.rank_limit if self.ranks else None


def measured(metrics: Sequence[Mapping[str, Any]], config: Config, *, features: int) -> Measured:
    """Collect what a run measured.

    Args:
        metrics: Lines of metrics.jsonl.
        config: The run's config.
        features: F of the backbone.
    """
    train, knn, quality = ([line for line in metrics if line["kind"] == kind] for kind in ("train", "knn", "quality"))
    epoch = _last(train, "epoch")
    recent = [line for line in train if epoch is not None and line["epoch"] > epoch - 1]
    ranks = [_number(line, "rank_me") for line in quality]
    images = config.knn.max_bank_images
    if metrics and config.data.batch_size != "auto" and metrics[-1]["epoch"] > 0:
        images = min(images, round(config.data.batch_size * metrics[-1]["step"] / metrics[-1]["epoch"]))
    return Measured(
        epoch=epoch,
        std=_median(recent, "projection_std"),
        uniform_std=config.model.projection_dim**-0.5,
        loss=_median(recent, "loss"),
        ranks=[rank for rank in ranks if rank is not None] if ranks and ranks[-1] is not None else [],
        rank_limit=max(min(features, images), 1),
        alignment=_last(quality, "alignment"),
        uniformity=_last(quality, "uniformity"),
        knn=_last(knn, "top1"),
    )


def judge(found: Measured, config: Config, *, classes: int | None = None) -> Verdict:
    """Return what the measurements say.

    Args:
        found: Of `measured`.
        config: The run's config.
        classes: Number of classes of the online kNN; None if unknown or without labels.
    """
    if found.epoch is None:
        return Verdict("unclear", "the run has no training metrics.")
    if found.epoch < config.optim.warmup:
        return Verdict("unclear", f"the run ended during the warm-up of {config.optim.warmup:g} epochs.")
    if reasons := _signs_of_collapse(found, config):
        return Verdict("collapsed", f"{'; '.join(reasons)}.")
    if reasons := _doubts(found, config, classes):
        return Verdict("unclear", f"{'; '.join(reasons)}.")
    parts = [
        f"no sign of collapse; the std of the projections is {found.spread:.0%} of a uniform spread",
        f"the effective rank went from {found.ranks[0]:.1f} to {found.ranks[-1]:.1f} of at most {found.rank_limit}",
    ]
    if found.knn is not None:
        parts.append(f"the online kNN reaches {found.knn:.1%}" + (f" (chance: {1 / classes:.1%})" if classes else ""))
    return Verdict("good", f"{', '.join(parts[:-1])}, and {parts[-1]}.")


def _signs_of_collapse(found: Measured, config: Config) -> list[str]:
    threshold = config.log.collapse_threshold
    signs = []
    if found.spread is not None and found.spread < threshold:
        signs.append(
            f"the std of the projections is {found.spread:.1%} of a uniform spread, below log.collapse_threshold={threshold:g}"
        )
    if found.ranks and found.ranks[-1] < ONE_DIRECTION:
        signs.append(f"the effective rank is {found.ranks[-1]:.2f}: the features of all images point in one direction")
    elif found.ranks and found.ranks[-1] < RANK_LOST * max(found.ranks) and found.rank_share < RANK_SHARE:
        signs.append(
            f"the effective rank fell from {max(found.ranks):.1f} to {found.ranks[-1]:.1f} of at most {found.rank_limit}"
        )
    return signs


def _doubts(found: Measured, config: Config, classes: int | None) -> list[str]:
    doubts = []
    if found.spread is None:
        doubts.append("the std of the projections was not measured")
    elif found.spread < SPREAD:
        doubts.append(f"the std of the projections is {found.spread:.0%} of a uniform spread, below {SPREAD:.0%}")
    if not found.ranks:
        doubts.append("the effective rank was not measured")
    elif len(found.ranks) < _MIN_EVALUATIONS:
        doubts.append("the effective rank was measured once, so its trend is unknown")
    if found.ranks and found.rank_share < RANK_SHARE:
        doubts.append(
            f"the effective rank is {found.ranks[-1]:.1f} of at most {found.rank_limit}, below {RANK_SHARE:.0%}"
        )
    if found.ranks and found.ranks[-1] < RANK_KEPT * max(found.ranks):
        doubts.append(f"the effective rank fell from {max(found.ranks):.1f} to {found.ranks[-1]:.1f}")
    if found.loss is None:
        doubts.append("the loss was not measured")
    elif _is_plain_byol(config) and found.loss >= UNCORRELATED_LOSS:
        doubts.append(
            f"the loss is {found.loss:.2f}: predictions that know nothing of their targets have {UNCORRELATED_LOSS:g}"
        )
    if found.knn is not None and classes and found.knn < (needed := knn_above_chance(classes)):
        doubts.append(f"the online kNN reaches {found.knn:.1%}, below {needed:.1%} (chance: {1 / classes:.1%})")
    return doubts


def knn_above_chance(classes: int) -> float:
    """Return the top-1 accuracy that is clearly above chance, 1/classes: twice that, but at most
    halfway from there to 1.
    """
    return min(2 / classes, (1 + 1 / classes) / 2)


def _is_plain_byol(config: Config) -> bool:
    return config.model.loss == "byol" and config.model.contrastive_weight == 0


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = line.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return _number(lines[-1], key) if lines else None


def _median(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the median of the lines' values; None without lines or if a value is missing."""
    values = [_number(line, key) for line in lines]
    return median(values) if values and None not in values else None  # type: ignore[type-var]
