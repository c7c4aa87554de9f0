"""kNN and linear probe under corruptions of five strengths; both are fitted on clean training images.

Corruptions and strengths: Hendrycks & Dietterich 2019 (arXiv 1903.12261), ImageNet-C: Gaussian noise, Gaussian blur, JPEG and
contrast, applied to the center crop of a validation image. The blur is given there for 224 px and scaled with the side.

Shapes: n images, S = side in pixels; images are (n, 3, S, S) in [0, 1].
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import simplejpeg
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from fastbyol.config import RobustnessEval
from fastbyol.evaluate.features import Features, Splits, extract_features, extract_features_each, open_splits
from fastbyol.evaluate.knn import knn_scores, top_accuracies
from fastbyol.evaluate.linear import CACHED_BASE_LRS, LinearClassifier, fit_linear
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row
from fastbyol.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.tools.plots import to_png

STRENGTHS = 5
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR_SIGMA_224_PX = (1.0, 2.0, 3.0, 4.0, 6.0)
JPEG_QUALITY = (25, 18, 15, 10, 7)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor about each image's mean, per channel

Corruption = Callable[[Tensor, NDArray[np.int64], int, int], Tensor]  # images, indices, strength 0..4, seed -> images


def gaussian_noise(images: Tensor, indices: NDArray[np.int64], strength: int, seed: int) -> Tensor:
    """Adds N(0, std) per pixel and channel; an image's noise depends on (seed, strength, index) alone."""
    noise = np.stack(
        [
            np.random.default_rng([seed, strength, int(index)]).standard_normal(images.shape[1:], dtype=np.float32)
            for index in indices
        ]
    )
    return images + NOISE_STD[strength] * torch.from_numpy(noise)


def blur(images: Tensor, indices: NDArray[np.int64], strength: int, seed: int) -> Tensor:
    """A Gaussian of the strength's sigma, cut off at three of them, mirrored at the edge."""
    sigma = BLUR_SIGMA_224_PX[strength] * images.shape[-1] / 224
    return gaussian_blur(images, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def jpeg(images: Tensor, indices: NDArray[np.int64], strength: int, seed: int) -> Tensor:
    """Through a 4:2:0 JPEG file of the strength's quality."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    files = (simplejpeg.encode_jpeg(p, quality=JPEG_QUALITY[strength], colorsubsampling="420") for p in pixels)
    back = np.stack([simplejpeg.decode_jpeg(file, fastdct=False, fastupsample=False) for file in files])
    return torch.from_numpy(back).permute(0, 3, 1, 2).float() / 255


def contrast(images: Tensor, indices: NDArray[np.int64], strength: int, seed: int) -> Tensor:
    """(x - mean) * factor + mean, the mean of each image and channel."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * CONTRAST[strength] + mean


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": blur,
    "jpeg": jpeg,
    "contrast": contrast,
}


def corrupted(crops: Tensor, indices: NDArray[np.int64], name: str, strength: int, seed: int) -> Tensor:
    """A corruption of normalized crops (n, 3, S, S): to [0, 1] and back, clipped to it."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (crops * std + mean).clamp(0, 1)
    images = CORRUPTIONS[name](images, indices, strength, seed).clamp(0, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


def _measure(backbone: nn.Module | None, splits: Splits, options: RobustnessEval, frame: EvalContext) -> Row:
    train = extract_features(backbone, splits.train, frame)
    probe = fit_linear(
        train,
        base_lrs=options.base_lrs or CACHED_BASE_LRS,
        epochs=options.epochs,
        batch_size=options.batch_size,
    )
    clean = _accuracies(train, probe, extract_features(backbone, splits.val, frame), options)
    curves: dict[str, dict[str, list[float]]] = {}
    for name in CORRUPTIONS:  # one decode for all strengths; for all corruptions the features would fill a GPU
        alters = [partial(corrupted, name=name, strength=k, seed=options.seed) for k in range(STRENGTHS)]
        found = [
            _accuracies(train, probe, val, options)
            for val in extract_features_each(backbone, splits.val, frame, alters, name)
        ]
        curves[name] = {metric: [accuracies[metric] for accuracies in found] for metric in clean}
    means = {f"{m}_corrupted": float(np.mean([curve[m] for curve in curves.values()])) for m in clean}
    return {f"{m}_clean": value for m, value in clean.items()} | means | {"curves": curves}


def _accuracies(train: Features, probe: LinearClassifier, val: Features, options: RobustnessEval) -> dict[str, float]:
    scores = {
        "knn": knn_scores(
            train.x, train.labels, val.x, k=options.k, temperature=options.temperature, classes=train.classes
        ),
        "linear": probe.scores(val.x),
    }
    return {
        f"{classifier}_{top}": value
        for classifier, values in scores.items()
        for top, value in top_accuracies(values, val.labels).items()
    }


def _text(row: Row) -> str:
    parts = (
        f"{name} {row[f'{key}_top1_clean']:6.1%} -> {row[f'{key}_top1_corrupted']:6.1%}" for key, name in _CLASSIFIERS
    )
    return "  ".join(parts) + "  (top-1, clean -> mean of all corruptions)"


_CLASSIFIERS = (("knn", "kNN"), ("linear", "linear"))


def draw_curves(rows: dict[str, Row]) -> bytes:
    """Top-1 over strength, one plot per classifier and corruption, one line per row; a PNG."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.subplots(len(_CLASSIFIERS), len(CORRUPTIONS), sharex=True, sharey=True, squeeze=False)
    for (key, title), axes in zip(_CLASSIFIERS, grid, strict=True):
        for name, axis in zip(CORRUPTIONS, axes, strict=True):
            for k, (label, row) in enumerate(rows.items()):
                values = [row[f"{key}_top1_clean"], *row["curves"][name][f"{key}_top1"]]
                axis.plot(
                    range(STRENGTHS + 1),
                    [100 * v for v in values],
                    marker="o",
                    markersize=3,
                    color=f"C{k}",
                    label=label,
                )
            axis.set_title(f"{title}, {name.replace('_', ' ')}", fontsize=9, loc="left")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        axes[0].set_ylabel("top-1 (%)", fontsize=8)
    grid[0, 0].set_ylim(bottom=0)
    for axis in grid[-1]:
        axis.set_xlabel("strength (0: clean)", fontsize=8)
    grid[0, -1].legend(fontsize=8, frameon=False)
    return to_png(figure)


ROBUSTNESS = Protocol(
    name="robustness",
    title="Robustness to corruptions",
    open=lambda options, config, frame: open_splits(options, config),
    measure=_measure,
    row_text=_text,
    draw=draw_curves,
)
