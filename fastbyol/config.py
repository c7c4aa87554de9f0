"""The configuration: typed, documented, checked dataclasses.

jsonargparse turns them into the command line, `--help` and YAML (see cli.py), so a field's docstring is its
help text. Units are part of a field's name. `__post_init__` refuses impossible values with a ValueError that
names the key; what depends on the data set (is a batch larger than it?) is checked where the data is known.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def _require(ok: bool, key: str, value: object, need: str) -> None:
    if not ok:
        raise ValueError(f"{key}={value!r}: {need}")


@dataclass(kw_only=True)
class DataConfig:
    """Where the images are and how they are fed."""

    root: str | None = None
    """Folder with the splits, e.g. ROOT/train/CLASS/x.jpg or ROOT/train.beton; `fastbyol prepare` makes such folders."""
    train_split: str = "train"
    """Sub-folder or .beton file of `root` to pre-train on; '.' is `root` itself."""
    val_split: str = "val"
    """Sub-folder or .beton file of `root` for evaluation; missing is fine, evaluation is then left out."""
    backend: Literal["auto", "native", "dali", "ffcv"] = "auto"
    """What reads and decodes: auto is dali on a GPU where it is installed, else native; ffcv is FFCV's own loader."""
    classes: list[str] = field(default_factory=list)
    """Only these classes, of both splits; empty is all of them."""
    fraction: float = 1.0
    """Share of each class of the training split, e.g. 0.01 or 0.1."""
    images_per_class: int = 0
    """So many images of each class of the training split; 0 is all."""
    file_list: str | None = None
    """Text file with one image of the training split per line: its path or name, in a .beton file the sample's number."""
    subset_seed: int = 0
    """Which images `fraction` and `images_per_class` take; a smaller part lies within a larger one."""
    batch_size: int | Literal["auto"] = 256
    """Images per optimiser step, over all ranks and micro-batches; auto takes the largest power of two that fits (--batch-size)."""
    image_size_px: int = 224
    """Side of both views in pixels."""
    recipe: Literal["byol", "torchvision"] = "byol"
    """Views: the paper's recipe, or one with torchvision's colour jitter and crop drawing."""
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
class ModelConfig:
    """Backbone and heads of the online and the target network."""

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

    def __post_init__(self) -> None:
        _require(self.width > 0, "model.width", self.width, "must be above 0")
        _require(self.hidden_dim >= 1, "model.hidden_dim", self.hidden_dim, "must be at least 1")
        _require(self.projection_dim >= 2, "model.projection_dim", self.projection_dim, "must be at least 2")


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser, schedules and target update. The defaults are the paper's 100-epoch preset."""

    name: Literal["lars", "sgd", "adamw", "adam"] = "lars"
    """lars is the paper's; the others take the same schedule and parameter groups."""
    epochs: int = 100
    """Passes over the training split."""
    base_lr: float = 0.45
    """Learning rate per 256 images: the peak is base_lr * data.batch_size / 256."""
    warmup_epochs: float = 10
    """Epochs of linear warm-up from 0; a cosine to 0 follows."""
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
        _require(self.epochs >= 1, "optim.epochs", self.epochs, "must be at least 1")
        _require(self.base_lr > 0, "optim.base_lr", self.base_lr, "must be above 0")
        _require(
            0 <= self.warmup_epochs <= self.epochs,
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


@dataclass(kw_only=True)
class StepConfig:
    """How the training step is carried out; none of it changes what is computed, up to rounding."""

    mode: Literal["auto", "eager", "compile", "cuda_graph"] = "auto"
    """auto is compile on a GPU and eager on a CPU; cuda_graph is compile and one captured graph of the whole step."""
    micro_batches: int = 1
    """Parts of a rank's batch that go through the network one after the other (BatchNorm per part, gradients summed)."""
    checkpoint_stages: int = 0
    """The first so many stages of the backbone keep their blocks' inputs only and compute the rest again in the backward pass."""

    def __post_init__(self) -> None:
        _require(self.micro_batches >= 1, "step.micro_batches", self.micro_batches, "must be at least 1")
        _require(0 <= self.checkpoint_stages <= 4, "step.checkpoint_stages", self.checkpoint_stages, "must lie in 0..4")


@dataclass(kw_only=True)
class DistributedConfig:
    """Several processes, started by torchrun; without it none of this matters."""

    sync_bn_ranks: int = 0
    """Neighbouring ranks that share BatchNorm statistics; 0 is all of them, as published, 1 is each on its own."""
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients travel between ranks; bf16 halves the bytes."""
    timeout_s: float = 1800
    """Seconds that a rank waits for another before the run ends; longer than an online kNN evaluation takes."""

    def __post_init__(self) -> None:
        _require(self.sync_bn_ranks >= 0, "distributed.sync_bn_ranks", self.sync_bn_ranks, "must be 0 (all) or more")
        _require(self.timeout_s > 0, "distributed.timeout_s", self.timeout_s, "must be above 0")


@dataclass(kw_only=True)
class LogConfig:
    """What a run writes while it trains."""

    log_every_steps: int = 10
    """Steps between two lines of metrics.jsonl; only then are device values read."""
    tensorboard: bool = True
    """Write TensorBoard event files beside metrics.jsonl."""
    collapse_threshold: float = 0.1
    """Warn when the std of the normalised projections falls below this share of 1/sqrt(projection_dim)."""

    def __post_init__(self) -> None:
        _require(self.log_every_steps >= 1, "log.log_every_steps", self.log_every_steps, "must be at least 1")
        _require(
            0 <= self.collapse_threshold <= 1, "log.collapse_threshold", self.collapse_threshold, "must lie in [0, 1]"
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    """When the run is saved; it is also saved at its end and on SIGTERM or SIGINT."""

    every_epochs: int = 1
    """Epochs between two checkpoints."""
    keep_last: int = 3
    """Newest checkpoints kept; the one with the best kNN accuracy is kept beside them."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 1, "checkpoint.every_epochs", self.every_epochs, "must be at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(kw_only=True)
class KnnConfig:
    """The weighted kNN classifier on frozen features."""

    every_epochs: int = 1
    """Epochs between two online kNN evaluations; 0 switches them off."""
    k: int = 20
    """Neighbours that vote."""
    max_bank_images: int = 50_000
    """Training images that vote, evenly spread over the split."""
    temperature: float = 0.07
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""

    def __post_init__(self) -> None:
        _require(self.every_epochs >= 0, "knn.every_epochs", self.every_epochs, "must be 0 (off) or more")
        _require(self.max_bank_images >= 1, "knn.max_bank_images", self.max_bank_images, "must be at least 1")
        _require(self.k >= 1, "knn.k", self.k, "must be at least 1")
        _require(self.temperature > 0, "knn.temperature", self.temperature, "must be above 0")


@dataclass(kw_only=True)
class Config:
    """A whole pre-training run."""

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
    resume: str = "none"
    """none, auto (continue from the newest good checkpoint, start afresh if there is none) or a checkpoint's path."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where the images are and how they are fed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Backbone and heads."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser, schedules and target update."""
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

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "name", self.name, "must be a non-empty name without '/'")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in 0..2^63-1")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, as stored in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key is unknown or a value impossible.
        """
        values = dict(values)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(f.type) and f.name in values:
                values[f.name] = _build(f.type, values[f.name], f.name)
        return _build(cls, values, "config")


def _build(cls: Any, values: dict[str, Any], where: str) -> Any:
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}")
    return cls(**values)


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of a checkpoint on the labelled splits of a data set."""

    run: str
    """A run's folder (its newest good checkpoint is taken) or a checkpoint file."""
    root: str | None = None
    """Data set with the run's train and val splits; by default the one it was trained on."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    threads: int = 0
    """Threads that decode; 0 takes one per CPU core."""
    baselines: bool = True
    """Also evaluate the untrained network and raw pixels."""
    out: str | None = None
    """JSON file for the result; by default eval_knn.json or eval_linear.json in the run's folder."""
    k: int = 20
    """kNN: neighbours that vote."""
    temperature: float = 0.07
    """kNN: a neighbour of cosine similarity s votes with weight exp(s / temperature)."""
    epochs: int = 80
    """Linear: passes over the cached features."""
    batch_size: int = 256
    """Linear: features per step."""
    base_lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3)
    """Linear: learning rates per 256 features; the best on held-out training images is reported."""

    def __post_init__(self) -> None:
        _require(self.threads >= 0, "threads", self.threads, "must be 0 (all cores) or more")
        _require(self.k >= 1, "k", self.k, "must be at least 1")
        _require(self.temperature > 0, "temperature", self.temperature, "must be above 0")
        _require(self.epochs >= 1, "epochs", self.epochs, "must be at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")
        _require(bool(self.base_lrs) and min(self.base_lrs) > 0, "base_lrs", self.base_lrs, "must all be above 0")
