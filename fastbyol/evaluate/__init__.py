"""What the features of a checkpoint are worth, each time beside the untrained network and raw pixels."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbyol import checkpoint, environment
from fastbyol.config import Config, EvalConfig
from fastbyol.data import find_images
from fastbyol.errors import InputError, first_line
from fastbyol.evaluate.features import Features, calibrate_batchnorm, check_splits, extract
from fastbyol.evaluate.knn import knn_accuracy
from fastbyol.evaluate.linear import linear_accuracy
from fastbyol.model import BYOL, build_model
from fastbyol.precision import compute_dtype
from fastbyol.step import choose_device

BYOL_ROW, UNTRAINED_ROW, PIXELS_ROW = "BYOL", "untrained network", "raw pixels"


def evaluate(protocol: str, options: EvalConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs `knn` or `linear` on a checkpoint and writes the result beside it.

    Args:
        protocol: "knn" or "linear".
        options: the checkpoint and the data set, see EvalConfig.
        say: gets one line per row and per warning.

    Returns:
        what is written as JSON: protocol, checkpoint, data set, counts, environment, and one row per kind of features.

    Raises:
        InputError: the checkpoint, its config or the data set cannot be used.
    """
    path, config, model = load_run(Path(options.run), say)
    root = options.root or config.data.root
    # The run's classes, but every image of them: what was left out of pre-training is not left out of its evaluation.
    whole = replace(config.data, fraction=1.0, images_per_class=0, file_list=None)
    train = find_images(whole, "train", root=root, key="root")
    val = find_images(whole, "val", root=root, key="root")
    check_splits(train, val)
    device = choose_device(options.device)
    dtype = compute_dtype(config.precision, device)
    size = config.data.image_size_px
    networks: dict[str, nn.Module | None] = {BYOL_ROW: model.online.backbone}
    if options.baselines:
        networks[UNTRAINED_ROW] = build_model(config.model, size, config.seed).online.backbone
        networks[PIXELS_ROW] = None
    rows: dict[str, dict[str, float]] = {}
    for name, backbone in networks.items():
        if backbone is not None:
            backbone = backbone.to(device=device, memory_format=torch.channels_last)
        if name == UNTRAINED_ROW:
            assert backbone is not None
            bank = train.spread(config.knn.max_bank_images)
            calibrate_batchnorm(backbone, bank, size=size, device=device, threads=options.threads)
        features = [
            extract(backbone, split, size=size, device=device, dtype=dtype, threads=options.threads)
            for split in (train, val)
        ]
        for split, extracted in zip((train, val), features, strict=True):
            for index, reason in extracted.bad.items() if name == BYOL_ROW else ():
                say(f"warning: skipped {split.where(index)}: {reason}")
        rows[name] = _classify(protocol, *features, options)
        say(_row_text(name, rows[name]))
    result = {
        "protocol": protocol,
        "checkpoint": str(path),
        "root": str(root),
        "train_images": len(train),
        "val_images": len(val),
        "classes": len(train.classes),
        "settings": _settings(protocol, options),
        "rows": rows,
        "environment": environment.describe(),
    }
    out = Path(options.out) if options.out else _run_folder(path) / f"eval_{protocol}.json"
    try:
        out.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"out={out}: cannot be written: {error.strerror}") from None
    return result


def load_run(run_or_file: Path, say: Callable[[str], None]) -> tuple[Path, Config, BYOL]:
    """The model of a run's newest good checkpoint or of a checkpoint file, with the config it was trained with.

    Raises:
        InputError: missing, damaged, or of a config or model that this version does not know.
    """
    path, state = checkpoint.resolve(run_or_file, lambda text: say(f"warning: {text}"))
    try:
        config = Config.from_dict(state["config"])
        model = build_model(config.model, config.data.image_size_px, config.seed)
        model.load_state_dict(state["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} cannot be used: {first_line(error)}") from None
    return path, config, model


def _classify(protocol: str, train: Features, val: Features, options: EvalConfig) -> dict[str, float]:
    if protocol == "knn":
        return knn_accuracy(train, val, k=options.k, temperature=options.temperature)
    return linear_accuracy(train, val, base_lrs=options.base_lrs, epochs=options.epochs, batch_size=options.batch_size)


def _settings(protocol: str, options: EvalConfig) -> dict[str, Any]:
    keys = ("k", "temperature") if protocol == "knn" else ("base_lrs", "epochs", "batch_size")
    values = {key: getattr(options, key) for key in keys}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _row_text(name: str, row: dict[str, float]) -> str:
    extra = f"  (base lr {row['base_lr']:g})" if "base_lr" in row else ""
    return f"{name:<18} top-1 {row['top1']:6.1%}  top-5 {row['top5']:6.1%}{extra}"


def _run_folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
