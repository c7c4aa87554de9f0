"""What the features of a checkpoint are worth, each time beside the untrained network and, where it can be, raw pixels."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbyol import checkpoint, environment
from fastbyol.config import Config, EvalConfig
from fastbyol.errors import InputError, first_line
from fastbyol.evaluate.detection import DETECTION
from fastbyol.evaluate.features import calibrate_batchnorm
from fastbyol.evaluate.fewshot import FEWSHOT
from fastbyol.evaluate.finetune import FINETUNE
from fastbyol.evaluate.knn import KNN
from fastbyol.evaluate.linear import LINEAR
from fastbyol.evaluate.protocol import Frame, Protocol, Row
from fastbyol.evaluate.robustness import ROBUSTNESS
from fastbyol.evaluate.segmentation import SEGMENTATION
from fastbyol.layers import one_view
from fastbyol.model import BYOL, build_model
from fastbyol.precision import compute_dtype, set_float32_precision
from fastbyol.runlog import write_json
from fastbyol.step import choose_device

BYOL_ROW, UNTRAINED_ROW, PIXELS_ROW = "BYOL", "untrained network", "raw pixels"
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (KNN, LINEAR, FINETUNE, FEWSHOT, ROBUSTNESS, SEGMENTATION, DETECTION)
}


def evaluate(name: str, options: EvalConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a protocol on a checkpoint and writes the result beside it.

    Args:
        name: of the protocol, a key of PROTOCOLS.
        options: the protocol's own class of config.py.
        say: gets one line per row and per warning.

    Returns:
        what is written as JSON: protocol, checkpoint, facts of the data, settings, environment, and one row per kind of features.

    Raises:
        InputError: the checkpoint, its config or the data set cannot be used.
    """
    protocol = PROTOCOLS[name]
    path, config, model = load_run(Path(options.run), say)
    out = Path(options.out) if options.out else _run_folder(path) / f"eval_{name}.json"
    if not out.parent.is_dir():  # said before the work is done
        raise InputError(f"out={out}: cannot be written: there is no folder {out.parent}")
    frame = frame_of(config, options, say)
    data = protocol.open(options, config)
    for note in (note for split in (data.train, data.val) for note in getattr(split, "notes", ())):
        say(f"warning: {note}")
    rows: dict[str, Row] = {}
    for title, backbone in _networks(protocol, model, config, data, frame, baselines=options.baselines):
        rows[title] = protocol.measure(backbone, data, options, frame)
        say(f"{title:<18} {protocol.row_text(rows[title])}")
    for where, reason in frame.bad.items():
        say(f"warning: skipped {where}: {reason}")
    result = {
        "protocol": name,
        "checkpoint": str(path),
        "root": str(options.root or config.data.root),
        "train_images": len(data.train),
        "val_images": len(data.val),
        "classes": len(data.classes),
        "settings": options.settings,
        "rows": rows,
        "environment": environment.describe(),
    }
    write_json(out, result, f"out={out}")
    if protocol.draw is not None:
        try:
            out.with_suffix(".png").write_bytes(protocol.draw(rows))
        except OSError as error:
            raise InputError(f"out={out}: cannot be written: {error.strerror}") from None
    return result


def frame_of(config: Config, options: EvalConfig, say: Callable[[str], None]) -> Frame:
    """Where and how a run's network is evaluated; float32 is exact or TF32 from here on, as the run had it."""
    device = choose_device(options.device)
    set_float32_precision(config.precision)
    return Frame(
        size=config.data.image_size_px,
        device=device,
        dtype=compute_dtype(config.precision, device),
        threads=options.threads,
        say=say,
    )


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


def _networks(
    protocol: Protocol, model: BYOL, config: Config, data: Any, frame: Frame, *, baselines: bool
) -> Iterator[tuple[str, nn.Module | None]]:
    """The rows' titles and backbones, on the device, for plain batches of one view; None is raw pixels."""

    def ready(backbone: nn.Module) -> nn.Module:
        return one_view(backbone).to(device=frame.device, memory_format=torch.channels_last)

    yield BYOL_ROW, ready(model.online.backbone)
    if not baselines:
        return
    untrained = ready(build_model(config.model, frame.size, config.seed).online.backbone)
    images = protocol.calibration(data).spread(config.knn.max_bank_images)
    calibrate_batchnorm(untrained, images, size=frame.size, device=frame.device, threads=frame.threads)
    yield UNTRAINED_ROW, untrained
    if protocol.takes_pixels:
        yield PIXELS_ROW, None


def _run_folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
