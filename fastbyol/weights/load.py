"""Load the model of a checkpoint, or a backbone's weights from timm, the Hugging Face Hub, a run,
or a file of fastbyol, timm or torchvision.
"""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.errors
import timm
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import Tensor, nn

from fastbyol.backbones import has_same_padding
from fastbyol.build import build_backbone, build_model
from fastbyol.callbacks import Callback
from fastbyol.config import Config, DataConfig, ModelConfig
from fastbyol.errors import InputError, first_line
from fastbyol.model import BYOL
from fastbyol.runtime import checkpoint
from fastbyol.runtime.logging import logger
from fastbyol.weights import authors, files, hub
from fastbyol.weights.names import Tensors, torchvision_naming

_HUB = "timm:"
_ONLINE = "online.backbone."
_COUNTER = "num_batches_tracked"
# Raised by the hub in addition to OSError; HTTPError is the base class of its HTTP client's errors.
_HUB_ERRORS = (
    huggingface_hub.errors.EntryNotFoundError,
    huggingface_hub.errors.HTTPError,
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
)


class LoadedCheckpoint(NamedTuple):
    """A checkpoint's file and contents."""

    path: Path
    config: Config  # of the run that wrote it
    model: BYOL
    step: int  # optimizer steps done


def load_checkpoint_model(run_or_file: Path) -> LoadedCheckpoint:
    """Load a checkpoint file, or the newest valid checkpoint of a run's folder.

    Newer, damaged checkpoints are logged. The file may be a checkpoint of BYOL's authors
    (authors.py).

    Raises:
        InputError: no valid checkpoint, or this version does not know its config or model.
    """
    if authors.is_authors(run_or_file):
        return _load_authors_model(run_or_file)
    path, state = checkpoint.resolve(run_or_file)
    config = checkpoint.checkpoint_config(path, state)
    defaults = DataConfig()  # a stranger's checkpoint must not choose where files are written
    config = replace(config, data=replace(config.data, cache_dir=defaults.cache_dir, cache_gb=defaults.cache_gb))
    try:
        model = build_model(config.model, config.data.image_size_px, config.seed)
        model.load_state_dict(state["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} cannot be used: {first_line(error)}") from None
    return LoadedCheckpoint(path, config, model, state["step"])


def _load_authors_model(path: Path) -> LoadedCheckpoint:
    where = f"checkpoint {path}"
    tensors, config, step = authors.read_authors(path, where)
    with torch.device("meta"):  # a small file could name a huge network
        expected = build_model(config.model, config.data.image_size_px, config.seed).state_dict()
    backbone = _online_backbone(tensors)
    if (mismatch := _first_mismatch(backbone, _online_backbone(expected))) is not None:
        raise InputError(f"{where}: does not match {config.model.backbone}: {mismatch}")
    fitting = {name: t for name, t in tensors.items() if name in expected and t.shape == expected[name].shape}
    if any(name not in fitting for name in expected if not name.endswith(_COUNTER)):
        logger.info(f"{where}: heads or target network are missing or of different sizes; they are left out")
    model = build_model(config.model, config.data.image_size_px, config.seed)
    model.load_state_dict(fitting, strict=False)
    _load_tensors(files.StoredWeights(backbone, str(path)), model.online.backbone, where)
    return LoadedCheckpoint(path, config, model, step)


def with_init_settings(config: Config) -> Config:
    """Return the config with what the weights of `config.init` need: the authors' need their
    padding.
    """
    path = Path(config.init)
    if not (authors.is_authors(path) and path.is_file()) or config.model.padding == "same":
        return config
    if "resnet" not in config.model.backbone:
        raise InputError(f"init={config.init}: weights of a ResNet, not {config.model.backbone}; set model.backbone")
    logger.info(f"init={config.init}: model.padding=same, as in the authors' code")
    return replace(config, model=replace(config.model, padding="same"))


class InitialWeights(Callback):
    """Loads config.init into the backbone, and into the target's if it starts as a copy."""

    def on_model(self, model: BYOL, config: Config) -> None:
        """Load the weights.

        Raises:
            InputError: see `load_backbone`.
        """
        if config.init == "none":
            return
        online = model.online.backbone
        logger.info(load_backbone(config.init, online, config.model.backbone, config=config.model))
        if model.target is not None and config.model.target_init == "copy":
            model.target.backbone.load_state_dict(online.state_dict())


def open_backbone(path: str | Path) -> nn.Module:
    """Build the backbone of a .safetensors file of fastbyol.

    Args:
        path: Written by `fastbyol export --format safetensors` or `save_backbone`.

    Returns:
        The network, (B, 3, S, S) -> (B, F), in eval mode on the CPU.

    Raises:
        InputError: The file is missing, damaged, not written by fastbyol, or its settings are
            unknown to this version.
    """
    where = f"weights {path}"
    stored = files.read_safetensors(Path(path), where)
    if stored.config is None or stored.image_size is None:
        raise InputError(
            f"{where}: not written by fastbyol, so its architecture is unknown; build the network and use load_backbone"
        )
    backbone, _ = build_backbone(stored.config, stored.image_size)
    _load_tensors(stored, backbone, where)
    return backbone.eval()


def load_backbone(
    spec: str, backbone: nn.Module, name: str, *, key: str = "init", config: ModelConfig | None = None
) -> str:
    """Load weights into a backbone, in place.

    Args:
        spec: timm:NAME for timm's pre-trained weights; `hf://USER/NAME[@REVISION][/FILE]` for a
            file of the Hugging Face Hub; or a path: a run's folder or checkpoint (its online
            backbone is loaded), a .safetensors file, a folder with a model.safetensors, a
            checkpoint of BYOL's authors (.pkl), or a state dict of timm or torchvision.
        backbone: A timm model without classifier, with fused layers or not.
        name: The backbone's name in timm.
        key: Option that gave `spec`, for error messages.
        config: The backbone's settings, which must match those of a file of fastbyol. If None, only
            names, shapes and padding are compared.

    Returns:
        One line for the log: how many tensors were loaded from where, and which were skipped.

    Raises:
        InputError: The weights cannot be read or do not match; one line that names the file, and
            the tensor or setting.
    """
    where = f"{key}={spec}"
    source = spec.removeprefix(_HUB)
    if spec.startswith(hub.PREFIX):
        stored = _read(hub.download(spec, where), where)._replace(origin=spec)
    else:
        stored = _read(Path(spec), where) if source == spec else _download(source, name, where)
    _check_settings(stored, name, config, where)
    _check_padding(stored, backbone, where)
    count, notes = _load_tensors(stored, backbone, where)
    return "; ".join([f"{where}: loaded {count} tensors from {stored.origin}", *stored.notes, *notes])


def _download(source: str, name: str, where: str) -> files.StoredWeights:
    """Load timm's pre-trained weights `source` for the architecture of `name`."""
    if not timm.is_model(source):
        raise InputError(f"{where}: no such timm model; `timm.list_pretrained()` lists those with weights")
    if _architecture(source) != _architecture(name):
        raise InputError(f"{where}: not the weights of {name}; set model.backbone={_architecture(source)}")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it warns about every attempt; the error below reports it once
    try:
        network = timm.create_model(source, pretrained=True)
    except (OSError, *_HUB_ERRORS) as error:
        raise InputError(f"{where}: cannot load the weights: {first_line(error)}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
    tag = network.pretrained_cfg.get("tag")
    origin = f"timm's {_architecture(source)}" + (f".{tag}" if tag else "")
    return files.StoredWeights(network.state_dict(), origin)


def _read(path: Path, where: str) -> files.StoredWeights:
    if not path.exists():
        raise InputError(
            f"{where}: no such file or folder; for timm's weights give {_HUB}NAME, for the Hugging Face Hub "
            f"{hub.PREFIX}USER/NAME"
        )
    if (path / hub.WEIGHTS).is_file():
        return files.read_safetensors(path / hub.WEIGHTS, where)
    if path.is_dir():
        return _read_checkpoint(path, where)
    if path.suffix == ".onnx":
        raise InputError(f"{where}: cannot load .onnx files; export the run with --format safetensors")
    if authors.is_authors(path):
        return _read_authors(path, where)
    if path.suffix == files.SUFFIX:
        return files.read_safetensors(path, where)
    content = files.read_torch(path, where)
    if isinstance(content, dict) and {"format", "config", "model", "rng"} <= content.keys():
        return _read_checkpoint(path, where)
    return files.unwrap_state_dict(content, path, where)


def _read_checkpoint(run_or_file: Path, where: str) -> files.StoredWeights:
    notes: list[str] = []
    path, state = checkpoint.resolve(run_or_file, notes.append)
    config = files.parse_model_config(state["config"].get("model"), where)
    origin = f"the online backbone of checkpoint {path}"
    return files.StoredWeights(_online_backbone(state["model"]), origin, tuple(notes), config.backbone, config)


def _online_backbone(state: Tensors) -> Tensors:
    """Return the tensors of the online backbone in a state dict of `BYOL`."""
    return {name.removeprefix(_ONLINE): t for name, t in state.items() if name.startswith(_ONLINE)}


def _read_authors(path: Path, where: str) -> files.StoredWeights:
    tensors, config, step = authors.read_authors(path, where)
    origin = f"the online backbone of {path}, a checkpoint of BYOL's authors after {step} steps"
    notes = (f"license of the released ones: {authors.LICENSE}",)
    return files.StoredWeights(_online_backbone(tensors), origin, notes, config.model.backbone, config.model)


def _check_settings(stored: files.StoredWeights, name: str, config: ModelConfig | None, where: str) -> None:
    if stored.backbone is not None and _architecture(stored.backbone) != _architecture(name):
        raise InputError(f"{where}: contains {stored.backbone}, not {name}; set model.backbone={stored.backbone}")
    if stored.config is None or config is None:
        return
    for field in files.BACKBONE_FIELDS[1:]:
        theirs, ours = getattr(stored.config, field), getattr(config, field)
        if theirs != ours and (field != "norm_groups" or config.norm == "group"):
            raise InputError(f"{where}: trained with model.{field}={theirs}, not {ours}; set model.{field}={theirs}")


def _check_padding(stored: files.StoredWeights, backbone: nn.Module, where: str) -> None:
    """Names and shapes of the tensors do not tell the padding, but it changes the features."""
    if stored.config is not None and has_same_padding(backbone) != (stored.config.padding == "same"):
        remedy = "build the backbone with that setting, or change it with fastbyol.backbones.pad_same"
        raise InputError(f"{where}: trained with model.padding={stored.config.padding}: {remedy}")


def _load_tensors(stored: files.StoredWeights, backbone: nn.Module, where: str) -> tuple[int, list[str]]:
    """Load all tensors of a backbone. Only a classifier may be left over.

    Returns:
        The number of loaded tensors, and a note for each kind of tensor that was not.

    Raises:
        InputError: A tensor is missing, unexpected, not finite, or has another shape or type.
    """
    expected: Tensors = backbone.state_dict()
    tensors, skipped = _select_tensors(stored.tensors, backbone, expected)
    # BatchNorm reads its counter only if it has no momentum, and older files do not contain it.
    counters = [name for name in expected if name not in tensors and name.split(".")[-1] == _COUNTER]
    mismatch = _first_mismatch(tensors, {name: t for name, t in expected.items() if name not in counters})
    if mismatch is not None:
        raise InputError(f"{where}: does not match the backbone: {mismatch}; {_remedy(stored)}")
    for name, tensor in tensors.items():
        # After conversion: float64 may overflow, and float8 does not implement isfinite.
        if not tensor.to(expected[name].dtype).isfinite().all():
            raise InputError(f"{where}: {name} contains non-finite values")
    backbone.load_state_dict(tensors | {name: torch.zeros_like(expected[name]) for name in counters})
    notes = [f"skipped: {', '.join(skipped)}"] if skipped else []
    notes += [f"{len(counters)} x {_COUNTER} set to 0"] if counters else []
    return len(tensors), notes


def _select_tensors(tensors: Tensors, backbone: nn.Module, expected: Tensors) -> tuple[Tensors, list[str]]:
    """Return the tensors under timm's names, and the names of the skipped classifier's."""
    naming = torchvision_naming(backbone)
    if naming is not None and naming.marker not in tensors:
        naming = None
    classifiers = _classifiers(backbone) if naming is None else [naming.classifier]
    prefixes = tuple(f"{classifier}." for classifier in classifiers)
    skipped = [name for name in tensors if name not in expected and name.startswith(prefixes)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    return kept if naming is None else naming.to_timm(kept, expected), skipped


def _first_mismatch(tensors: Tensors, expected: Tensors) -> str | None:
    for name, own in expected.items():
        if name not in tensors:
            return f"{name} is missing"
        given = tensors[name]
        if given.shape != own.shape:
            return f"{name} has shape {_shape(given)}, expected {_shape(own)}"
        if given.is_floating_point() != own.is_floating_point():
            return f"{name} has dtype {given.dtype}, expected {own.dtype}"
    return next((f"unexpected tensor {name}" for name in tensors if name not in expected), None)


def _remedy(stored: files.StoredWeights) -> str:
    if stored.config is None:
        return "set model.backbone, model.width, model.stem and model.stem_channels to those of the file"
    values = {field: getattr(stored.config, field) for field in files.BACKBONE_FIELDS}
    settings = " ".join(f"model.{field}={value}" for field, value in values.items() if value != {})
    return f"set {settings}, as in its training"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "()"


def _classifiers(backbone: nn.Module) -> list[str]:
    """Return timm's names of the classifiers, which the backbone was built without."""
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _architecture(name: str) -> str:
    """Return a timm name without the tag of its weights; MODULE:FACTORY unchanged."""
    return name if ":" in name else name.split(".")[0]
