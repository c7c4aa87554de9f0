"""Export a run's backbone for other libraries, with a model card.

The online network is exported without its heads, in float32. The model card is a markdown page next
to the file, whose code loads the file as it is.
"""

import json
import re
from pathlib import Path
from typing import Any

from fastbyol import __version__
from fastbyol.build import build_backbone
from fastbyol.config import Config
from fastbyol.data.crops import CENTER_FRACTION
from fastbyol.errors import InputError, printable
from fastbyol.kernels.augment_params import IMAGENET_MEAN, IMAGENET_STD
from fastbyol.runtime import environment
from fastbyol.runtime.files import check_output, read_json_or
from fastbyol.runtime.logging import logger
from fastbyol.runtime.results import is_metric, read_results
from fastbyol.runtime.run_folder import ENVIRONMENT
from fastbyol.weights.authors import LICENSE, is_authors
from fastbyol.weights.files import BACKBONE_FIELDS, new_file
from fastbyol.weights.formats import FORMATS, Source, fenced, is_of_timm
from fastbyol.weights.load import load_checkpoint_model


def export(run: Path, format_name: str, out: Path | None) -> str:
    """Write the online backbone of a checkpoint and its model card, both or neither.

    Args:
        run: A run's folder, for its newest valid checkpoint, or a checkpoint file.
        format_name: Key of FORMATS.
        out: File to create. The default is NAME-BACKBONE-STEP-FORMAT next to the run's folder, or
            next to a checkpoint file outside a run.

    Returns:
        One line for the log, with the paths of both files.

    Raises:
        InputError: The checkpoint cannot be used, the format cannot store the network, or the file
            exists or cannot be written.
        RunError: The disk is full, or the ONNX file does not compute the same features.
    """
    suffixes = FORMATS[format_name].suffixes
    if out is not None:
        if out.suffix not in suffixes:
            raise InputError(f"--out {out}: for --format {format_name} the name must end in {' or '.join(suffixes)}")
        check_output(out, f"--out {out}")
    source = load_source(run)
    if format_name == "timm" and not is_of_timm(source):
        raise InputError(f"--format timm: {source.name} is not a network of timm; use --format safetensors or onnx")
    out = out or _default_path(source, format_name)
    try:
        str(out.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--out {out}: the path is not valid UTF-8, which other libraries cannot open; choose another --out"
        ) from None
    if format_name == "onnx":
        logger.info("exporting to ONNX and comparing onnxruntime with PyTorch; this can take minutes")
    card = write(source, format_name, out)
    return f"wrote {out} ({source.name} for {format_name}, {out.stat().st_size / 1e6:.1f} MB) and {card}"


def load_source(run: Path) -> Source:
    """Return the online backbone of a run's newest valid checkpoint, or of a checkpoint file.

    Raises:
        InputError: The checkpoint cannot be used.
    """
    checkpoint, config, model, _ = load_checkpoint_model(run)
    backbone, features = build_backbone(config.model, config.data.image_size_px)
    backbone.load_state_dict(model.online.backbone.state_dict())
    return Source(checkpoint=checkpoint, config=config, backbone=backbone.eval(), features=features)


def write(source: Source, format_name: str, out: Path) -> Path:
    """Write the file and its model card, both or neither.

    Returns:
        The path of the card.

    Raises:
        InputError: The format cannot store the network, or a file exists.
        RunError: A file cannot be written, or the ONNX file does not compute the same features.
    """
    card = out.with_suffix(".md")
    with new_file(card, "--out: the model card") as card_file, new_file(out, "--out") as file:
        FORMATS[format_name].write(source, file, out.suffix)
        text = model_card(source, format_name, FORMATS[format_name].usage(source, out.absolute()))
        card_file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return card


def _default_path(source: Source, format_name: str) -> Path:
    in_run = source.checkpoint.parent.name == "checkpoints"
    label = "fastbyol" if format_name == "safetensors" else format_name
    suffix = FORMATS[format_name].suffixes[0]
    name = f"{source.config.name}-{source.name}-{source.checkpoint.stem}-{label}{suffix}"
    return (source.folder.parent if in_run else source.folder) / name


def model_card(source: Source, target: str, usage: str) -> str:
    """Return the text of a model card: usage, preprocessing, training, results, environment.

    Args:
        source: The exported backbone.
        target: What the export is for, such as a key of FORMATS.
        usage: Markdown that shows how to load it.
    """
    trained = read_json_or(source.folder / ENVIRONMENT)
    parts = [
        f"# {_escape(source.config.name)}: {source.name} for {target}",
        f"Online backbone of a BYOL pre-training (Grill et al. 2020) by {_author(source)}, without heads and "
        f"classifier. Input: normalized images (N, 3, {source.size}, {source.size}). Output in eval mode: features "
        f"(N, {source.features}), float32.",
        "## Load",
        usage,
        "## Preprocessing",
        _preprocessing(source.size),
        "## Pre-training",
        _training(source),
        *(
            ()
            if source.is_authors
            else ("All settings:", fenced("json", json.dumps(source.config.to_dict(), indent=2)))
        ),
        "## Results",
        _results(source.folder),
        "## Environment",
        "Training:" if trained else "The run's folder does not record the environment of the training.",
        _table(list(trained.items())) if trained else "",
        "Export:",
        _table(list(environment.describe().items())),
        "## License",
        _license(source),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_escape(key)} | {_escape(value)} |" for key, value in rows)])


def _escape(value: Any) -> str:
    """Return a name or value as literal text in markdown."""
    return re.sub(r"([\\`*<\[|])", r"\\\1", printable(str(value)))


def _preprocessing(size: int) -> str:
    code = f"""\
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


def preprocess(image):  # a PIL image or a uint8 tensor, RGB
    image = F.to_image(image)
    height, width = image.shape[-2:]
    side = int({CENTER_FRACTION} * min(height, width))
    image = F.crop(image, (height - side + 1) // 2, (width - side + 1) // 2, side, side)
    image = F.resize(image, [{size}, {size}], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), {list(IMAGENET_MEAN)}, {list(IMAGENET_STD)})"""
    return (
        "RGB in [0, 1], normalized with ImageNet's mean and standard deviation. For evaluation, a center crop of 224/256 "
        f"of the short side, resized to {size} px:\n\n{fenced('python', code)}"
    )


def _author(source: Source) -> str:
    return f"its authors, converted by fastbyol {__version__}" if source.is_authors else f"fastbyol {__version__}"


def _license(source: Source) -> str:
    if source.is_authors:
        return f"{LICENSE}, if the checkpoint is one of those that BYOL's authors released. Non-commercial use only."
    text = "To be filled in by the publisher of these weights, with respect to the license of the data"
    if is_authors(Path(source.config.init)):
        return (
            f"{text}. The training began with weights of BYOL's authors; those that they released are under {LICENSE}, "
            "for non-commercial use only."
        )
    return f"{text}{'' if source.config.init == 'none' else ' and of the initial weights'}."


def _training(source: Source) -> str:
    config = source.config
    network = [(f"model.{field}", getattr(config.model, field)) for field in BACKBONE_FIELDS]
    if source.is_authors:
        text = "google-deepmind/deepmind-research, byol/; the file does not record the settings of the training"
        return _table([("checkpoint", str(source.checkpoint)), ("trained by", text), *network])
    return _table(
        [
            ("checkpoint", str(source.checkpoint)),
            ("initial weights", config.init),
            *network,
            ("data", f"{config.data.root}, split {config.data.train_split}"),
            ("subset", _subset(config)),
            ("augmentation", config.data.augmentation),
            ("epochs, batch size", f"{config.optim.epochs}, {config.data.batch_size}"),
            ("optimizer, base learning rate", f"{config.optim.name}, {config.optim.base_lr}"),
            ("seed", config.seed),
        ]
    )


def _subset(config: Config) -> str:
    data = config.data
    parts = [
        f"classes {', '.join(data.classes)}" if data.classes else "",
        f"{data.fraction:.4g} of each class" if data.fraction != 1 else "",
        f"{data.images_per_class} images per class" if data.images_per_class else "",
        f"the images listed in {data.file_list}" if data.file_list else "",
    ]
    return "; ".join(part for part in parts if part) or "all images"


def _results(run: Path) -> str:
    """Return one table per evaluation of the run, with its data set and checkpoint."""
    tables = []
    for _, result in read_results(run):
        rows = {name: {k: v for k, v in row.items() if is_metric(v)} for name, row in result["rows"].items()}
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        lines = [f"| features | {' | '.join(map(_escape, metrics))} |", f"|---|{'---|' * len(metrics)}"]
        for name, row in rows.items():
            lines.append(f"| {_escape(name)} | {' | '.join(f'{row[m]:.4g}' if m in row else '' for m in metrics)} |")
        title = f"{result['protocol']} of {result['checkpoint']} on {result['root']}:"
        tables.append(f"{_escape(title)}\n\n" + "\n".join(lines))
    return "\n\n".join(tables) or "None yet. `fastbyol eval knn --run RUN` adds some."
