"""Reading and writing of weight files: fastbyol's .safetensors, and torch.save's state dicts."""

import dataclasses
import errno
import json
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastbyol import __version__
from fastbyol.config import ModelConfig
from fastbyol.errors import InputError, RunError, error_reason, first_line
from fastbyol.runtime.files import atomic_write, check_output
from fastbyol.weights.names import Tensors

FORMAT = 1
SUFFIX = ".safetensors"
BACKBONE_FIELDS = (
    *("backbone", "backbone_args", "width", "stem", "stem_channels", "padding"),
    *("norm", "norm_groups", "weight_standardization"),
)
"""Fields of ModelConfig that define the backbone. The others define heads and loss."""


class StoredWeights(NamedTuple):
    """Tensors of a backbone, and what their source states about them."""

    tensors: Tensors
    origin: str
    """Description of the source, for the log."""
    notes: tuple[str, ...] = ()
    backbone: str | None = None
    """timm's name of the architecture, if known."""
    config: ModelConfig | None = None
    """Settings of the run, if trained by fastbyol."""
    image_size: int | None = None
    """Side of the training images in pixels, if stored."""


def plain_tensors(backbone: nn.Module) -> Tensors:
    """Return all parameters and buffers, detached, contiguous and on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}


def check_new(path: Path, key: str) -> None:
    """Check that `save_backbone` can write `path`, before expensive work starts.

    Raises:
        InputError: `path` exists, has the wrong suffix, or its folder is missing or not writable.
    """
    if path.suffix != SUFFIX:
        raise InputError(f"{key} {path}: the name must end in {SUFFIX}")
    _check_missing(path, key)
    check_output(path, f"{key} {path}")


def _check_missing(path: Path, key: str) -> None:
    if path.exists() or path.is_symlink():
        raise InputError(f"{key} {path}: already exists; remove it or choose another file name")


@contextmanager
def new_file(path: Path, key: str) -> Iterator[Path]:
    """Context manager: write a new file atomically.

    Yields:
        A temporary path. It is renamed to `path` when the body succeeds, and removed otherwise.

    Raises:
        InputError: `path` exists.
        RunError: `path` cannot be written.
    """
    _check_missing(path, key)
    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise RunError(f"{key} {path}: cannot be written: {error_reason(error)}") from None


def write_safetensors(path: Path, tensors: Tensors, config: ModelConfig, image_size: int) -> None:
    """Write tensors with timm's names, a checksum and the settings that `open_backbone` needs.

    Raises:
        OSError, SafetensorError: The file cannot be written.
    """
    metadata = {
        "format": "pt",  # other readers of .safetensors expect this for PyTorch tensors
        "fastbyol_format": str(FORMAT),
        "fastbyol_version": __version__,
        **{field: str(getattr(config, field)) for field in BACKBONE_FIELDS},
        "image_size_px": str(image_size),
        "model_config": json.dumps(dataclasses.asdict(config)),
        "crc32": _checksum(tensors),
    }
    save_file(tensors, path, metadata=metadata)


def save_backbone(path: Path, backbone: nn.Module, config: ModelConfig, image_size: int, *, key: str) -> None:
    """Save a backbone as a new .safetensors file for `open_backbone` and `load_backbone`.

    Args:
        path: File to create.
        backbone: Built by `build_backbone`, with fused layers or not, on any device.
        config: Settings of the backbone.
        image_size: Side of the training images in pixels.
        key: Option that names `path`, for error messages.

    Raises:
        InputError: `path` exists, has the wrong suffix, or its folder is missing or not writable.
        RunError: `path` cannot be written.
    """
    check_new(path, key)
    with new_file(path, key) as temporary:
        write_safetensors(temporary, plain_tensors(backbone), config, image_size)


def read_safetensors(path: Path, where: str) -> StoredWeights:
    """Read a .safetensors file, and verify settings and checksum if fastbyol wrote it.

    Args:
        path: The file.
        where: Start of error messages.

    Raises:
        InputError: The file cannot be read, is damaged, or has an unknown format version.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: the path is not valid UTF-8, which safetensors cannot open; rename it") from None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise InputError(f"{where}: damaged or not a {SUFFIX} file: {first_line(error)}") from None
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error_reason(error)}") from None
    if "fastbyol_format" not in metadata:
        return StoredWeights(tensors, str(path))
    if (version := metadata["fastbyol_format"]) != str(FORMAT):
        raise InputError(f"{where}: file format {version} is not supported; this version reads format {FORMAT}")
    if metadata.get("crc32") != _checksum(tensors):
        raise InputError(f"{where}: damaged: checksum mismatch")
    try:
        values, image_size = json.loads(metadata["model_config"]), int(metadata["image_size_px"])
    except (KeyError, ValueError):
        raise InputError(f"{where}: damaged: its settings cannot be parsed") from None
    config = parse_model_config(values, where)
    return StoredWeights(tensors, str(path), backbone=config.backbone, config=config, image_size=image_size)


def parse_model_config(values: Any, where: str) -> ModelConfig:
    """Build the ModelConfig of stored settings.

    Raises:
        InputError: The settings are not those of this version.
    """
    try:
        return ModelConfig(**ModelConfig.upgraded(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: this version does not support its settings: {first_line(error)}") from None


def _checksum(tensors: Tensors) -> str:
    """CRC-32 of all values, in the order of the names: .safetensors itself has no checksum."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def read_torch(path: Path, where: str) -> Any:
    """Load a file written by torch.save as plain data, and verify the checksums of a zip archive.

    Raises:
        InputError: The file cannot be read, is damaged, or contains objects other than plain data.
    """
    damaged = (
        f"{where}: damaged, not written by torch.save, or contains objects other than tensors and plain values, "
        "which are not loaded because they can run code"
    )
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:
                    raise InputError(f"{where}: damaged: checksum mismatch in {member}")
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; such files raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # offsets in a truncated archive can be negative
            raise InputError(damaged) from None
        raise InputError(f"{where}: cannot be read: {error_reason(error)}") from None
    except (InputError, MemoryError):
        raise
    except Exception:  # torch.load has no common base class of errors for damaged files
        raise InputError(damaged) from None


def unwrap_state_dict(content: Any, path: Path, where: str) -> StoredWeights:
    """Find the state dict in a loaded file: the file itself, or an entry of a trainer's checkpoint.

    Args:
        content: The loaded file; timm's and torchvision's trainers wrap the state dict.
        path: The file, for the log.
        where: Start of error messages.

    Raises:
        InputError: There is no state dict.
    """
    outer = content if isinstance(content, dict) else {}
    entry = next((key for key in ("state_dict", "model") if isinstance(outer.get(key), dict)), None)
    tensors = content if entry is None else outer[entry]
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise InputError(f"{where}: contains no state dict, which maps names to tensors")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # torch.compile, DistributedDataParallel
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    arch = outer.get("arch") if entry is not None else None
    return StoredWeights(
        tensors,
        str(path) if entry is None else f"{entry!r} of {path}",
        backbone=arch if isinstance(arch, str) and timm.is_model(arch) else None,
    )
