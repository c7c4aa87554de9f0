"""Figures of the report: training curves, a map of the features, and nearest neighbors."""

import warnings
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from fastbyol.config import Config
from fastbyol.data import Images
from fastbyol.data.crops import CENTER_FRACTION, center_crops
from fastbyol.errors import first_line
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.features import Features, check_finite, extract_features
from fastbyol.evaluation.knn import nearest
from fastbyol.model import BYOL
from fastbyol.precision import compute_dtype
from fastbyol.runtime import environment
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.logging import logger
from fastbyol.tools.curves import Curve, Level, RunLines, draw_curves
from fastbyol.tools.plots import ACCENT, BAD, GOOD, MUTED, image_title, to_png
from fastbyol.tools.preview import to_pixels

_QUERIES, _NEIGHBORS = 8, 5
_MAP_IMAGES = 2000
_MAP_CLASSES = 10  # with a color of their own
_MIN_UMAP_IMAGES = 50  # UMAP's own defaults look at 15 neighbors

_CURVES = (
    Curve("train", "loss", "Loss"),
    Curve("knn", "top1", "Online kNN top-1", "%"),
    Curve("quality", "rank_me", "Effective rank of the features (RankMe)"),
    Curve("quality", "alignment", "Alignment: distance of two views"),
    Curve("quality", "uniformity", "Uniformity: lower is more spread out"),
    Curve("train", "lr", "Learning rate"),
    Curve("train", "tau", "Target EMA decay (tau)"),
    Curve("train", "projection_std", "Std of normalized projections", from_zero=True),
    Curve("train", "images_per_s", "Images per second", from_zero=True),
    Curve("train", "wait_share", "Time waiting for data", "%", from_zero=True),
)


def draw_run_curves(metrics: list[dict[str, Any]], config: Config) -> bytes | None:
    """Plot a run's metrics by epoch.

    The std of uniformly distributed unit vectors and the level of the collapse warning are marked.

    Args:
        metrics: Lines of metrics.jsonl.
        config: The run's config.

    Returns:
        The figure as PNG; None without metrics.
    """
    uniform = config.model.projection_dim**-0.5
    levels = [
        Level(uniform, "uniform on the sphere", GOOD),
        Level(config.log.collapse_threshold * uniform, "collapse warning", BAD),
    ]
    return draw_curves([RunLines(metrics, {"color": ACCENT})], _CURVES, {"projection_std": levels})


def draw_map(config: Config, model: BYOL, images: Images) -> bytes | None:
    """Plot the unit features of up to 2000 images in two dimensions, colored by class.

    By their first two principal components and, if umap-learn is installed, by UMAP (McInnes et al.
    2018) with cosine distance.

    Returns:
        The figure as PNG; None if fewer than three images can be read.

    Raises:
        InputError: No image can be read, or a feature is not finite.
    """
    images = images.subsample(_MAP_IMAGES)
    features = _extract(config, model, images)
    check_finite(features)
    x = features.unit.float().cpu().numpy()
    if len(x) < 3:
        return None
    pca = PCA(2, random_state=0)
    with np.errstate(invalid="ignore"):  # the features of a collapsed network are all equal
        xy = pca.fit_transform(x)
    share = float(np.nan_to_num(pca.explained_variance_ratio_).sum())
    points = {f"PCA: {share:.0%} of the variance": xy}
    if len(x) >= _MIN_UMAP_IMAGES and (embedded := _umap(x)) is not None:
        points["UMAP"] = embedded
    figure = Figure(figsize=(5.4 * len(points) + 1.6, 5), layout="constrained")
    for axis, (title, xy) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        _scatter(axis, xy, features.labels.cpu().numpy(), images.classes)
        axis.set_title(title, fontsize=10, loc="left")
    if images.classes:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    return to_png(figure)


def _umap(x: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return the positions (n, 2) by UMAP; None if umap-learn is not installed, or fails."""
    if environment.installed("umap-learn") is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed allows one thread only
            import umap

            return umap.UMAP(metric="cosine", random_state=0).fit_transform(x)
    except Exception as error:  # any: the package is optional, and so is its picture
        logger.warning(f"the report lacks UMAP: {type(error).__name__}: {first_line(error)}")
        return None


def _legend(name: str) -> str:
    """Return a class name for the legend, which leaves out names that begin with _."""
    return image_title(f" {name}" if name.startswith("_") else name)


def _scatter(axis: Axes, xy: NDArray[np.float32], labels: NDArray[np.int64], classes: list[str]) -> None:
    """Plot points (n, 2). The largest classes have colors, the other points are gray."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    shown = np.sort(np.argsort(-counts, kind="stable")[:_MAP_CLASSES])
    others = ~np.isin(labels, shown)
    style = {"s": np.clip(8000 / len(xy), 6, 40), "linewidths": 0}
    if others.any():
        axis.scatter(*xy[others].T, color=MUTED, alpha=0.35, label="other classes", **style)
    for k, label in enumerate(shown):
        axis.scatter(*xy[labels == label].T, color=f"C{k}", label=_legend(classes[label]), **style)
    axis.set(xticks=[], yticks=[])
    axis.spines[["top", "right"]].set_visible(False)


def draw_neighbors(config: Config, model: BYOL, train: Images, val: Images | None = None) -> bytes | None:
    """Draw images and their nearest training images by cosine similarity of features.

    Unreadable images are logged as warnings and left out.

    Args:
        config: The run's config.
        model: The run's model.
        train: Training images; at most knn.max_bank_images of them are searched.
        val: Validation images of the same classes, to take the queries from. Without them, the
            queries are training images, and no classes are shown.

    Returns:
        The figure as PNG: one row per query, with its neighbors to the right. A green frame marks a
        neighbor of the same class, a red one another class. None if there is only one image.

    Raises:
        InputError: No image of a split can be read.
    """
    bank = train.subsample(config.knn.max_bank_images)
    bank_features = _extract(config, model, bank)
    bank_indices = _readable(bank, bank_features)
    if val is None:  # `own`: position of each query among the readable images
        own = np.linspace(0, len(bank_indices) - 1, min(_QUERIES, len(bank_indices))).astype(int)
        queries = bank.subset(np.array(bank_indices)[own])
    else:
        own, queries = None, val.subsample(_QUERIES)
    query_features = _extract(config, model, queries)
    query_indices = _readable(queries, query_features)
    similarity, index = nearest(bank_features, query_features, _NEIGHBORS + (own is not None))  # (queries, neighbors)
    found = [list(zip(*row, strict=True)) for row in zip(index.tolist(), similarity.tolist(), strict=True)]
    if own is not None:  # an image is no neighbor of itself
        found = [[pair for pair in row if pair[0] != own[q]] for q, row in zip(query_indices, found, strict=True)]
    if not any(found):
        return None
    return to_png(_neighbor_grid(config, queries, query_indices, bank, bank_indices, found, is_labeled=val is not None))


def _neighbor_grid(
    config: Config,
    queries: Images,
    query_indices: list[int],
    bank: Images,
    bank_indices: list[int],
    found: list[list[tuple[int, float]]],
    *,
    is_labeled: bool,
) -> Figure:
    """Draw queries and their neighbors.

    Args:
        found: For each query, (position among the readable images of the bank, similarity) each.
            Those that have no column are left out.
    """
    size = config.data.image_size_px
    figure = Figure(figsize=(1.45 * (1 + _NEIGHBORS), 1.62 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), 1 + _NEIGHBORS, squeeze=False)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for axes, query, row in zip(grid, query_indices, found, strict=True):
        axes[0].imshow(_center_crop(queries, query, size))
        axes[0].set_title(image_title(queries.classes[queries.labels[query]]) if is_labeled else "query", fontsize=7)
        for axis, (position, similarity) in zip(axes[1:], row, strict=False):
            neighbor = bank_indices[position]
            axis.imshow(_center_crop(bank, neighbor, size))
            name = f"{image_title(bank.classes[bank.labels[neighbor]])} " if is_labeled else ""
            axis.set_title(f"{name}{similarity:.2f}", fontsize=7)
            if is_labeled:
                _draw_frame(axis, GOOD if bank.labels[neighbor] == queries.labels[query] else BAD)
    return figure


def _extract(config: Config, model: BYOL, images: Images) -> Features:
    device = choose_device("auto")
    dtype, threads = compute_dtype(config.precision, device), config.data.threads
    context = EvalContext(size=config.data.image_size_px, device=device, dtype=dtype, threads=threads)
    backbone = model.online.backbone.to(device=device, memory_format=torch.channels_last)
    return extract_features(backbone, images, context, None)


def _draw_frame(axis: Axes, color: str) -> None:
    frame = Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, linewidth=4, edgecolor=color)
    axis.add_patch(frame)


def _readable(images: Images, features: Features) -> list[int]:
    """Return the indices of the images that have features, in the order of the features."""
    for index, reason in sorted(features.bad.items()):
        logger.warning(f"the report's neighbors lack {images.location(index)}: {reason}")
    return [index for index in range(len(images)) if index not in features.bad]


def _center_crop(images: Images, index: int, size: int) -> NDArray[np.uint8]:
    """Return the (S, S, 3) crop of an image that the backbone sees."""
    image = images.subset(np.array([index]))
    crops, _ = next(center_crops(image, size=size, fraction=CENTER_FRACTION, batch_size=1, threads=1, bad={}))
    return to_pixels(crops[0])
