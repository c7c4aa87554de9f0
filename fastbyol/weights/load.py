"""Backbones in files: fastbyol's own .safetensors, and what other libraries call the same tensors.

timm's names are the plain ones, in checkpoints (after "online.backbone.") and in our files. A `Naming` pairs them with another
library's, for both directions: export.py writes by it, `load_backbone` reads by it.
"""

import dataclasses
import errno
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.errors
import timm
import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import VGG, ConvNeXt, VisionTransformer
from torch import Tensor, nn

from fastbyol import __version__
from fastbyol.build import build_backbone
from fastbyol.config import ModelConfig
from fastbyol.errors import InputError, RunError, error_reason, first_line
from fastbyol.runtime import checkpoint
from fastbyol.runtime.files import atomic_write, check_output

Tensors = dict[str, Tensor]

FORMAT = 1
SUFFIX = ".safetensors"
# Of ModelConfig: what a backbone's tensors mean. The rest is heads and loss.
BACKBONE_FIELDS = ("backbone", "width", "stem", "norm", "norm_groups", "weight_standardization")

_ONLINE = "online.backbone."
_COUNTER = "num_batches_tracked"
_HUB = "timm:"
# What torch's readers raise for a damaged file, beside OSError.
_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
# What the hub raises beside OSError; HTTPError is the base class of its HTTP client's errors.
_HUB_FAILURES = (
    huggingface_hub.errors.EntryNotFoundError,
    huggingface_hub.errors.HTTPError,
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
)


class Pair(NamedTuple):
    """Names of the same tensors: '#' stands for a number, '*' for anything, the same on both sides and in the same order."""

    timm: str
    other: str
    reshape: Callable[[Tensor], Tensor] | None = None  # timm's tensor -> the other's, of as many values


class Naming(NamedTuple):
    """How another library names the tensors of a family of backbones."""

    pairs: tuple[Pair, ...]
    classifier: str  # its classifier: no backbone has it
    mark: str  # a tensor that its files have and timm's have not

    def to_other(self, tensors: Tensors) -> Tensors:
        """timm's tensors under the other library's names.

        Raises:
            ValueError: it has no name for one of them.
        """
        found = {}
        for name, tensor in tensors.items():
            pair, parts = self._find(name, "timm")
            if pair is None:
                raise ValueError(f"there is no name for {name}")
            found[_fill(pair.other, parts)] = tensor if pair.reshape is None else pair.reshape(tensor)
        return found

    def to_timm(self, tensors: Tensors, own: Tensors) -> Tensors:
        """The other library's tensors under timm's names, in the shapes of `own`; what has no name keeps its own."""
        found = {}
        for name, tensor in tensors.items():
            pair, parts = self._find(name, "other")
            plain = name if pair is None else _fill(pair.timm, parts)
            if pair is not None and pair.reshape is not None and plain in own and own[plain].numel() == tensor.numel():
                tensor = tensor.reshape(own[plain].shape)
            found[plain] = tensor
        return found

    def _find(self, name: str, side: str) -> tuple[Pair | None, tuple[str, ...]]:
        for pair in self.pairs:
            pattern = re.escape(getattr(pair, side)).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
            if (match := re.fullmatch(pattern, name)) is not None:
                return pair, match.groups()
        return None, ()


def _fill(template: str, parts: tuple[str, ...]) -> str:
    rest = iter(parts)
    return re.sub(r"[#*]", lambda _: next(rest), template)


SAME_NAMES = Naming((Pair("*", "*"),), classifier="fc", mark="fc.weight")  # ResNets: torchvision's names are timm's

TORCHVISION: dict[type[nn.Module], Naming] = {
    VGG: Naming(
        (
            Pair("features.*", "features.*"),
            # timm convolves with kernels of 7x7 and 1x1 where torchvision multiplies by a matrix.
            Pair("pre_logits.fc1.weight", "classifier.0.weight", lambda w: w.flatten(1)),
            Pair("pre_logits.fc1.bias", "classifier.0.bias"),
            Pair("pre_logits.fc2.weight", "classifier.3.weight", lambda w: w.flatten(1)),
            Pair("pre_logits.fc2.bias", "classifier.3.bias"),
        ),
        classifier="classifier.6",
        mark="classifier.0.weight",
    ),
    VisionTransformer: Naming(
        (
            Pair("cls_token", "class_token"),
            Pair("pos_embed", "encoder.pos_embedding"),
            Pair("patch_embed.proj.*", "conv_proj.*"),
            Pair("blocks.#.norm#.*", "encoder.layers.encoder_layer_#.ln_#.*"),
            Pair("blocks.#.attn.qkv.*", "encoder.layers.encoder_layer_#.self_attention.in_proj_*"),
            Pair("blocks.#.attn.proj.*", "encoder.layers.encoder_layer_#.self_attention.out_proj.*"),
            Pair("blocks.#.mlp.fc1.*", "encoder.layers.encoder_layer_#.mlp.0.*"),
            Pair("blocks.#.mlp.fc2.*", "encoder.layers.encoder_layer_#.mlp.3.*"),
            Pair("norm.*", "encoder.ln.*"),
        ),
        classifier="heads.head",
        mark="class_token",
    ),
    ConvNeXt: Naming(
        (
            Pair("stem.#.*", "features.0.#.*"),
            *(Pair(f"stages.{s}.downsample.#.*", f"features.{2 * s}.#.*") for s in (1, 2, 3)),
            *(
                pair
                for s in range(4)
                for pair in (
                    Pair(
                        f"stages.{s}.blocks.#.gamma",
                        f"features.{2 * s + 1}.#.layer_scale",
                        lambda gamma: gamma[:, None, None],
                    ),
                    Pair(f"stages.{s}.blocks.#.conv_dw.*", f"features.{2 * s + 1}.#.block.0.*"),
                    Pair(f"stages.{s}.blocks.#.norm.*", f"features.{2 * s + 1}.#.block.2.*"),
                    Pair(f"stages.{s}.blocks.#.mlp.fc1.*", f"features.{2 * s + 1}.#.block.3.*"),
                    Pair(f"stages.{s}.blocks.#.mlp.fc2.*", f"features.{2 * s + 1}.#.block.5.*"),
                )
            ),
            Pair("head.norm.*", "classifier.0.*"),
        ),
        classifier="classifier.2",
        mark="features.0.0.weight",
    ),
}

DETECTRON2 = Naming(  # of ResNets
    (
        Pair("conv1.weight", "stem.conv1.weight"),
        Pair("bn1.*", "stem.conv1.norm.*"),
        *(
            pair
            for s in (1, 2, 3, 4)
            for pair in (
                Pair(f"layer{s}.#.conv#.weight", f"res{s + 1}.#.conv#.weight"),
                Pair(f"layer{s}.#.bn#.*", f"res{s + 1}.#.conv#.norm.*"),
                Pair(f"layer{s}.#.downsample.0.weight", f"res{s + 1}.#.shortcut.weight"),
                Pair(f"layer{s}.#.downsample.1.*", f"res{s + 1}.#.shortcut.norm.*"),
            )
        ),
    ),
    classifier="linear",
    mark="stem.conv1.weight",
)


def plain_tensors(backbone: nn.Module) -> Tensors:
    """Its parameters and buffers, detached, contiguous and on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}


def check_new(path: Path, key: str) -> None:
    """Refuses what `save_backbone` would refuse, before any work is done.

    Raises:
        InputError: `path` exists, its name has another suffix, or its folder is not there or cannot be written to.
    """
    if path.suffix != SUFFIX:
        raise InputError(f"{key} {path}: the name must end in {SUFFIX}")
    if path.exists() or path.is_symlink():
        raise InputError(f"{key} {path} exists; it is not overwritten: remove it or name another file")
    check_output(path, f"{key} {path}")


@contextmanager
def new_file(path: Path, key: str) -> Iterator[Path]:
    """Gives a temporary path beside `path`; when the body has succeeded the file is synced and takes the name, else it is removed.

    Raises:
        InputError: `path` exists.
        RunError: it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise InputError(f"{key} {path} exists; it is not overwritten: remove it or name another file")
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise RunError(f"{key} {path}: cannot be written: {error_reason(error)}") from None


def write_safetensors(path: Path, tensors: Tensors, config: ModelConfig, image_size: int) -> None:
    """Writes timm's names with what is needed to build the backbone again, and a checksum; see `open_backbone`.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    facts = {
        "format": "pt",  # what other readers of .safetensors expect of torch's tensors
        "fastbyol_format": str(FORMAT),
        "fastbyol_version": __version__,
        **{field: str(getattr(config, field)) for field in BACKBONE_FIELDS},
        "image_size_px": str(image_size),
        "model_config": json.dumps(dataclasses.asdict(config)),
        "crc32": _checksum(tensors),
    }
    save_file(tensors, path, metadata=facts)


def save_backbone(path: Path, backbone: nn.Module, config: ModelConfig, image_size: int, *, key: str) -> None:
    """Writes a new .safetensors file, which `open_backbone` and `load_backbone` read.

    Args:
        backbone: as `build_backbone` makes it, converted or not, on any device.
        image_size: side in pixels of the images it was trained on.
        key: the option that names `path`, for errors.

    Raises:
        InputError: `path` exists, has another suffix, or cannot be written.
    """
    check_new(path, key)
    with new_file(path, key) as temporary:
        write_safetensors(temporary, plain_tensors(backbone), config, image_size)


def open_backbone(path: str | Path) -> nn.Module:
    """The network of one of fastbyol's .safetensors files, (B, 3, S, S) -> (B, F), in eval mode on the CPU.

    Raises:
        InputError: the file is missing, damaged or not one of fastbyol's, or this version does not know its settings.
    """
    where = f"weights {path}"
    found = _read_safetensors(Path(path), where)
    if found.config is None or found.image_size is None:
        raise InputError(f"{where}: not one of fastbyol's files, so it does not say which backbone it holds")
    backbone, _ = build_backbone(found.config, found.image_size)
    _fit(found, backbone, where)
    return backbone.eval()


def load_backbone(
    spec: str, backbone: nn.Module, name: str, *, key: str = "init", config: ModelConfig | None = None
) -> str:
    """Loads weights into a backbone, in place.

    Args:
        spec: timm:NAME (timm's pre-trained weights), or a path: a .safetensors file, a run's folder or checkpoint (the online
            backbone is taken), a state dict of timm or torchvision.
        backbone: a timm model without classifier, converted or not.
        name: its name in timm.
        key: the option that gave `spec`, for errors.
        config: the backbone's settings; a file of fastbyol's that says other ones is refused. Without it only names and shapes count.

    Returns:
        one line: how many tensors from where, and what was left out.

    Raises:
        InputError: one line that says which file, tensor or setting does not fit.
    """
    where = f"{key}={spec}"
    found = _from_timm(spec.removeprefix(_HUB), name, where) if spec.startswith(_HUB) else _from_path(Path(spec), where)
    _check_settings(found, name, config, where)
    count, left_out = _fit(found, backbone, where)
    notes = [*found.notes]
    if left_out:
        notes.append(f"left out: {', '.join(left_out)}")
    return "; ".join([f"{where}: {count} tensors from {found.origin}", *notes])


class _Found(NamedTuple):
    """What a file or the hub gave."""

    tensors: Tensors
    origin: str  # in words
    notes: tuple[str, ...] = ()
    backbone: str | None = None  # its name in timm, where the source says it
    config: ModelConfig | None = None  # where it comes from a run of fastbyol's
    image_size: int | None = None


def _from_timm(source: str, name: str, where: str) -> _Found:
    if not timm.is_model(source):
        raise InputError(f"{where}: timm has no such model; `timm.list_pretrained()` lists those with weights")
    if _architecture(source) != _architecture(name):
        raise InputError(f"{where}: not {name}; set model.backbone={_architecture(source)}")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it warns of every attempt; the error below says it once
    try:
        network = timm.create_model(source, pretrained=True)
    except (OSError, *_HUB_FAILURES) as error:
        raise InputError(f"{where}: no weights: {first_line(error)}") from None
    finally:
        hub_logging.set_verbosity(verbosity)
    tag = network.pretrained_cfg.get("tag")
    origin = f"timm's {_architecture(source)}" + (f".{tag}" if tag else "")
    return _Found(network.state_dict(), origin)


def _from_path(path: Path, where: str) -> _Found:
    if not path.exists():
        raise InputError(f"{where}: there is no such file or folder; timm's weights are named {_HUB}NAME")
    if path.is_dir():
        return _from_checkpoint(path, where)
    if path.suffix in (".onnx", ".pkl"):
        raise InputError(f"{where}: {path.suffix} files are not read; export the run with --format safetensors")
    if path.suffix == SUFFIX:
        return _read_safetensors(path, where)
    content = _read_torch(path, where)
    if isinstance(content, dict) and {"format", "config", "model", "rng"} <= content.keys():
        return _from_checkpoint(path, where)
    return _from_state_dict(content, path, where)


def _from_checkpoint(run_or_file: Path, where: str) -> _Found:
    notes: list[str] = []
    path, state = checkpoint.resolve(run_or_file, notes.append)
    online = {name.removeprefix(_ONLINE): t for name, t in state["model"].items() if name.startswith(_ONLINE)}
    config = _settings(state["config"].get("model"), where)
    return _Found(online, f"the online backbone of checkpoint {path}", tuple(notes), config.backbone, config)


def _from_state_dict(content: Any, path: Path, where: str) -> _Found:
    """A state dict, or a training script's dict around one (timm's, torchvision's)."""
    around = content if isinstance(content, dict) else {}
    inner = next((key for key in ("state_dict", "model") if isinstance(around.get(key), dict)), None)
    tensors = content if inner is None else around[inner]
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{where}: holds no state dict; give a dict of tensor names and tensors")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of compiled and of distributed modules
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    arch = around.get("arch") if inner is not None else None
    return _Found(
        tensors,
        str(path) if inner is None else f"{inner!r} of {path}",
        backbone=arch if isinstance(arch, str) and timm.is_model(arch) else None,
    )


def _read_torch(path: Path, where: str) -> Any:
    """What torch.save wrote, as plain data; a zip archive's checksums are verified."""
    damaged = (
        f"{where}: damaged, not written by torch.save, or holding more than tensors and plain values, which is refused"
    )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:
                    raise InputError(f"{where}: damaged: {member} fails its checksum")
        with warnings.catch_warnings(action="ignore"):  # of odd pickle protocols, which end in an error anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # an archive that was cut points before its own beginning
            raise InputError(damaged) from None
        raise InputError(f"{where}: cannot be read: {error_reason(error)}") from None
    except _UNREADABLE:
        raise InputError(damaged) from None


def _read_safetensors(path: Path, where: str) -> _Found:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: its path is not UTF-8, which safetensors cannot open: rename it") from None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise InputError(f"{where}: damaged or not a {SUFFIX} file: {first_line(error)}") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error_reason(error)}") from None
    if "fastbyol_format" not in facts:
        return _Found(tensors, str(path))
    if facts["fastbyol_format"] != str(FORMAT):
        raise InputError(f"{where}: has format {facts['fastbyol_format']}, this version reads format {FORMAT}")
    if facts.get("crc32") != _checksum(tensors):
        raise InputError(f"{where}: damaged: its tensors fail their checksum")
    try:
        values, image_size = json.loads(facts["model_config"]), int(facts["image_size_px"])
    except (KeyError, ValueError):
        raise InputError(f"{where}: damaged: its settings cannot be read") from None
    config = _settings(values, where)
    return _Found(tensors, str(path), backbone=config.backbone, config=config, image_size=image_size)


def _settings(values: Any, where: str) -> ModelConfig:
    try:
        return ModelConfig(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: this version does not know its settings: {first_line(error)}") from None


def _checksum(tensors: Tensors) -> str:
    """CRC-32 of all values, in the order of the names: .safetensors has none of its own."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _check_settings(found: _Found, name: str, config: ModelConfig | None, where: str) -> None:
    if found.backbone is not None and _architecture(found.backbone) != _architecture(name):
        raise InputError(f"{where}: holds {found.backbone}, not {name}; set model.backbone={found.backbone}")
    if found.config is None or config is None:
        return
    for field in BACKBONE_FIELDS[1:]:
        theirs, ours = getattr(found.config, field), getattr(config, field)
        if theirs != ours and (field != "norm_groups" or config.norm == "group"):
            raise InputError(
                f"{where}: holds a backbone of model.{field}={theirs}, not {ours}; set model.{field}={theirs}"
            )


def _fit(found: _Found, backbone: nn.Module, where: str) -> tuple[int, list[str]]:
    """Loads tensors that must be the backbone's, all of them, but for a classifier's.

    Returns:
        how many were loaded, and the names of those that were left out or missing without harm.
    """
    own: Tensors = backbone.state_dict()
    naming = next((n for kind, n in TORCHVISION.items() if isinstance(backbone, kind)), SAME_NAMES)
    foreign = naming is not SAME_NAMES and naming.mark in found.tensors
    classifiers = [naming.classifier] if foreign else _classifiers(backbone)
    left_out = [
        name
        for name in found.tensors
        if name not in own and any(name.startswith(f"{classifier}.") for classifier in classifiers)
    ]
    tensors = {name: tensor for name, tensor in found.tensors.items() if name not in left_out}
    if foreign:
        tensors = naming.to_timm(tensors, own)
    # BatchNorm reads its counter only where it has no momentum; older files do not have it.
    counters = [name for name in own if name not in tensors and name.split(".")[-1] == _COUNTER]
    fault = _first_fault(tensors, {name: t for name, t in own.items() if name not in counters})
    if fault is not None:
        raise InputError(f"{where}: does not fit the backbone: {fault}; {_remedy(found)}")
    for name, tensor in tensors.items():
        # In the backbone's type: 64-bit numbers may be too large for it, 8-bit ones cannot be asked.
        if not tensor.to(own[name].dtype).isfinite().all():
            raise InputError(f"{where}: {name} holds values that are not finite")
    count = len(tensors)
    backbone.load_state_dict(tensors | {name: torch.zeros_like(own[name]) for name in counters})
    return count, left_out + ([f"{len(counters)} x {_COUNTER}, now 0"] if counters else [])


def _first_fault(tensors: Tensors, own: Tensors) -> str | None:
    for name, tensor in own.items():
        if name not in tensors:
            return f"{name} is missing"
        given = tensors[name]
        if given.shape != tensor.shape:
            return f"{name} is {_shape(given)}, not {_shape(tensor)}"
        if given.is_floating_point() != tensor.is_floating_point():
            return f"{name} is of {given.dtype}, not {tensor.dtype}"
    return next((f"it has no {name}" for name in tensors if name not in own), None)


def _remedy(found: _Found) -> str:
    if found.config is None:
        return "set model.backbone, model.width and model.stem to the file's"
    settings = " ".join(f"model.{field}={getattr(found.config, field)}" for field in BACKBONE_FIELDS)
    return f"it was made with {settings}: set these"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _classifiers(backbone: nn.Module) -> list[str]:
    """timm's names of the classifier that the backbone was built without."""
    names = getattr(backbone, "pretrained_cfg", {}).get("classifier") or ()
    return [names] if isinstance(names, str) else list(names)


def _architecture(name: str) -> str:
    """A timm name without the tag of its weights."""
    return name.split(".")[0]
