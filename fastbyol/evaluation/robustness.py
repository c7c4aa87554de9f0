"""kNN and linear probe, fitted on clean images, under corruptions of five severities.

Corruptions and severities: Hendrycks & Dietterich 2019 (arXiv 1903.12261), ImageNet-C: Gaussian
noise, Gaussian blur, JPEG and contrast, applied to the center crop of a validation image. The
blur's sigma, given for 224 px, is scaled with the image size.

Shapes: n images, S = side in pixels; images are (n, 3, S, S) in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import simplejpeg
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.features import Features, Splits, extract_each, extract_features
from fastbyol.evaluation.knn import knn_accuracy, knn_bytes
from fastbyol.evaluation.linear import CACHED_BASE_LRS, LinearClassifier, fit_linear, probe_batch_size, probe_bytes
from fastbyol.evaluation.options import RobustnessEval
from fastbyol.evaluation.task import EvalTask
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime.distributed import World

SEVERITIES = 5
NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)
BLUR_SIGMA_224_PX = (1.0, 2.0, 3.0, 4.0, 6.0)
JPEG_QUALITY = (25, 18, 15, 10, 7)
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)

Corruption = Callable[[Tensor, NDArray[np.int64], int, int], Tensor]
"""(images, their indices, severity 0..4, seed) -> images."""


def gaussian_noise(images: Tensor, indices: NDArray[np.int64], severity: int, seed: int) -> Tensor:
    """Add N(0, std). An image's noise depends only on seed, severity and index."""
    noise = np.stack(
        [
            np.random.default_rng([seed, severity, int(index)]).standard_normal(images.shape[1:], dtype=np.float32)
            for index in indices
        ]
    )
    return images + NOISE_STD[severity] * torch.from_numpy(noise)


def blur(images: Tensor, indices: NDArray[np.int64], severity: int, seed: int) -> Tensor:
    """Apply a Gaussian blur, truncated at 3 sigma, with reflection padding."""
    sigma = BLUR_SIGMA_224_PX[severity] * images.shape[-1] / 224
    return gaussian_blur(images, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)


def jpeg(images: Tensor, indices: NDArray[np.int64], severity: int, seed: int) -> Tensor:
    """Compress and decompress as JPEG with 4:2:0 chroma subsampling."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    files = (simplejpeg.encode_jpeg(p, quality=JPEG_QUALITY[severity], colorsubsampling="420") for p in pixels)
    decoded = np.stack([simplejpeg.decode_jpeg(file, fastdct=False, fastupsample=False) for file in files])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).float() / 255


def contrast(images: Tensor, indices: NDArray[np.int64], severity: int, seed: int) -> Tensor:
    """Scale the deviation from the mean of each image and channel."""
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * CONTRAST[severity] + mean


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "gaussian_blur": blur,
    "jpeg": jpeg,
    "contrast": contrast,
}


def corrupt(crops: Tensor, indices: NDArray[np.int64], name: str, severity: int, seed: int) -> Tensor:
    """Corrupt normalized crops (n, 3, S, S). Pixels are clipped to [0, 1]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = (crops * std + mean).clamp(0, 1)
    images = CORRUPTIONS[name](images, indices, severity, seed).clamp(0, 1)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)


class RobustnessTask(EvalTask):
    """kNN and linear probe under corruptions."""

    name = "robustness"
    title = "Robustness to corruptions"
    has_figure = True

    def memory(self, data: Splits, features: int, options: RobustnessEval, world: World) -> int:
        """See EvalTask.memory. One corruption is held at all severities at a time."""
        train, val = len(data.train), len(data.val)
        probes = probe_bytes(train, SEVERITIES * val, features, len(data.classes), options, world)
        return probes + knn_bytes(0, val, features, min(options.k, train), world)

    def measure(self, backbone: nn.Module, data: Splits, options: RobustnessEval, context: EvalContext) -> Row:
        """Return clean accuracies, means over corruptions and severities, and curves."""
        train = extract_features(backbone, data.train, context)
        probe = fit_linear(
            train,
            base_lrs=options.base_lrs or CACHED_BASE_LRS,
            epochs=options.epochs,
            batch_size=probe_batch_size(options.batch_size, len(data.train)),
        )
        # Images are corrupted on the host; the same decoder reads the clean ones.
        clean_val = extract_features(backbone, data.val, replace(context, decoder="native"))
        clean = _accuracies(train, probe, clean_val, options)
        curves: dict[str, dict[str, list[float]]] = {}
        for name in CORRUPTIONS:  # one pass each: the features of all could fill a GPU
            transforms = [partial(corrupt, name=name, severity=k, seed=options.seed) for k in range(SEVERITIES)]
            accuracies = [
                _accuracies(train, probe, val, options)
                for val in extract_each(backbone, data.val, context, transforms, name)
            ]
            curves[name] = {metric: [values[metric] for values in accuracies] for metric in clean}
        means = {f"{m}_corrupted": float(np.mean([curve[m] for curve in curves.values()])) for m in clean}
        return {f"{m}_clean": value for m, value in clean.items()} | means | {"curves": curves}

    def format_row(self, row: Row) -> str:
        """Return clean and mean corrupted top-1 as text."""
        parts = (
            f"{name} {row[f'{key}_top1_clean']:6.1%} -> {row[f'{key}_top1_corrupted']:6.1%}"
            for key, name in _CLASSIFIERS
        )
        return "  ".join(parts) + "  (top-1, clean -> mean of all corruptions)"

    def draw(self, rows: dict[str, Row]) -> Figure:
        """Plot top-1 over severity, per classifier and corruption, with one line per row."""
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        grid = figure.subplots(len(_CLASSIFIERS), len(CORRUPTIONS), sharex=True, sharey=True, squeeze=False)
        for (key, title), axes in zip(_CLASSIFIERS, grid, strict=True):
            for name, axis in zip(CORRUPTIONS, axes, strict=True):
                for k, (label, row) in enumerate(rows.items()):
                    values = [100 * v for v in (row[f"{key}_top1_clean"], *row["curves"][name][f"{key}_top1"])]
                    axis.plot(range(SEVERITIES + 1), values, marker="o", markersize=3, color=f"C{k}", label=label)
                axis.set_title(f"{title}, {name.replace('_', ' ')}", fontsize=9, loc="left")
                axis.grid(alpha=0.25)
                axis.spines[["top", "right"]].set_visible(False)
                axis.tick_params(labelsize=8)
            axes[0].set_ylabel("top-1 (%)", fontsize=8)
        grid[0, 0].set_ylim(bottom=0)
        for axis in grid[-1]:
            axis.set_xlabel("severity (0: clean)", fontsize=8)
        grid[0, -1].legend(fontsize=8, frameon=False)
        return figure


def _accuracies(train: Features, probe: LinearClassifier, val: Features, options: RobustnessEval) -> dict[str, float]:
    """Return knn_top1, knn_top5, linear_top1 and linear_top5. Every rank must call this."""
    found = {
        "knn": knn_accuracy(train, val, k=options.k, temperature=options.temperature),
        "linear": probe.accuracies(val),
    }
    return {f"{name}_{top}": value for name, values in found.items() for top, value in values.items()}


_CLASSIFIERS = (("knn", "kNN"), ("linear", "linear"))  # key, title

ROBUSTNESS = RobustnessTask()
