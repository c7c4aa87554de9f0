"""The configuration of a run: typed, documented dataclasses.

The docstring below a field is its help text, the annotations of its type are its limits, and its
unit is part of its name. What depends on the data set, such as a batch that is too large for it, is
checked where the data is loaded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from fastbyol.errors import InputError
from fastbyol.settings.base import Settings, nest
from fastbyol.settings.config_files import find_config
from fastbyol.settings.limits import (
    MAX_COUNT,
    MAX_SIDE_PX,
    MAX_THREADS,
    AbsolutePath,
    BelowOne,
    Count,
    ExpandedPath,
    Fraction,
    NonNegative,
    Positive,
    Seconds,
    Seed,
    Threads,
    UnitInterval,
    above,
    at_least,
    at_most,
    folder_name,
    interval,
)
from fastbyol.settings.messages import BadSetting, require
from fastbyol.settings.types import check, expand_path
from fastbyol.settings.yaml_file import read_yaml

DEFAULT_WARMUP_EPOCHS = 10
STEM_CHANNELS = 64  # of a ResNet of width 1
RENAMED = {
    "data.recipe": "data.augmentation",
    "model.weight_standardisation": "model.weight_standardization",
    "step.checkpoint_stages": "step.activation_checkpointing",
    "log.tensorboard": "log.trackers",
}
"""Old name of a setting -> its current name. Files with old names still load."""
OLD_VALUES: Mapping[str, tuple[Any, Callable[[Any], Any]]] = {
    "log.tensorboard": (bool, lambda on: ["tensorboard"] if on else []),
}
"""Of the settings whose values changed too: the old type, and the current value of an old one."""


@dataclass(kw_only=True)
class DataConfig(Settings):
    """Data set, views and loader."""

    PREFIX: ClassVar[str] = "data."
    root: AbsolutePath | None = None
    """Folder or URL of the data set, e.g. with ROOT/train/CLASS/x.jpg. Or the training split
    itself: a folder, file or pattern. Other files: train.beton, train-*.tar, train-*.parquet,
    train.csv, train.npz."""
    train_split: ExpandedPath = "train"
    """Training split: a sub-folder or file of `root`, a path or pattern elsewhere, or '.' for
    `root` itself."""
    val_split: ExpandedPath = "val"
    """Validation split, likewise. Evaluation is skipped if it does not exist."""
    backend: Literal["auto", "native", "dali", "ffcv"] = "auto"
    """Loader backend. auto uses dali on a GPU if it is installed, otherwise native. ffcv is FFCV's
    own loader."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes to use from both splits, or imagenet100 for those of ImageNet-100.
    Empty uses all."""
    fraction: Fraction = 1.0
    """Fraction of each class of the training split to use, e.g. 0.01 or 0.1."""
    images_per_class: Annotated[int, at_least(0, "all"), at_most(10**9)] = 0
    """Number of images to use from each class of the training split. 0 uses all."""
    file_list: AbsolutePath | None = None
    """Text file that lists the training images to use, one per line: path or unique file name, or
    sample index in a .beton file."""
    subset_seed: Seed = 0
    """Seed of the subset drawn by `fraction` or `images_per_class`. With the same seed, a smaller
    subset is contained in a larger one."""
    batch_size: Annotated[
        int | Literal["auto"], at_least(2, message="BatchNorm needs at least 2 images"), at_most(MAX_COUNT)
    ] = 256
    """Images per optimizer step, over all ranks and micro-batches (short: --batch-size). auto uses
    the largest power of two that fits into memory."""
    image_size_px: Annotated[int, interval(8, 4096)] = 224
    """Height and width of both views in pixels."""
    augmentation: Literal["byol", "torchvision", "none"] = "byol"
    """Augmentation of the views. byol is the paper's, torchvision uses torchvision's color jitter
    and crop sampling, none uses the center crop for both views."""
    threads: Threads = 0
    """Threads that decode and augment. 0 uses one per CPU core."""
    prefetch_batches: Annotated[int, at_least(1), at_most(1000)] = 3
    """Batches to prefetch. Memory: (prefetch_batches + 1) * batch_size * 2 views * image_size_px^2
    * 3 * bytes per value."""
    readers: Annotated[int, at_least(0, "auto"), at_most(MAX_THREADS)] = 0
    """Threads that read files ahead of the decoders. 0 uses 4 for a disk and 32 for a URL."""
    readahead_images: Count = 256
    """Files to read ahead. Their bytes stay in memory until they are decoded."""
    cache_gb: NonNegative = 50.0
    """Largest size of the disk cache of remote data sets, in GB. 0 is off."""
    cache_dir: AbsolutePath | None = None
    """Folder of that cache. By default it lies in the user's cache folder."""
    dct_scaling: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size if both crops still have image_size_px pixels.
    Faster, slightly different pixels."""
    hw_decoder_load: UnitInterval = 0.75
    """dali on a GPU: fraction of JPEGs that the hardware decoder decodes; CUDA cores decode the
    rest. 1 is slower."""
    preallocate_px: Annotated[int, at_least(0, "off"), at_most(MAX_SIDE_PX)] = 0
    """dali on a GPU: side in pixels of the largest image to preallocate memory for. 0 allocates on
    demand."""
    max_bad_fraction: BelowOne = 0.01
    """Fraction of training images that may be unreadable before the run stops. Unreadable images
    are logged and skipped."""
    timeout_s: Seconds = 600
    """Seconds without a batch before the run stops and writes the stacks of all threads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        subsets = [self.fraction != 1, self.images_per_class != 0, self.file_list is not None]
        text = "give only one of data.fraction, data.images_per_class and data.file_list"
        require(sum(subsets) <= 1, "data.fraction", self.fraction, text)


@dataclass(kw_only=True)
class ModelConfig(Settings):
    """Backbone, heads and loss. The defaults are BYOL's; docs/variants.md describes the other
    choices.
    """

    PREFIX: ClassVar[str] = "model."
    backbone: str = "resnet50"
    """Name of a timm model, e.g. resnet50; or byol_resnet18 or byol_resnet34, which are the
    authors'. Or MODULE:FACTORY of a module named with --import."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the backbone's constructor, e.g. {img_size: 64}."""
    width: Annotated[float, above(0), at_most(256)] = 1.0
    """Width multiplier of a ResNet's stem and stages. The paper uses 1, 2 and 4."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """ResNet stem. imagenet is a 7x7 convolution of stride 2 and max-pooling; small, for images up
    to about 64 px, is a 3x3 convolution of stride 1 without pooling."""
    stem_channels: Annotated[int, at_least(0, "64 * width"), at_most(2**20)] = 0
    """Channels of a ResNet's stem. 0 is 64 * width, as in the authors' code. Runs of older versions
    have 64 at any width."""
    padding: Literal["symmetric", "same"] = "symmetric"
    """Padding of a ResNet's strided convolutions and max-pool. same is TensorFlow's, as in the
    authors' code; their released weights need it."""
    zero_init_last: bool | Literal["auto"] = "auto"
    """Start gamma of the last BatchNorm of each block at 0 instead of 1. auto is the authors' code:
    true, but false for byol_resnet18 and byol_resnet34. The paper's results used false."""
    hidden_dim: Annotated[int, at_least(1), at_most(2**20)] = 4096
    """Hidden units of projector and predictor."""
    projection_dim: Annotated[int, at_least(2), at_most(2**20)] = 256
    """Output dimension of projector and predictor."""
    target_init: Literal["copy", "reseed"] = "copy"
    """Initial weights of the target network. copy uses the online network's, reseed draws others,
    as in the authors' code."""
    norm: Literal["batch", "layer", "group"] = "batch"
    """Normalization in backbone and heads. batch shares statistics across ranks (see
    distributed.sync_bn_ranks)."""
    norm_groups: Annotated[int, at_least(1), at_most(2**16)] = 16
    """Channel groups of norm=group."""
    weight_standardization: bool = False
    """Standardize each filter of backbone and heads to mean 0 and variance 1."""
    heads: Literal["mlp", "linear"] = "mlp"
    """Projector and predictor. mlp is the paper's two-layer MLP, linear is a single linear
    layer."""
    target: Literal["ema", "online"] = "ema"
    """Network that provides the targets. ema is the moving average, online is the online network
    with stop-gradient (SimSiam)."""
    loss: Literal["byol", "euclidean", "mse", "hinge"] = "byol"
    """Loss between predictions and targets. byol is the squared distance and hinge the distance
    beyond hinge_margin, both of normalized vectors; euclidean is the distance and mse the mean
    squared error, without normalization."""
    hinge_margin: Annotated[float, interval(0, 2, open_high=True)] = 0.2
    """Distance below which loss=hinge is 0."""
    contrastive_weight: Annotated[float, at_least(0, "off")] = 0.0
    """Weight (beta) of a contrastive term whose negatives are the rank's other images. 0 is off, 1
    gives InfoNCE."""
    contrastive_temperature: Positive = 0.1
    """Temperature (alpha) of the contrastive term."""
    feature_noise: Annotated[float, at_least(0, "off"), at_most(10**6)] = 0.0
    """Standard deviation of noise added to the features of view 1 to obtain view 2. It replaces
    image augmentation, so it needs data.augmentation=none. 0 is off."""
    mask_ratio: BelowOne = 0.0
    """Fraction of the patches of each view to hide from the online network."""
    mask_patch_px: Annotated[int, at_least(1), at_most(4096)] = 16
    """Side of a masked patch in pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.contrastive_weight == 0 or self.loss == "byol"
        require(ok, "model.contrastive_weight", self.contrastive_weight, "requires model.loss=byol")

    @property
    def num_stem_channels(self) -> int:
        """Channels of a ResNet's stem, with the default resolved."""
        return self.stem_channels or int(STEM_CHANNELS * self.width)

    @staticmethod
    def upgraded(values: Any) -> Any:
        """Return the dict of an older version's config with the same meaning.

        `width` used to leave the stem at 64 channels.
        """
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        is_stored = {"width", "hidden_dim", "projection_dim"} <= values.keys()  # all settings, not a choice of them
        if is_stored and "stem_channels" not in values and values["width"] != 1:
            values["stem_channels"] = STEM_CHANNELS
        return values


@dataclass(kw_only=True)
class OptimConfig(Settings):
    """Optimizer, schedules and target update. The defaults are the paper's for 100 epochs."""

    PREFIX: ClassVar[str] = "optim."
    name: Literal["lars", "sgd", "adamw", "adam"] = "lars"
    """Optimizer. lars is the paper's. All use the same schedule and parameter groups."""
    epochs: Count = 100
    """Number of passes over the training split."""
    base_lr: Positive = 0.45
    """Learning rate per 256 images. The peak is base_lr * data.batch_size / 256."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up. cosine decays it to 0, constant keeps the peak."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0. Defaults to 10, or half of the run if that is less."""
    weight_decay: NonNegative = 1e-6
    """Weight decay. Biases and norm parameters are excluded."""
    momentum: BelowOne = 0.9
    """Momentum of lars and sgd, beta1 of adam and adamw."""
    beta2: BelowOne = 0.999
    """beta2 of adam and adamw."""
    trust_coefficient: Positive = 1e-3
    """Trust coefficient (eta) of lars. Biases and norm parameters have trust ratio 1."""
    tau_base: UnitInterval = 0.99
    """EMA decay of the target network at step 0. It increases to 1 with a cosine schedule."""
    clip_grad_norm: Annotated[float, at_least(0, "off")] = 0.0
    """Maximum total gradient norm. 0 is off, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        text = f"must lie between 0 and optim.epochs={self.epochs}"
        require(0 <= self.warmup <= self.epochs, "optim.warmup_epochs", self.warmup_epochs, text)

    @property
    def warmup(self) -> float:
        """Epochs of warm-up, with the default resolved."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return min(DEFAULT_WARMUP_EPOCHS, self.epochs / 2)


@dataclass(kw_only=True)
class StepConfig(Settings):
    """Execution of the training step. It affects speed and memory, and results only by rounding."""

    PREFIX: ClassVar[str] = "step."
    mode: Literal["auto", "eager", "compile", "cuda_graph"] = "auto"
    """Execution mode. auto: cuda_graph on one GPU, compile on several, eager on a CPU. cuda_graph
    captures the whole compiled step."""
    micro_batches: Count = 1
    """Number of parts that a rank's batch is split into. Gradients are accumulated; BatchNorm
    statistics are those of a part."""
    activation_checkpointing: Annotated[int, interval(0, 4)] = 0
    """Number of backbone stages, from the first, that recompute activations in the backward pass to
    save memory."""
    conv1x1: Literal["auto", "cudnn"] = "auto"
    """Implementation of 1x1 convolutions before a BatchNorm, on a GPU in 16 bits. auto takes the
    faster one of cuDNN and a kernel that also computes the statistics of the BatchNorm; it measures
    both, once per GPU model and shape."""


@dataclass(kw_only=True)
class DistributedConfig(Settings):
    """Training in multiple processes with torchrun."""

    PREFIX: ClassVar[str] = "distributed."
    sync_bn_ranks: Annotated[int, at_least(0, "all"), at_most(MAX_COUNT)] = 0
    """Number of neighboring ranks that share BatchNorm statistics. 0 is all, as in the paper; 1
    disables sharing."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the gradient all-reduce. bf16 halves the traffic."""
    timeout_s: Seconds = 1800
    """Seconds that a rank waits for the others before the run ends."""


@dataclass(kw_only=True)
class LogConfig(Settings):
    """Metrics and warnings of a run."""

    PREFIX: ClassVar[str] = "log."
    log_every_steps: Annotated[int, at_least(1)] = 10
    """Steps between two lines of metrics.jsonl. Values are copied from the GPU only at these
    steps."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(
        default_factory=lambda: ["tensorboard"]
    )
    """Experiment trackers to send the metrics to: any of tensorboard, wandb, mlflow and trackio. []
    is none."""
    collapse_threshold: UnitInterval = 0.1
    """Warn of collapse if the std of the normalized projections falls below this fraction of
    1/sqrt(projection_dim)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = len(set(self.trackers)) == len(self.trackers)
        require(ok, "log.trackers", self.trackers, "names a tracker twice")


@dataclass(kw_only=True)
class CheckpointConfig(Settings):
    """When to save checkpoints. One is also saved at the end of a run and on SIGTERM or SIGINT."""

    PREFIX: ClassVar[str] = "checkpoint."
    every_epochs: Annotated[int, at_least(1)] = 1
    """Epochs between two checkpoints."""
    keep_last: Annotated[int, at_least(1)] = 3
    """Number of latest checkpoints to keep, in addition to the one with the best kNN accuracy."""


@dataclass(kw_only=True)
class KnnConfig(Settings):
    """Online kNN evaluation. A weighted kNN classifier on frozen features."""

    PREFIX: ClassVar[str] = "knn."
    every_epochs: Annotated[int | Literal["auto"], at_least(0, "off")] = "auto"
    """Epochs between two online kNN evaluations. 0 is off. auto: after the first and last epoch,
    others within 2 % of the time."""
    k: Count = 20
    """Number of neighbors."""
    max_bank_images: Annotated[int, at_least(1)] = 50_000
    """Maximum number of training images to search, evenly spread over the split."""
    temperature: Positive = 0.07
    """Temperature of the votes: a neighbor with cosine similarity s has weight exp(s /
    temperature)."""


@dataclass(kw_only=True)
class ProbeConfig(Settings):
    """Online linear probe. It is trained during the run, on features without gradient."""

    PREFIX: ClassVar[str] = "probe."
    enabled: bool = False
    """Train a linear classifier on the side, and print its loss, top-1 and top-5 accuracy every
    epoch."""
    lr: Positive = 1e-3
    """Learning rate of the probe's Adam optimizer."""


@dataclass(kw_only=True)
class Config(Settings):
    """A pre-training run."""

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED
    OLD_VALUES: ClassVar[Mapping[str, tuple[Any, Callable[[Any], Any]]]] = OLD_VALUES
    name: Annotated[str, folder_name] = "byol"
    """Name of the run. Everything is written to RUNS/NAME."""
    runs: ExpandedPath = "runs"
    """Folder of all runs."""
    seed: Seed = 0
    """Seed of the weights, the sample order and the augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto uses a GPU if available."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "tf32"] = "auto"
    """Autocast data type of the forward pass. auto uses bf16 if the processor supports it,
    otherwise fp32. fp16 uses loss scaling."""
    init: ExpandedPath = "none"
    """Initial weights: none, timm:NAME (downloads timm's), hf://USER/NAME (from the Hugging Face
    Hub), a file of `fastbyol export`, a run, or a .pkl of BYOL's authors (sets
    model.padding=same)."""
    resume: ExpandedPath = "none"
    """Checkpoint to continue from: none, auto or a path. auto is the latest valid checkpoint of the
    run NAME, or none if there is none."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set, views and loader."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone, heads and loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, schedules and target update."""
    step: StepConfig = field(default_factory=StepConfig)
    """Execution of the training step."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Training in multiple processes."""
    log: LogConfig = field(default_factory=LogConfig)
    """Metrics and warnings."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    knn: KnnConfig = field(default_factory=KnnConfig)
    """Online kNN evaluation."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Online linear probe."""

    def __post_init__(self) -> None:
        super().__post_init__()
        noise = self.model.feature_noise
        ok = noise == 0 or self.data.augmentation == "none"
        require(ok, "model.feature_noise", noise, "replaces image augmentation: set data.augmentation=none")

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain dicts, as stored in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def upgraded(cls, values: Any) -> Any:
        """Return the dict of an older version's config with current names and the same meaning."""
        values = cls.with_current_names(values)
        if isinstance(values, dict) and isinstance(values.get("model"), dict):
            values["model"] = ModelConfig.upgraded(values["model"])
        return values

    @classmethod
    def from_yaml(cls, name_or_path: str | Path) -> "Config":
        """Return the config of a YAML file or of a shipped config, as `fastbyol train --config`.

        Args:
            name_or_path: a file, or the name of a shipped config such as "demo".

        Raises:
            InputError: there is neither, or the file is not a valid config. The message names file
                and line.
        """
        try:
            path = find_config(expand_path(check(str, str(name_or_path), "config"), "config"))
        except BadSetting as error:
            raise InputError(str(error)) from None
        found = read_yaml(str(path), cls)
        try:
            return cls.build(nest({key: value for key, (value, _) in found.items()}))
        except BadSetting as error:
            _, source = found.get(error.key, (None, str(path)))
            raise InputError(f"{source}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Return the config of a dict from `to_dict`, which may be of an older version.

        Raises:
            BadSetting: a key is unknown, or a value is invalid or of the wrong type. It is a
                ValueError.
        """
        return cls.build(cls.upgraded(values))
