"""A run's backbone for other libraries: timm, torchvision, detectron2, ONNX, and fastbyol's own .safetensors.

What is exported is the online network without its heads, in float32. Each file comes with a model card beside it, whose code
loads the file as it is.
"""

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

import torch
import torchvision
from torch import nn

from fastbyol import __version__
from fastbyol.config import Config, ModelConfig
from fastbyol.data.native import CENTER_FRACTION
from fastbyol.errors import InputError, RunError, first_line, printable
from fastbyol.kernels.augment import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.model import build_backbone
from fastbyol.runtime import environment
from fastbyol.runtime.files import check_output, read_json_or
from fastbyol.runtime.results import is_metric, read_results
from fastbyol.train import ENVIRONMENT
from fastbyol.weights.checkpoints import load_checkpoint_model
from fastbyol.weights.load import (
    BACKBONE_FIELDS,
    DETECTRON2,
    SAME_NAMES,
    SUFFIX,
    TORCHVISION,
    Tensors,
    new_file,
    plain_tensors,
    write_safetensors,
)

RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
"""timm's names of the ResNets that torchvision and detectron2 have too."""
_SHARED = (
    *RESNETS,
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    *(f"convnext_{size}" for size in ("tiny", "small", "base", "large")),
)
_VITS = {
    "vit_base_patch16": "vit_b_16",
    "vit_base_patch32": "vit_b_32",
    "vit_large_patch16": "vit_l_16",
    "vit_large_patch32": "vit_l_32",
    "vit_huge_patch14": "vit_h_14",
}
_CLASSIFIERS = {"vgg": "classifier[6]", "vit": "heads", "convnext": "classifier[2]"}  # torchvision's; ResNets have fc

_LAYERS = ("norm", "weight_standardization")  # of ModelConfig: layers that other libraries' networks have not

_ONNX_OPSET = 18
_ONNX_TOLERANCE = 1e-4  # of the largest feature
_ONNX_LIMIT_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported."""

    checkpoint: Path
    config: Config
    backbone: nn.Module  # plain, on the CPU, in eval mode: (N, 3, S, S) -> (N, F)
    features: int  # F

    @property
    def name(self) -> str:
        """The backbone's name in timm, without a tag of weights."""
        return self.config.model.backbone.split(".")[0]

    @property
    def size(self) -> int:
        """S."""
        return self.config.data.image_size_px

    @property
    def folder(self) -> Path:
        """The run's."""
        inside = self.checkpoint.absolute().parent
        return inside.parent if inside.name == "checkpoints" else inside


class Format(NamedTuple):
    """One way to write a backbone."""

    suffixes: tuple[str, ...]  # the first is the default
    write: Callable[[Source, Path, str], None]  # (source, temporary path, suffix); InputError where it cannot be
    code: Callable[[Source, Path], str]  # (source, final path, absolute) -> the model card's section "Load"


def export(run: Path, form: str, out: Path | None, say: Callable[[str], None]) -> str:
    """Writes a checkpoint's online backbone and a model card, both or neither.

    Args:
        run: a run's folder (its newest good checkpoint is taken) or a checkpoint file.
        form: a key of FORMATS.
        out: the file; by default RUN-BACKBONE-STEP-FORMAT beside the run's folder, or beside a checkpoint that lies alone.
        say: gets a line for each newer checkpoint that is damaged.

    Returns:
        one line that says what was written.

    Raises:
        InputError: the checkpoint cannot be used, the format has no such network, or the file exists or cannot be written.
        RunError: the ONNX file does not compute what the network does.
    """
    suffixes = FORMATS[form].suffixes
    if out is not None:
        if out.suffix not in suffixes:
            raise InputError(f"--out {out}: for --format {form} the name must end in {' or '.join(suffixes)}")
        check_output(out, f"--out {out}")
    checkpoint, config, model, _ = load_checkpoint_model(run)
    backbone, features = build_backbone(config.model, config.data.image_size_px)
    backbone.load_state_dict(model.online.backbone.state_dict())
    source = Source(checkpoint=checkpoint, config=config, backbone=backbone.eval(), features=features)
    out = out or _default_name(source, form)
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--out {out}: its path is not UTF-8, so other libraries cannot open it; give another --out"
        ) from None
    if form == "onnx":
        say("tracing the network, and comparing onnxruntime's features with torch's: up to some minutes")
    card = write(source, form, out, lambda text: say(f"warning: {text}"))
    return f"{out}: {source.name} for {form}, {out.stat().st_size / 1e6:.1f} MB; how to load it: {card}"


def write(source: Source, form: str, out: Path, warn: Callable[[str], None]) -> Path:
    """Writes the file and its model card, both or neither; returns the card's path. Raises what `export` raises."""
    card = out.with_suffix(".md")
    with new_file(card, "--out: the model card") as card_file, new_file(out, "--out") as file:
        FORMATS[form].write(source, file, out.suffix)
        text = model_card(source, form, out.absolute(), warn)
        card_file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return card


def _default_name(source: Source, form: str) -> Path:
    inside = source.checkpoint.parent.name == "checkpoints"
    label = "fastbyol" if form == "safetensors" else form
    name = f"{source.config.name}-{source.name}-{source.checkpoint.stem}-{label}{FORMATS[form].suffixes[0]}"
    return (source.folder.parent if inside else source.folder) / name


def _refuse_variants(source: Source, form: str, fields: tuple[str, ...]) -> None:
    """One line for the first of the settings that is not the default, which `form` cannot express."""
    config, plain = source.config.model, ModelConfig()
    for field in fields:
        if (value := getattr(config, field)) != getattr(plain, field):
            others = "safetensors or onnx" if field in _LAYERS else "timm, safetensors or onnx"
            raise InputError(
                f"--format {form}: {form} has no {source.name} with model.{field}={value}; use --format {others}"
            )


def _write_timm(source: Source, file: Path, suffix: str) -> None:
    _refuse_variants(source, "timm", _LAYERS)
    if suffix == SUFFIX:
        _write_safetensors(source, file, suffix)
    else:
        _write_torch(plain_tensors(source.backbone), file)


def _write_safetensors(source: Source, file: Path, suffix: str) -> None:
    write_safetensors(file, plain_tensors(source.backbone), source.config.model, source.size)


def _write_torch(tensors: Tensors, file: Path) -> None:
    buffer = io.BytesIO()  # torch's writer hides a full disk in a RuntimeError
    torch.save(tensors, buffer)
    file.write_bytes(buffer.getbuffer())


def torchvision_network(name: str, size: int) -> tuple[str, dict[str, int]] | None:
    """torchvision's name of a timm backbone and the arguments that it needs; None if it has no such network."""
    if name in _SHARED:
        return name, {}
    family, _, side = name.rpartition("_")
    if family in _VITS and side.isdigit():
        return _VITS[family], {} if size == 224 else {"image_size": size}
    return None


def _write_torchvision(source: Source, file: Path, suffix: str) -> None:
    _refuse_variants(source, "torchvision", (*_LAYERS, "width", "stem"))
    found = torchvision_network(source.name, source.size)
    if found is None:
        raise InputError(
            f"--format torchvision: torchvision has no {source.name}, or calls it otherwise; use --format timm or safetensors"
        )
    if (
        source.name.startswith("vgg") and source.size >= 256
    ):  # the last map is 8x8: one pools it, the other slides over it
        raise InputError(
            f"--format torchvision: at data.image_size_px={source.size} torchvision's {source.name} pools where timm's "
            "convolves, so features would differ; use --format timm"
        )
    naming = next((n for kind, n in TORCHVISION.items() if isinstance(source.backbone, kind)), SAME_NAMES)
    _write_torch(naming.to_other(plain_tensors(source.backbone)), file)


def _write_detectron2(source: Source, file: Path, suffix: str) -> None:
    _refuse_variants(source, "detectron2", (*_LAYERS, "stem"))
    if source.name not in RESNETS:
        raise InputError(f"--format detectron2: its ResNets only, not {source.name}; use --format timm or safetensors")
    if source.name in ("resnet18", "resnet34"):
        _refuse_variants(source, "detectron2", ("width",))
    tensors = {n: t for n, t in plain_tensors(source.backbone).items() if not n.endswith("num_batches_tracked")}
    content = {
        "model": {name: tensor.numpy() for name, tensor in DETECTRON2.to_other(tensors).items()},
        "__author__": f"fastbyol {__version__}",
        "matching_heuristics": True,
    }
    file.write_bytes(pickle.dumps(content))


def _write_onnx(source: Source, file: Path, suffix: str) -> None:
    missing = [name for name in environment.ONNX_PACKAGES if not environment.has_module(name)]
    if missing:
        raise InputError(f"--format onnx needs {' and '.join(missing)}: {environment.onnx_command(missing)}")
    if sum(t.nbytes for t in source.backbone.state_dict().values()) > _ONNX_LIMIT_BYTES:
        raise InputError(f"--format onnx: {source.name} is larger than an ONNX file can be (2 GB); use safetensors")
    example = torch.zeros(2, 3, source.size, source.size)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the exporter's own parts; the result is compared below
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
        raise InputError(f"--format onnx: {source.name} cannot be expressed: {first_line(error)}") from None
    program.save(file, external_data=False)
    _compare_onnx(source, file)


def _compare_onnx(source: Source, file: Path) -> None:
    """Three images through onnxruntime and through torch.

    Raises:
        RunError: a feature differs by more than the tolerance.
    """
    import onnxruntime

    images = torch.randn(3, 3, source.size, source.size, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    features = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        wanted = source.backbone(images)
    error, limit = (features - wanted).abs().max().item(), _ONNX_TOLERANCE * max(1.0, wanted.abs().max().item())
    if not error <= limit:
        raise RunError(f"--format onnx: onnxruntime's features differ from torch's by {error:.2g}; nothing was written")


def model_card(source: Source, form: str, out: Path, warn: Callable[[str], None]) -> str:
    """The text beside an exported file (markdown): loading, preprocessing, training, results, environment."""
    config, run = source.config, source.folder
    trained = read_json_or(run / ENVIRONMENT, warn)
    parts = [
        f"# {_cell(config.name)}: {source.name} for {form}",
        f"The online backbone of a BYOL pre-training (Grill et al. 2020) by fastbyol {__version__}, without heads and "
        f"classifier. It takes normalized images (N, 3, {source.size}, {source.size}) and gives features "
        f"(N, {source.features}), float32, in eval mode.",
        "## Load",
        FORMATS[form].code(source, out),
        "## Preprocessing",
        _preprocessing(source),
        "## Pre-training",
        _table(
            [
                ("checkpoint", str(source.checkpoint)),
                *((f"model.{field}", getattr(config.model, field)) for field in BACKBONE_FIELDS),
                ("data", f"{config.data.root}, split {config.data.train_split}"),
                ("part of it", _part(config)),
                ("augmentation of the views", config.data.augmentation),
                ("epochs, batch size", f"{config.optim.epochs}, {config.data.batch_size}"),
                ("optimizer, base learning rate", f"{config.optim.name}, {config.optim.base_lr}"),
                ("seed", config.seed),
            ]
        ),
        "All settings:",
        _fenced("json", json.dumps(config.to_dict(), indent=2)),
        "## Results",
        _results(run, warn),
        "## Environment",
        "Of the training:" if trained else "The run's folder does not say where it was trained.",
        _table(list(trained.items())) if trained else "",
        "Of this export:",
        _table(list(environment.describe().items())),
        "## License",
        "To be filled in by whoever publishes these weights; mind the license of the data.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fenced(language: str, text: str) -> str:
    """Code in a fence longer than any that the code, in a path, holds itself."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows)])


def _cell(value: Any) -> str:
    """A name or value as markdown: what has a meaning in it is escaped."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", printable(str(value)))


def _part(config: Config) -> str:
    data = config.data
    parts = [
        f"classes {', '.join(data.classes)}" if data.classes else "",
        f"{data.fraction:.4g} of each class" if data.fraction != 1 else "",
        f"{data.images_per_class} images of each class" if data.images_per_class else "",
        f"the images of {data.file_list}" if data.file_list else "",
    ]
    return "; ".join(part for part in parts if part) or "all images"


def _results(run: Path, warn: Callable[[str], None]) -> str:
    """A table for each evaluation of the run: metrics as they were written, each with its data set and checkpoint."""
    tables = []
    for _, result in read_results(run):
        rows = {name: {k: v for k, v in row.items() if is_metric(v)} for name, row in result["rows"].items()}
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        lines = [f"| features | {' | '.join(map(_cell, metrics))} |", f"|---|{'---|' * len(metrics)}"]
        for name, row in rows.items():
            lines.append(f"| {_cell(name)} | {' | '.join(f'{row[m]:.4g}' if m in row else '' for m in metrics)} |")
        title = f"{result['protocol']}, of {result['checkpoint']} on {result['root']}:"
        tables.append(f"{_cell(title)}\n\n" + "\n".join(lines))
    return "\n\n".join(tables) or "None yet: `fastbyol eval knn --run RUN` makes some."


def _preprocessing(source: Source) -> str:
    size = source.size
    code = f"""\
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def preprocess(image):  # a PIL image or a uint8 tensor, RGB
    image = F.to_image(image)
    image = F.center_crop(image, [round({CENTER_FRACTION} * min(image.shape[-2:]))])
    image = F.resize(image, [{size}, {size}], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), {list(IMAGENET_MEAN)}, {list(IMAGENET_STD)})"""
    return (
        "RGB in [0, 1], ImageNet's mean and standard deviation; in evaluation the center square of 224/256 of the short "
        f"side, resized to {size} px:\n\n{_fenced('python', code)}"
    )


def _features_code(source: Source) -> str:
    """The last lines of a card's code on `backbone`."""
    return f"""\
images = torch.zeros(1, 3, {source.size}, {source.size})  # any number of them, preprocessed as below
with torch.no_grad():
    features = backbone(images)
print(features.shape)"""


def _timm_code(source: Source, out: Path) -> str:
    model = source.config.model
    channels = ""
    if model.width != 1:
        channels = f", channels={tuple(int(64 * model.width * 2**k) for k in range(4))}"
    if model.stem != "small":
        code = f"""\
import timm
import torch

backbone = timm.create_model("{source.name}", num_classes=0{channels}, checkpoint_path={str(out)!r}).eval()
{_features_code(source)}"""
        return _fenced("python", code)
    read = "load_file(path)" if out.suffix == SUFFIX else "torch.load(path, weights_only=True)"
    library = "\nfrom safetensors.torch import load_file" if out.suffix == SUFFIX else ""
    code = f"""\
import timm
import torch{library}

path = {str(out)!r}
backbone = timm.create_model("{source.name}", num_classes=0{channels})
backbone.conv1 = torch.nn.Conv2d(3, {source.backbone.conv1.out_channels}, 3, padding=1, bias=False)  # the stem for small images
backbone.maxpool = torch.nn.Identity()
backbone.load_state_dict({read})
backbone.eval()
{_features_code(source)}"""
    return _fenced("python", code)


def _safetensors_code(source: Source, out: Path) -> str:
    code = f"""\
import torch
from fastbyol.weights.load import open_backbone

backbone = open_backbone({str(out)!r})
{_features_code(source)}"""
    init = _fenced("sh", f"fastbyol train --init {shlex.quote(str(out))}")
    text = (
        f"With fastbyol:\n\n{_fenced('python', code)}\n\nAs the start of another run, beside its own options:\n\n{init}"
    )
    plain = ModelConfig()
    if all(getattr(source.config.model, field) == getattr(plain, field) for field in _LAYERS):
        text += f"\n\nWithout fastbyol, since the tensors have timm's names:\n\n{_timm_code(source, out)}"
    return text


def _torchvision_code(source: Source, out: Path) -> str:
    found = torchvision_network(source.name, source.size)
    assert found is not None, "the weights were written"
    name, arguments = found
    given = ", ".join(f"{key}={value}" for key, value in arguments.items())
    classifier = next((place for start, place in _CLASSIFIERS.items() if name.startswith(start)), "fc")
    code = f"""\
import torch
import torchvision

backbone = torchvision.models.{name}({given})
backbone.{classifier} = torch.nn.Identity()
backbone.load_state_dict(torch.load({str(out)!r}, weights_only=True))
backbone.eval()
{_features_code(source)}"""
    return f"Tested with torchvision {torchvision.__version__}:\n\n{_fenced('python', code)}"


def _detectron2_code(source: Source, out: Path) -> str:
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
        f"  PIXEL_MEAN: {mean}  # RGB, of values from 0 to 255",
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
    note = "MODEL.RESNETS.NORM is FrozenBN by default and takes these statistics; SyncBN or BN trains them on."
    return f"In detectron2's configuration:\n\n{_fenced('yaml', chr(10).join(lines))}\n\n{note}"


def _onnx_code(source: Source, out: Path) -> str:
    code = f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession({str(out)!r}, providers=["CPUExecutionProvider"])
images = np.zeros((1, 3, {source.size}, {source.size}), dtype=np.float32)  # any number of them, preprocessed as below
(features,) = session.run(None, {{"images": images}})
print(features.shape)"""
    return f"Opset {_ONNX_OPSET}, batch axis dynamic:\n\n{_fenced('python', code)}"


FORMATS: dict[str, Format] = {
    "timm": Format((SUFFIX, ".pth"), _write_timm, _timm_code),
    "torchvision": Format((".pth",), _write_torchvision, _torchvision_code),
    "safetensors": Format((SUFFIX,), _write_safetensors, _safetensors_code),
    "detectron2": Format((".pkl",), _write_detectron2, _detectron2_code),
    "onnx": Format((".onnx",), _write_onnx, _onnx_code),
}
