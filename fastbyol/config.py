"""The configuration: typed, documented, checked dataclasses.

options.py turns them into the command line, `--help` and YAML, so a field's docstring is its help text. Units are part
of a field's name. settings.py checks types; `__post_init__` refuses impossible values with a ValueError that names the
key; what depends on the data set (is a batch larger than it?) is checked where the data is known.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastbyol.settings.base import Settings
from fastbyol.settings.messages import BadSetting
from fastbyol.settings.messages import require as _require
from fastbyol.settings.types import expand_path

DEFAULT_WARMUP_EPOCHS = 10
RENAMED = {
    "data.recipe": "data.augmentation",
    "model.weight_standardisation": "model.weight_standardization",
    "step.checkpoint_stages": "step.activation_checkpointing",
}
"""Old name of a setting -> its name now. Config files, command lines and checkpoints with old names still load."""
_MOST_THREADS, _MOST_IMAGES, _MOST_SIDE_PX, _MOST_EPOCHS, _MOST_S = 4096, 10**9, 2**16, 10**6, 10**8


def absolute_path(path: str, key: str) -> str:
    """The path as any working directory finds it. '..' stays, since what it means depends on links."""
    try:
        return str(Path(expand_path(path, key)).absolute())
    except FileNotFoundError:
        raise BadSetting(key, f"{key}={path!r}: the working directory is gone; write the path in full") from None


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Where the images are and how they are fed."""

    PREFIX: ClassVar[str] = "data."
    MOST: ClassVar[dict[str, float]] = {
        "threads": _MOST_THREADS,
        "readers": _MOST_THREADS,
        "prefetch_batches": 1000,
        "readahead_images": 10**6,
        "batch_size": 10**6,
        "images_per_class": _MOST_IMAGES,
        "preallocate_px": _MOST_SIDE_PX,
        "timeout_s": _MOST_S,
    }
    root: str | None = None
    """Folder with the splits, e.g. ROOT/train/CLASS/x.jpg or ROOT/train.beton, or the training split itself: a folder or .beton file."""
    train_split: str = "train"
    """Sub-folder or .beton file of `root` to pre-train on, or a path elsewhere; '.' is `root` itself."""
    val_split: str = "val"
    """Likewise, for evaluation; missing is fine, evaluation is then left out."""
    backend: Literal["auto", "native", "dali", "ffcv"] = "auto"
    """What reads and decodes: auto is dali on a GPU where it is installed, else native; ffcv is FFCV's own loader."""
    classes: list[str] = field(default_factory=list)
    """Only these classes, of both splits; empty is all of them."""
    fraction: float = 1.0
    """Share of each class of the training split, e.g. 0.01 or 0.1."""
    images_per_class: int = 0
    """So many images of each class of the training split; 0 is all."""
    file_list: str | None = None
    """Text file with an image of the training split per line: its path or unique name, in a .beton file the sample's number."""
    subset_seed: int = 0
    """Which images `fraction` and `images_per_class` take; a smaller part lies within a larger one."""
    batch_size: int | Literal["auto"] = 256
    """Images per optimizer step, over all ranks and micro-batches (short: --batch-size), or auto: the largest power of two that fits."""
    image_size_px: int = 224
    """Side of both views in pixels."""
    augmentation: Literal["byol", "torchvision", "none"] = "byol"
    """Views: the paper's augmentation, one with torchvision's color jitter and crop drawing, or twice the center square as it is."""
    threads: int = 0
    """Threads that decode and augment; 0 takes one per CPU core."""
    prefetch_batches: int = 3
    """Batches made ahead; memory is (prefetch_batches + 1) * batch_size * 2 views * size^2 * 3 * bytes per value."""
    readers: int = 4
    """Threads that read files ahead of the decoders; more of them hide a slower disk."""
    readahead_images: int = 256
    """Files read ahead; their bytes stay in memory until they are decoded."""
    dct_scaling: bool = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 where both crops keep at least image_size_px; faster, slightly other pixels."""
    hw_decoder_load: float = 0.75
    """dali on a GPU: share of the JPEGs that the hardware decoder takes, the rest goes to CUDA cores; full load is slower."""
    preallocate_px: int = 0
    """dali on a GPU: side of the largest image to set memory aside for before the first batch; 0 lets it grow."""
    max_bad_fraction: float = 0.01
    """Share of the training files that may be unreadable (each is skipped and named) before the run stops."""
    timeout_s: float = 600
    """Seconds without a batch after which the loader counts as hung: all threads' stacks are written and the run stops."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Here and not where a run begins, so that whatever stores a config stores what any working directory finds.
        if self.root is not None:
            self.root = absolute_path(self.root, "data.root")
        if self.file_list is not None:
            self.file_list = absolute_path(self.file_list, "data.file_list")
        self.train_split = expand_path(self.train_split, "data.train_split")
        self.val_split = expand_path(self.val_split, "data.val_split")
        if self.batch_size != "auto":
            _require(self.batch_size >= 2, "data.batch_size", self.batch_size, "BatchNorm needs at least 2 images")
        _require(8 <= self.image_size_px <= 4096, "data.image_size_px", self.image_size_px, "must lie in 8..4096")
        _require(self.threads >= 0, "data.threads", self.threads, "must be 0 (all cores) or more")
        _require(self.prefetch_batches >= 1, "data.prefetch_batches", self.prefetch_batches, "must be at least 1")
        _require(self.readers >= 1, "data.readers", self.readers, "must be at least 1")
        _require(0 < self.fraction <= 1, "data.fraction", self.fraction, "must lie in (0, 1]")
        _require(self.images_per_class >= 0, "data.images_per_class", self.images_per_class, "must be 0 (all) or more")
        _require(self.subset_seed >= 0, "data.subset_seed", self.subset_seed, "must be 0 or more")
        given = [self.fraction != 1, self.images_per_class != 0, self.file_list is not None]
        _require(
            sum(given) <= 1, "data.fraction", self.fraction, "give one of data.fraction, images_per_class and file_list"
        )
        _require(self.readahead_images >= 1, "data.readahead_images", self.readahead_images, "must be at least 1")
        _require(0 <= self.hw_decoder_load <= 1, "data.hw_decoder_load", self.hw_decoder_load, "must lie in [0, 1]")
        _require(self.preallocate_px >= 0, "data.preallocate_px", self.preallocate_px, "must be 0 (off) or more")
        _require(0 <= self.max_bad_fraction < 1, "data.max_bad_fraction", self.max_bad_fraction, "must lie in [0, 1)")
        _require(self.timeout_s > 0, "data.timeout_s", self.timeout_s, "must be above 0")


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Backbone, heads and loss of the online and the target network; the defaults are BYOL, the rest docs/variants.md."""

    PREFIX: ClassVar[str] = "model."
    MOST: ClassVar[dict[str, float]] = {
        "width": 256,
        "hidden_dim": 2**20,
        "projection_dim": 2**20,
        "norm_groups": 2**16,
        "feature_noise": 1e6,
        "mask_patch_px": 4096,
    }
    backbone: str = "resnet50"
    """Name of a timm model, e.g. resnet18, resnet50, resnet200."""
    width: float = 1.0
    """Width multiplier of a ResNet's four groups (the paper uses 1, 2, 4)."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """ResNet stem: 7x7 stride 2 and max-pool, or, for images up to about 64 px, 3x3 stride 1 without pool."""
    hidden_dim: int = 4096
    """Hidden units of projector and predictor."""
    projection_dim: int = 256
    """Outputs of projector and predictor."""
    target_init: Literal["copy", "reseed"] = "copy"
    """The target starts as a copy of the online network, or from another seed as in the authors' code."""
    norm: Literal["batch", "layer", "group"] = "batch"
    """Norm layers of backbone and heads: BatchNorm (over all ranks, see distributed.sync_bn_ranks), or in their place another."""
    norm_groups: int = 16
    """Groups of channels of norm=group."""
    weight_standardization: bool = False
    """Every filter of backbone and heads is used with mean 0 and variance 1."""
    heads: Literal["mlp", "linear"] = "mlp"
    """Projector and predictor: the paper's two layers, or one linear layer each."""
    target: Literal["ema", "online"] = "ema"
    """What is predicted: the moving average's projections, or the online network's own without gradient (SimSiam)."""
    loss: Literal["byol", "euclidean", "mse", "hinge"] = "byol"
    """Of predictions and targets: squared distance of normalized vectors, distance, mean squared error, distance beyond a margin."""
    hinge_margin: float = 0.2
    """Distance of normalized vectors below which loss=hinge is 0."""
    contrastive_weight: float = 0.0
    """beta: weight of the term that drives a prediction away from the rank's other images; 1 gives InfoNCE with negatives."""
    contrastive_temperature: float = 0.1
    """alpha: temperature of that term."""
    feature_noise: float = 0.0
    """Std of the noise that makes view 2 from the features of view 1, in place of image augmentation (data.augmentation=none)."""
    mask_ratio: float = 0.0
    """Share of the patches of each view that the online network does not see."""
    mask_patch_px: int = 16
    """Side of those patches in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.width > 0, "model.width", self.width, "must be above 0")
        _require(self.hidden_dim >= 1, "model.hidden_dim", self.hidden_dim, "must be at least 1")
        _require(self.projection_dim >= 2, "model.projection_dim", self.projection_dim, "must be at least 2")
        _require(self.norm_groups >= 1, "model.norm_groups", self.norm_groups, "must be at least 1")
        _require(0 <= self.hinge_margin < 2, "model.hinge_margin", self.hinge_margin, "must lie in [0, 2)")
        weight = self.contrastive_weight
        _require(weight >= 0, "model.contrastive_weight", weight, "must be 0 (off) or more")
        _require(
            weight == 0 or self.loss == "byol", "model.contrastive_weight", weight, "is defined for model.loss=byol"
        )
        temperature = self.contrastive_temperature
        _require(temperature > 0, "model.contrastive_temperature", temperature, "must be above 0")
        _require(self.feature_noise >= 0, "model.feature_noise", self.feature_noise, "must be 0 (off) or more")
        _require(0 <= self.mask_ratio < 1, "model.mask_ratio", self.mask_ratio, "must lie in [0, 1)")
        _require(self.mask_patch_px >= 1, "model.mask_patch_px", self.mask_patch_px, "must be at least 1")


@dataclass(kw_only=True)
class OptimConfig(Settings):
    """Optimizer, schedules and target update. The defaults are the paper's 100-epoch preset."""

    PREFIX: ClassVar[str] = "optim."
    MOST: ClassVar[dict[str, float]] = {"epochs": _MOST_EPOCHS}
    name: Literal["lars", "sgd", "adamw", "adam"] = "lars"
    """lars is the paper's; the others take the same schedule and parameter groups."""
    epochs: int = 100
    """Passes over the training split."""
    base_lr: float = 0.45
    """Learning rate per 256 images: the peak is base_lr * data.batch_size / 256."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the learning rate after the warm-up: a cosine to 0, or the peak to the end."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 10, at most half of the run."""
    weight_decay: float = 1e-6
    """Weight decay; biases and norm-layer parameters have none."""
    momentum: float = 0.9
    """Momentum of lars and sgd; beta1 of adam and adamw."""
    beta2: float = 0.999
    """Second-moment decay of adam and adamw."""
    trust_coefficient: float = 1e-3
    """eta of LARS; biases and norm-layer parameters have trust ratio 1."""
    tau_base: float = 0.99
    """Target decay at step 0; it rises to 1 by a cosine."""
    clip_grad_norm: float = 0.0
    """Scales the gradients down to at most this total norm; 0 is off, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.epochs >= 1, "optim.epochs", self.epochs, "must be at least 1")
        _require(self.base_lr > 0, "optim.base_lr", self.base_lr, "must be above 0")
        _require(
            0 <= self.warmup <= self.epochs,
            "optim.warmup_epochs",
            self.warmup_epochs,
            f"must lie between 0 and optim.epochs={self.epochs}",
        )
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be 0 or more")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "must lie in [0, 1)")
        _require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "must lie in [0, 1)")
        _require(self.trust_coefficient > 0, "optim.trust_coefficient", self.trust_coefficient, "must be above 0")
        _require(0 <= self.tau_base <= 1, "optim.tau_base", self.tau_base, "must lie in [0, 1]")
        _require(self.clip_grad_norm >= 0, "optim.clip_grad_norm", self.clip_grad_norm, "must be 0 (off) or more")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up: those given, else the default."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return min(DEFAULT_WARMUP_EPOCHS, self.epochs / 2)


@dataclass(kw_only=True)
class StepConfig(Settings):
    """How the training step is carried out; none of it changes what is computed, up to rounding."""

    PREFIX: ClassVar[str] = "step."
    MOST: ClassVar[dict[str, float]] = {"micro_batches": 10**6}
    mode: Literal["auto", "eager", "compile", "cuda_graph"] = "auto"
    """auto is compile on a GPU and eager on a CPU; cuda_graph is compile and one captured graph of the whole step."""
    micro_batches: int = 1
    """Parts of a rank's batch that go through the network one after the other (BatchNorm per part, gradients summed)."""
    activation_checkpointing: int = 0
    """The first so many stages of the backbone keep their blocks' inputs only and compute the rest again in the backward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.micro_batches >= 1, "step.micro_batches", self.micro_batches, "must be at least 1")
        _require(
            0 <= self.activation_checkpointing <= 4,
            "step.activation_checkpointing",
            self.activation_checkpointing,
            "must lie in 0..4",
        )


@dataclass(kw_only=True)
class DistributedConfig(Settings):
    """Several processes, started by torchrun; without it none of this matters."""

    PREFIX: ClassVar[str] = "distributed."
    MOST: ClassVar[dict[str, float]] = {"sync_bn_ranks": 10**6, "timeout_s": _MOST_S}
    sync_bn_ranks: int = 0
    """Neighboring ranks that share BatchNorm statistics; 0 is all of them, as published, 1 is each on its own."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients travel between ranks; bf16 halves the bytes."""
    timeout_s: float = 1800
    """Seconds that a rank waits for another before the run ends; longer than an online kNN evaluation takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.sync_bn_ranks >= 0, "distributed.sync_bn_ranks", self.sync_bn_ranks, "must be 0 (all) or more")
        _require(self.timeout_s > 0, "distributed.timeout_s", self.timeout_s, "must be above 0")


@dataclass(kw_only=True)
class LogConfig(Settings):
    """What a run writes while it trains."""

    PREFIX: ClassVar[str] = "log."
    log_every_steps: int = 10
    """Steps between two lines of metrics.jsonl; only then are device values read."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    collapse_threshold: float = 0.1
    """Warn when the std of the normalized projections falls below this share of 1/sqrt(projection_dim)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.log_every_steps >= 1, "log.log_every_steps", self.log_every_steps, "must be at least 1")
        _require(
            0 <= self.collapse_threshold <= 1, "log.collapse_threshold", self.collapse_threshold, "must lie in [0, 1]"
        )


@dataclass(kw_only=True)
class CheckpointConfig(Settings):
    """When the run is saved; it is also saved at its end and on SIGTERM or SIGINT."""

    PREFIX: ClassVar[str] = "checkpoint."
    every_epochs: int = 1
    """Epochs between two checkpoints."""
    keep_last: int = 3
    """Newest checkpoints kept; the one with the best kNN accuracy is kept beside them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.every_epochs >= 1, "checkpoint.every_epochs", self.every_epochs, "must be at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(kw_only=True)
class KnnConfig(Settings):
    """The weighted kNN classifier on frozen features."""

    PREFIX: ClassVar[str] = "knn."
    MOST: ClassVar[dict[str, float]] = {"k": 10**6}
    every_epochs: int = 1
    """Epochs between two online kNN evaluations, 0 for none."""
    k: int = 20
    """Neighbors that vote."""
    max_bank_images: int = 50_000
    """Training images that vote, evenly spread over the split."""
    temperature: float = 0.07
    """A neighbor of cosine similarity s votes with weight exp(s / temperature)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.every_epochs >= 0, "knn.every_epochs", self.every_epochs, "must be 0 (off) or more")
        _require(self.max_bank_images >= 1, "knn.max_bank_images", self.max_bank_images, "must be at least 1")
        _require(self.k >= 1, "knn.k", self.k, "must be at least 1")
        _require(self.temperature > 0, "knn.temperature", self.temperature, "must be above 0")


@dataclass(kw_only=True)
class ProbeConfig(Settings):
    """A linear classifier that learns from the labels beside the run, on features that it does not change."""

    PREFIX: ClassVar[str] = "probe."
    enabled: bool = False
    """Train a linear classifier beside the run, and print a line per epoch: `Train Epoch: 1/100  Loss  Top5 Accuracy  Top1 Accuracy`."""
    lr: float = 1e-3
    """Learning rate of its Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.lr > 0, "probe.lr", self.lr, "must be above 0")


@dataclass(kw_only=True)
class Config(Settings):
    """A whole pre-training run."""

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED
    name: str = "byol"
    """The run's name; everything it writes lies under RUNS/NAME."""
    runs: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of the weights, of the sample order and of the views."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = "auto"
    """Autocast dtype of the forward pass: auto takes bf16 where the processor computes in it, else fp32; fp16 scales the loss."""
    init: str = "none"
    """Weights that the backbone starts from: none, timm:NAME (timm's pre-trained ones), or a file or run of `fastbyol export`."""
    resume: str = "none"
    """none, auto (continue the run NAME from its newest good checkpoint, or start it) or a checkpoint's path."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the images are and how they are fed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone and heads."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, schedules and target update."""
    step: StepConfig = field(default_factory=StepConfig)
    """How the training step is carried out."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Several processes."""
    log: LogConfig = field(default_factory=LogConfig)
    """What a run writes while it trains."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is saved."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """The online kNN evaluation."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """The online linear classifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_name(self.name)
        self.runs, self.init = expand_path(self.runs, "runs"), expand_path(self.init, "init")
        self.resume = expand_path(self.resume, "resume")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in 0..2^63-1")
        noise = self.model.feature_noise
        _require(
            noise == 0 or self.data.augmentation == "none",
            "model.feature_noise",
            noise,
            "is in place of image augmentation: set data.augmentation=none",
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, as stored in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key is unknown, or a value impossible or of the wrong type.
        """
        return cls.build(cls.with_current_names(values))


def _check_name(name: str) -> None:
    """A run's name is that of its folder."""
    _require(bool(name.strip()), "name", name, "must not be empty")
    _require(
        "/" not in name and name not in (".", ".."), "name", name, "must be a non-empty name without '/', not . or .."
    )
    _require(
        name.isprintable() and name == name.strip(),
        "name",
        name,
        "must be of printable UTF-8 characters, without blanks around it",
    )
    _require(not name.startswith("-"), "name", name, "must not begin with '-'")
    # A file system allows 255 bytes, and what is put beside a folder has its name and some more.
    _require(len(name.encode()) <= 200, "name", name, "must have at most 200 bytes in UTF-8")
