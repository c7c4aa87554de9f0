"""Options of the evaluation tasks. The command line builds its help from them, without torch."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from fastbyol.settings.base import Settings
from fastbyol.settings.limits import (
    MAX_COUNT,
    AbsolutePath,
    Count,
    ExpandedPath,
    Fraction,
    Positive,
    Seed,
    Threads,
    above,
    at_least,
    at_most,
    interval,
)
from fastbyol.settings.messages import require


def not_empty(value: tuple, key: str) -> tuple:
    """Limit of settings: the list has at least one item.

    Raises:
        BadSetting: it is empty.
    """
    require(bool(value), key, value, "name at least one")
    return value


@dataclass(kw_only=True)
class EvalConfig(Settings):
    """Options that all evaluation tasks share."""

    run: ExpandedPath
    """Run folder (its newest valid checkpoint is used) or checkpoint file."""
    root: AbsolutePath | None = None
    """Data set with train and val splits; default: the one the run was trained on."""
    train_split: ExpandedPath | None = None
    """Training split, if not the run's: sub-folder or .beton file of the data set, or a path."""
    val_split: ExpandedPath | None = None
    """Validation split, if not the run's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    threads: Threads = 0
    """Decoder threads; 0: one per CPU core."""
    baselines: bool = True
    """Also evaluate the untrained network and, if the task supports it, raw pixels."""
    out: ExpandedPath | None = None
    """JSON result file; default: eval_TASK_KEY.json in the run folder (KEY: hash of the inputs)."""

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that only this task has, as JSON values."""
        common = {f.name for f in dataclasses.fields(EvalConfig)}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in common}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(kw_only=True)
class KnnEval(EvalConfig):
    """Weighted kNN on frozen features."""

    k: Count = 20
    """Number of neighbors."""
    temperature: Positive = 0.07
    """A neighbor of cosine similarity s votes with weight exp(s / temperature)."""


@dataclass(kw_only=True)
class ProbeTraining(EvalConfig):
    """Training of linear probes."""

    epochs: Count = 80
    """Linear probe: passes over the training images."""
    batch_size: Annotated[int | Literal["auto"], at_least(1), at_most(MAX_COUNT)] = "auto"
    """Linear probe: images per step. auto is 256, and 1024 from 100,086 training images on, as in
    the paper; with cached features at most 1/16 of the images."""
    base_lrs: Annotated[tuple[float, ...], above(0)] = ()
    """Linear probe: learning rates per 256 images, selected on held-out images; default: five."""


@dataclass(kw_only=True)
class LinearEval(ProbeTraining):
    """Linear probe on frozen features."""

    features: Literal["cached", "augmented"] = "cached"
    """cached: center-crop features, extracted once; augmented: the paper's crops and flips."""


@dataclass(kw_only=True)
class FinetuneEval(EvalConfig):
    """Semi-supervised: fine-tune the whole network on a fraction of the labels."""

    fraction: Fraction = 1.0
    """Fraction of each class's training images to use as labeled, e.g. 0.01, 0.1 or 1."""
    subset_seed: Seed = 0
    """Seed of the images that `fraction` selects."""
    epochs: Count = 30
    """Passes over the labeled images."""
    batch_size: Count = 256
    """Images per step; at most the number of labeled images."""
    base_lrs: Annotated[tuple[float, ...], not_empty, above(0)] = (0.05,)
    """Learning rates per 256 images; if more than one, selected on held-out training images."""
    save: ExpandedPath | None = None
    """Write the fine-tuned backbone to this .safetensors file, for `fastbyol train --init`."""


@dataclass(kw_only=True)
class FewshotEval(EvalConfig):
    """Few-shot classification of frozen features by nearest class mean."""

    shots: Annotated[tuple[int, ...], not_empty, at_least(1), at_most(MAX_COUNT)] = (1, 5, 10)
    """Labeled images per class, from the training split."""
    ways: Annotated[int, at_least(2), at_most(MAX_COUNT)] = 5
    """Classes per episode."""
    queries: Count = 15
    """Images per class to classify, from the validation split."""
    episodes: Annotated[int, at_least(2), at_most(MAX_COUNT)] = 600
    """Episodes for each number of shots."""
    seed: Seed = 0
    """Seed of the episodes' classes and images."""


@dataclass(kw_only=True)
class RobustnessEval(KnnEval, ProbeTraining):
    """kNN and linear probe, fitted on clean images, under corruptions of five severities."""

    seed: Seed = 0
    """Seed of the noise."""


@dataclass(kw_only=True)
class DenseEval(EvalConfig):
    """Options that segmentation and detection share."""

    _format: ClassVar[str]
    image_size_px: Annotated[int, interval(32, 4096, zero=True)] = 0
    """Side of segmentation crops, shorter side of detection images; 0: 9/4 of the run's size."""
    epochs: Count
    """Passes over the training images."""
    batch_size: Count
    """Images per step; at most the number of training images."""
    lr: Positive
    """Peak learning rate of SGD with momentum 0.9."""
    seed: Seed = 0
    """Seed of the head's weights and of the order of the images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.root is not None, "root", self.root, f"name the {self._format}-format folder")
        for key in ("train_split", "val_split"):
            value = getattr(self, key)
            require(value is None, key, value, f"must not be set: the {self._format} format defines the splits")


@dataclass(kw_only=True)
class SegmentationEval(DenseEval):
    """Semantic segmentation with an FCN head, on the VOC-format folder --root."""

    _format: ClassVar[str] = "VOC"
    finetune: bool = False
    """Train the backbone too; by default only the head is trained."""
    epochs: Count = 30
    """Passes over the training images."""
    batch_size: Count = 16
    """Images per step; at most the number of training images."""
    lr: Positive = 0.1
    """Peak learning rate of SGD with momentum 0.9."""


@dataclass(kw_only=True)
class DetectionEval(DenseEval):
    """Object detection with torchvision's Faster R-CNN, on the COCO-format folder --root."""

    _format: ClassVar[str] = "COCO"
    epochs: Count = 12
    """Passes over the training images."""
    batch_size: Count = 8
    """Images per step; at most the number of training images."""
    lr: Positive = 0.02
    """Peak learning rate of SGD with momentum 0.9."""
    trainable_stages: Annotated[int, interval(0, 5)] = 0
    """Number of the backbone's last stages to train; 0 freezes it."""


@dataclass(kw_only=True)
class EmbedConfig(Settings):
    """Write the features of all images of a split."""

    run: ExpandedPath
    """Run folder (its newest valid checkpoint is used) or checkpoint file."""
    images: ExpandedPath
    """One split: a folder, file, pattern or URL of images."""
    out: ExpandedPath
    """Folder to write. If it holds a part of the same features, the rest is added."""
    features: Literal["pooled", "patches"] = "pooled"
    """pooled: one vector per image; patches: the backbone's last feature map."""
    format: Literal["npy", "parquet"] = "npy"
    """Format of the files. parquet needs pyarrow."""
    shard_images: Annotated[int, interval(0, MAX_COUNT)] = 0
    """Images per file; 0: at least 32 files from 8,192 images on, of 256 to 65,536 images and up to
    about 512 MiB each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    threads: Threads = 0
    """Decoder threads; 0: one per CPU core."""


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
