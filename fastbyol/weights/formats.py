"""Export formats: how each library stores a backbone, and the code that loads it there."""

import io
import json
import pickle
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from timm.models import ResNet
from torch import nn

from fastbyol import __version__
from fastbyol.backbones import BYOL_RESNETS
from fastbyol.config import STEM_CHANNELS, Config, ModelConfig
from fastbyol.errors import InputError, RunError, first_line
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime import environment
from fastbyol.runtime.checkpoint import run_folder_of
from fastbyol.weights import authors
from fastbyol.weights.files import SUFFIX, plain_tensors, write_safetensors
from fastbyol.weights.names import Tensors, detectron2_name, torchvision_naming

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
"""timm's names of the ResNets that torchvision and detectron2 have too."""
_CONVNEXTS = ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")
_VITS = {
    "vit_base_patch16": "vit_b_16",
    "vit_base_patch32": "vit_b_32",
    "vit_large_patch16": "vit_l_16",
    "vit_large_patch32": "vit_l_32",
    "vit_huge_patch14": "vit_h_14",
}
_LAYER_FIELDS = ("norm", "weight_standardization")
"""Fields of ModelConfig for layers that no other library's networks have."""

_ONNX_OPSET = 18
_ONNX_TOLERANCE = 1e-4  # relative to the largest feature
_ONNX_LIMIT_BYTES = 2**31 - 2**20  # protobuf messages are limited to 2 GiB


@dataclass(frozen=True, kw_only=True)
class Source:
    """The backbone to export, and the run that it comes from."""

    checkpoint: Path
    config: Config
    backbone: nn.Module
    """timm's plain modules, on the CPU, in eval mode: (N, 3, S, S) -> (N, F)."""
    features: int
    """F."""

    @property
    def name(self) -> str:
        """The backbone's name in timm, without a tag of weights."""
        return self.config.model.backbone.split(".")[0]

    @property
    def size(self) -> int:
        """S, the side of the training images in pixels."""
        return self.config.data.image_size_px

    @property
    def is_authors(self) -> bool:
        """True if the checkpoint is one of BYOL's authors, which fastbyol did not train."""
        return authors.is_authors(self.checkpoint)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return run_folder_of(self.checkpoint.absolute())


class Format(NamedTuple):
    """A file format for backbones."""

    suffixes: tuple[str, ...]
    """The first one is the default."""
    write: Callable[[Source, Path, str], None]
    """(source, temporary path, suffix); raises InputError if the library has no such network."""
    usage: Callable[[Source, Path], str]
    """(source, final absolute path) -> markdown that shows how to load the file."""


def fenced(language: str, code: str) -> str:
    """Return a markdown code block whose fence is longer than any run of backticks in the code."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", code))])
    return f"{fence}{language}\n{code}\n{fence}"


def _reject_settings(source: Source, library: str, fields: tuple[str, ...]) -> None:
    """Raise InputError if one of the fields of ModelConfig does not have its default value."""
    config, default = source.config.model, ModelConfig()
    for field in fields:
        if (value := getattr(config, field)) != getattr(default, field):
            others = "safetensors or onnx" if field in _LAYER_FIELDS else "timm, safetensors or onnx"
            raise InputError(
                f"--format {library}: {library} has no {source.name} with model.{field}={value}; use --format {others}"
            )


def _torch_bytes(tensors: Tensors) -> bytes:
    """Serialize in memory: torch.save to a file reports a full disk as a RuntimeError."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


# timm


def _write_timm(source: Source, file: Path, suffix: str) -> None:
    _reject_settings(source, "timm", _LAYER_FIELDS)
    if suffix == SUFFIX:
        _write_safetensors(source, file, suffix)
    else:
        file.write_bytes(_torch_bytes(plain_tensors(source.backbone)))


def feature_code(source: Source) -> str:
    """Return the last lines of an example, which run `backbone`."""
    return f"""\
images = torch.zeros(1, 3, {source.size}, {source.size})  # any batch size, preprocessed as below
with torch.no_grad():
    features = backbone(images)
print(features.shape)"""


def timm_arguments(source: Source) -> dict[str, Any]:
    """Return the arguments of timm.create_model for the backbone's width and arguments."""
    model = source.config.model
    widths = {} if model.width == 1 else {"channels": tuple(int(STEM_CHANNELS * model.width * 2**k) for k in range(4))}
    return model.backbone_args | widths


def is_plain_timm(source: Source) -> bool:
    """Return True if timm.create_model builds the backbone, with `timm_arguments`."""
    config, default = source.config.model, ModelConfig()
    plain_layers = all(getattr(config, field) == getattr(default, field) for field in _LAYER_FIELDS)
    return plain_layers and not _changes_of_timm(source) and is_of_timm(source)


def is_of_timm(source: Source) -> bool:
    """Return True if timm knows the backbone's name."""
    return timm.is_model(BYOL_RESNETS.get(source.name, source.name))


def _timm_usage(source: Source, out: Path) -> str:
    name = BYOL_RESNETS.get(source.name, source.name)
    changes = _changes_of_timm(source)
    channels = "".join(f", {key}={value!r}" for key, value in timm_arguments(source).items())
    if not changes:
        code = f"""\
import timm
import torch

backbone = timm.create_model("{name}", num_classes=0{channels}, checkpoint_path={str(out)!r}).eval()
{feature_code(source)}"""
        return fenced("python", code)
    read = "load_file(path)" if out.suffix == SUFFIX else "torch.load(path, weights_only=True)"
    library = "\nfrom safetensors.torch import load_file" if out.suffix == SUFFIX else ""
    if source.config.model.padding == "same":
        library += "\nfrom timm.layers import Conv2dSame\nfrom timm.layers.pool2d_same import MaxPool2dSame"
    code = f"""\
import timm
import torch{library}
from torch import nn

path = {str(out)!r}
backbone = timm.create_model("{name}", num_classes=0{channels})
{chr(10).join(changes)}
backbone.load_state_dict({read})
backbone.eval()
{feature_code(source)}"""
    return fenced("python", code)


def _changes_of_timm(source: Source) -> list[str]:
    """Return the lines that turn timm's ResNet of the same name and width into the backbone.

    backbones.py makes the same changes.
    """
    config, backbone, lines = source.config.model, source.backbone, []
    conv1 = getattr(backbone, "conv1", None)
    widened = type(backbone) is ResNet and isinstance(conv1, nn.Conv2d) and conv1.out_channels != STEM_CHANNELS
    if config.stem == "small":
        lines += [
            f"backbone.conv1 = {_conv_code(backbone.conv1)}  # stem for small images",
            "backbone.maxpool = nn.Identity()",
        ]
    elif widened:
        lines += [f"backbone.conv1 = {_conv_code(backbone.conv1)}  # wider stem"]
    if widened:
        first = backbone.layer1[0]
        lines += [
            f"backbone.bn1 = nn.BatchNorm2d({backbone.bn1.num_features})",
            f"backbone.layer1[0].conv1 = {_conv_code(first.conv1)}",
        ]
    if widened or source.name in BYOL_RESNETS:
        lines.append(f"backbone.layer1[0].downsample = {_downsample_code(backbone.layer1[0].downsample)}")
    if config.padding == "same":
        lines += [
            "for module in backbone.modules():  # TensorFlow's padding",
            "    if isinstance(module, nn.Conv2d) and module.stride != (1, 1) and module.kernel_size != (1, 1):",
            "        module.__class__ = Conv2dSame",
        ]
        lines += ["backbone.maxpool = MaxPool2dSame(3, 2)"] if config.stem != "small" else []
    return lines


def _conv_code(conv: nn.Conv2d) -> str:
    more = f", stride={conv.stride[0]}" if conv.stride[0] > 1 else ""
    padding = conv.kernel_size[0] // 2
    more += f", padding={padding}" if padding else ""
    return f"nn.Conv2d({conv.in_channels}, {conv.out_channels}, {conv.kernel_size[0]}{more}, bias=False)"


def _downsample_code(downsample: nn.Sequential | None) -> str:
    if downsample is None:
        return "None"
    conv, norm = downsample
    return f"nn.Sequential({_conv_code(conv)}, nn.BatchNorm2d({norm.num_features}))"


# fastbyol's own format


def _write_safetensors(source: Source, file: Path, suffix: str) -> None:
    write_safetensors(file, plain_tensors(source.backbone), source.config.model, source.size)


def _safetensors_usage(source: Source, out: Path) -> str:
    code = f"""\
import torch
from fastbyol.weights.load import open_backbone

backbone = open_backbone({str(out)!r})
{feature_code(source)}"""
    init = fenced("sh", f"fastbyol train --init {shlex.quote(str(out))}")
    text = f"With fastbyol:\n\n{fenced('python', code)}\n\nTo start another run from it, with that run's options:\n\n{init}"
    default = ModelConfig()
    if all(getattr(source.config.model, field) == getattr(default, field) for field in _LAYER_FIELDS):
        text += f"\n\nWithout fastbyol (the tensors have timm's names):\n\n{_timm_usage(source, out)}"
    return text


# torchvision


def torchvision_network(name: str, size: int) -> tuple[str, dict[str, int]] | None:
    """Find torchvision's equivalent of a timm backbone.

    Args:
        name: timm's name.
        size: Side of the images in pixels.

    Returns:
        torchvision's name and the arguments of its constructor; None if there is no equivalent.
    """
    if name in (*RESNETS, *_CONVNEXTS):
        return name, {}
    family, _, side = name.rpartition("_")
    # torchvision's ViTs require whole patches; their names end with the patch size.
    if family in _VITS and side.isdigit() and size % int(_VITS[family][-2:]) == 0:
        return _VITS[family], {} if size == 224 else {"image_size": size}
    return None


def _write_torchvision(source: Source, file: Path, suffix: str) -> None:
    _reject_settings(source, "torchvision", (*_LAYER_FIELDS, "width", "stem", "stem_channels", "padding"))
    if (network := torchvision_network(source.name, source.size)) is None:
        raise InputError(
            f"--format torchvision: no torchvision network computes the same as {source.name} at {source.size} px; "
            "use --format timm or safetensors"
        )
    tensors, naming = plain_tensors(source.backbone), torchvision_naming(source.backbone)
    if naming is not None:
        name, arguments = network
        with torch.device("meta"):
            expected = torchvision.models.get_model(name, **arguments).state_dict()
        tensors = naming.to_torchvision(tensors, expected)
    file.write_bytes(_torch_bytes(tensors))


def _torchvision_usage(source: Source, out: Path) -> str:
    network, naming = torchvision_network(source.name, source.size), torchvision_naming(source.backbone)
    assert network is not None, "write raises for other networks"
    name, arguments = network
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    classifier = "fc" if naming is None else re.sub(r"\.(\d+)$", r"[\1]", naming.classifier)
    code = f"""\
import torch
import torchvision

backbone = torchvision.models.{name}({given})
backbone.{classifier} = torch.nn.Identity()
backbone.load_state_dict(torch.load({str(out)!r}, weights_only=True))
backbone.eval()
{feature_code(source)}"""
    return f"Tested with torchvision {torchvision.__version__}:\n\n{fenced('python', code)}"


# detectron2


def _write_detectron2(source: Source, file: Path, suffix: str) -> None:
    _reject_settings(source, "detectron2", (*_LAYER_FIELDS, "stem", "padding"))
    if source.name not in RESNETS:
        raise InputError(f"--format detectron2: detectron2 has no {source.name}; use --format timm or safetensors")
    if source.name in ("resnet18", "resnet34"):
        _reject_settings(source, "detectron2", ("width",))
    tensors = {n: t for n, t in plain_tensors(source.backbone).items() if not n.endswith("num_batches_tracked")}
    content = {
        "model": {detectron2_name(name): tensor.numpy() for name, tensor in tensors.items()},
        "__author__": f"fastbyol {__version__}",
        "matching_heuristics": True,
    }
    file.write_bytes(pickle.dumps(content))


def _detectron2_usage(source: Source, out: Path) -> str:
    tensors = source.backbone.state_dict()
    depth = re.search(r"res(?:net|next)(\d+)", source.name)
    assert depth is not None, "the name is one of RESNETS"
    bottleneck = "layer1.0.conv3.weight" in tensors
    last, grouped = tensors[f"layer1.0.conv{3 if bottleneck else 2}.weight"], tensors["layer1.0.conv2.weight"]
    groups = grouped.shape[0] // grouped.shape[1] if bottleneck else 1
    mean, std = ([round(255 * v, 3) for v in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    lines = [
        "MODEL:",
        f"  WEIGHTS: {json.dumps(str(out), ensure_ascii=False)}",
        f"  PIXEL_MEAN: {mean}  # RGB, for values from 0 to 255",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {depth[1]}",
        "    STRIDE_IN_1X1: False",
        f"    STEM_OUT_CHANNELS: {tensors['conv1.weight'].shape[0]}",
        f"    RES2_OUT_CHANNELS: {last.shape[0]}",
        f"    NUM_GROUPS: {groups}",
        f"    WIDTH_PER_GROUP: {grouped.shape[0] // groups}",
        "INPUT:",
        '  FORMAT: "RGB"  # detectron2 reads BGR by default',
    ]
    note = "The default MODEL.RESNETS.NORM, FrozenBN, keeps these BatchNorm statistics; SyncBN and BN continue to update them."
    return f"In detectron2's configuration:\n\n{fenced('yaml', chr(10).join(lines))}\n\n{note}"


# ONNX


def _write_onnx(source: Source, file: Path, suffix: str) -> None:
    missing = [name for name in environment.ONNX_PACKAGES if not environment.has_module(name)]
    if missing:
        raise InputError(f"--format onnx needs {' and '.join(missing)}: {environment.onnx_command(missing)}")
    if sum(t.nbytes for t in source.backbone.state_dict().values()) > _ONNX_LIMIT_BYTES:
        raise InputError(f"--format onnx: {source.name} exceeds ONNX's limit of 2 GB; use --format safetensors")
    example = torch.zeros(2, 3, source.size, source.size)
    try:
        with warnings.catch_warnings(action="ignore"):  # about the exporter; verified below
            program = torch.onnx.export(
                source.backbone,
                (example,),
                dynamo=True,
                opset_version=_ONNX_OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise InputError(f"--format onnx: {source.name} cannot be exported: {first_line(error)}") from None
    program.save(file, external_data=False)
    _verify_onnx(source, file)


def _verify_onnx(source: Source, file: Path) -> None:
    """Compare onnxruntime's features of three random images with PyTorch's.

    Raises:
        RunError: A feature differs by more than the tolerance.
    """
    import onnxruntime

    images = torch.randn(3, 3, source.size, source.size, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    features = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        expected = source.backbone(images)
    error, limit = (features - expected).abs().max().item(), _ONNX_TOLERANCE * max(1.0, expected.abs().max().item())
    if not error <= limit:
        raise RunError(
            f"--format onnx: onnxruntime's features differ from PyTorch's by {error:.2g}; nothing was written"
        )


def _onnx_usage(source: Source, out: Path) -> str:
    code = f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({str(out)!r}, providers=["CPUExecutionProvider"])
images = np.zeros((1, 3, {source.size}, {source.size}), dtype=np.float32)  # any batch size, preprocessed as below
(features,) = session.run(None, {{"images": images}})
print(features.shape)"""
    return f"Opset {_ONNX_OPSET}, dynamic batch size:\n\n{fenced('python', code)}"


FORMATS: dict[str, Format] = {
    "timm": Format((SUFFIX, ".pth"), _write_timm, _timm_usage),
    "torchvision": Format((".pth",), _write_torchvision, _torchvision_usage),
    "safetensors": Format((SUFFIX,), _write_safetensors, _safetensors_usage),
    "detectron2": Format((".pkl",), _write_detectron2, _detectron2_usage),
    "onnx": Format((".onnx",), _write_onnx, _onnx_usage),
}
