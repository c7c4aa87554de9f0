"""Options of the evaluation tasks. The command line builds its help from them, without torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastbyol.config import absolute_path
from fastbyol.settings.base import Settings
from fastbyol.settings.messages import require as _require
from fastbyol.settings.types import expand_path


@dataclass(kw_only=True)
class EvalConfig(Settings):
    """Options that all evaluation tasks share."""

    MOST: ClassVar[dict[str, float]] = {
        "threads": 4096,
        "k": 10**6,
        "epochs": 10**6,
        "batch_size": 10**6,
        "shots": 10**6,
        "ways": 10**6,
        "queries": 10**6,
        "episodes": 10**6,
    }
    run: str
    """Run folder (its newest valid checkpoint is used) or checkpoint file."""
    root: str | None = None
    """Data set with train and val splits; default: the one the run was trained on."""
    train_split: str | None = None
    """Training split, if not the run's: sub-folder or .beton file of the data set, or a path."""
    val_split: str | None = None
    """Validation split, if not the run's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    threads: int = 0
    """Decoder threads; 0: one per CPU core."""
    baselines: bool = True
    """Also evaluate the untrained network and, if the task supports it, raw pixels."""
    out: str | None = None
    """JSON result file; default: eval_TASK_KEY.json in the run folder (KEY: hash of the inputs)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.run = expand_path(self.run, "run")
        if self.root is not None:
            self.root = absolute_path(self.root, "root")
        for key in ("train_split", "val_split", "out"):
            if (path := getattr(self, key)) is not None:
                setattr(self, key, expand_path(path, key))
        _require(self.threads >= 0, "threads", self.threads, "must be 0 (all cores) or more")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that only this task has, as JSON values."""
        common = {f.name for f in dataclasses.fields(EvalConfig)}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(kw_only=True)
class KnnEval(EvalConfig):
    """Weighted kNN on frozen features."""

    k: int = 20
    """Number of neighbors."""
    temperature: float = 0.07
    """A neighbor of cosine similarity s votes with weight exp(s / temperature)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.k >= 1, "k", self.k, "must be at least 1")
        _require(self.temperature > 0, "temperature", self.temperature, "must be above 0")


@dataclass(kw_only=True)
class ProbeTraining(EvalConfig):
    """Training of linear probes."""

    epochs: int = 80
    """Linear probe: passes over the training images."""
    batch_size: int = 256
    """Linear probe: images per step; with cached features at most 1/16 of the images."""
    base_lrs: tuple[float, ...] = ()
    """Linear probe: learning rates per 256 images, selected on held-out images; default: five."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_training(self.epochs, self.batch_size, self.base_lrs)


@dataclass(kw_only=True)
class LinearEval(ProbeTraining):
    """Linear probe on frozen features."""

    features: Literal["cached", "augmented"] = "cached"
    """cached: center-crop features, extracted once; augmented: the paper's crops and flips."""


@dataclass(kw_only=True)
class FinetuneEval(EvalConfig):
    """Semi-supervised: fine-tune the whole network on a fraction of the labels."""

    fraction: float = 1.0
    """Fraction of each class's training images to use as labeled, e.g. 0.01, 0.1 or 1."""
    subset_seed: int = 0
    """Seed of the images that `fraction` selects."""
    epochs: int = 30
    """Passes over the labeled images."""
    batch_size: int = 256
    """Images per step; at most the number of labeled images."""
    base_lrs: tuple[float, ...] = (0.05,)
    """Learning rates per 256 images; if more than one, selected on held-out training images."""
    save: str | None = None
    """Write the fine-tuned backbone to this .safetensors file, for `fastbyol train --init`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save is not None:
            self.save = expand_path(self.save, "save")
        _check_training(self.epochs, self.batch_size, self.base_lrs)
        _require(bool(self.base_lrs), "base_lrs", self.base_lrs, "name at least one")
        _require(0 < self.fraction <= 1, "fraction", self.fraction, "must lie in (0, 1]")
        _require(self.subset_seed >= 0, "subset_seed", self.subset_seed, "must be 0 or more")


@dataclass(kw_only=True)
class FewshotEval(EvalConfig):
    """Few-shot classification of frozen features by nearest class mean."""

    shots: tuple[int, ...] = (1, 5, 10)
    """Labeled images per class, from the training split."""
    ways: int = 5
    """Classes per episode."""
    queries: int = 15
    """Images per class to classify, from the validation split."""
    episodes: int = 600
    """Episodes for each number of shots."""
    seed: int = 0
    """Seed of the episodes' classes and images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.shots) and min(self.shots) >= 1, "shots", self.shots, "must all be at least 1")
        _require(self.ways >= 2, "ways", self.ways, "must be at least 2")
        _require(self.queries >= 1, "queries", self.queries, "must be at least 1")
        _require(self.episodes >= 2, "episodes", self.episodes, "must be at least 2")
        _require(self.seed >= 0, "seed", self.seed, "must be 0 or more")


@dataclass(kw_only=True)
class RobustnessEval(KnnEval, ProbeTraining):
    """kNN and linear probe, fitted on clean images, under corruptions of five severities."""

    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.seed >= 0, "seed", self.seed, "must be 0 or more")


@dataclass(kw_only=True)
class DenseEval(EvalConfig):
    """Options that segmentation and detection share."""

    _format: ClassVar[str]
    image_size_px: int = 0
    """Side of segmentation crops, shorter side of detection images; 0: 9/4 of the run's size."""
    epochs: int
    """Passes over the training images."""
    batch_size: int
    """Images per step; at most the number of training images."""
    lr: float
    """Peak learning rate of SGD with momentum 0.9."""
    seed: int = 0
    """Seed of the head's weights and of the order of the images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.root is not None, "root", self.root, f"name the {self._format}-format folder")
        for key in ("train_split", "val_split"):
            value = getattr(self, key)
            _require(value is None, key, value, f"must not be set: the {self._format} format defines the splits")
        _check_training(self.epochs, self.batch_size, (self.lr,), "lr")
        size = self.image_size_px
        _require(size == 0 or 32 <= size <= 4096, "image_size_px", size, "must be 0 or lie in 32..4096")
        _require(self.seed >= 0, "seed", self.seed, "must be 0 or more")


@dataclass(kw_only=True)
class SegmentationEval(DenseEval):
    """Semantic segmentation with an FCN head, on the VOC-format folder --root."""

    _format: ClassVar[str] = "VOC"
    finetune: bool = False
    """Train the backbone too; by default only the head is trained."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 16
    """Images per step; at most the number of training images."""
    lr: float = 0.1
    """Peak learning rate of SGD with momentum 0.9."""


@dataclass(kw_only=True)
class DetectionEval(DenseEval):
    """Object detection with torchvision's Faster R-CNN, on the COCO-format folder --root."""

    _format: ClassVar[str] = "COCO"
    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step; at most the number of training images."""
    lr: float = 0.02
    """Peak learning rate of SGD with momentum 0.9."""
    trainable_stages: int = 0
    """Number of the backbone's last stages to train; 0 freezes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.trainable_stages <= 5, "trainable_stages", self.trainable_stages, "must lie in 0..5")


EVALUATIONS: dict[str, type[EvalConfig]] = {
    "knn": KnnEval,
    "linear": LinearEval,
    "finetune": FinetuneEval,
    "fewshot": FewshotEval,
    "robustness": RobustnessEval,
    "segmentation": SegmentationEval,
    "detection": DetectionEval,
}
"""Task name -> its options."""


def _check_training(epochs: int, batch_size: int, lrs: tuple[float, ...], key: str = "base_lrs") -> None:
    _require(epochs >= 1, "epochs", epochs, "must be at least 1")
    _require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    _require(all(lr > 0 for lr in lrs), key, lrs if len(lrs) != 1 else lrs[0], "must be above 0")
