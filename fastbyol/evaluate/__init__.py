"""What the features of a checkpoint are worth, each time beside the untrained network and, where it can be, raw pixels."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbyol.config import Config, EvalConfig
from fastbyol.errors import InputError, first_line
from fastbyol.evaluate.detection import DETECTION
from fastbyol.evaluate.features import calibrate_batchnorm
from fastbyol.evaluate.fewshot import FEWSHOT
from fastbyol.evaluate.finetune import FINETUNE
from fastbyol.evaluate.knn import KNN
from fastbyol.evaluate.linear import LINEAR
from fastbyol.evaluate.protocol import EvalContext, Protocol, Row
from fastbyol.evaluate.robustness import ROBUSTNESS
from fastbyol.evaluate.segmentation import SEGMENTATION
from fastbyol.layers import one_view
from fastbyol.model import BYOL, build_model
from fastbyol.precision import compute_dtype, set_float32_precision
from fastbyol.runtime import checkpoint, cores, environment
from fastbyol.runtime.files import check_output, read_json_or, write_json, write_output
from fastbyol.step import choose_device

BYOL_ROW, UNTRAINED_ROW, PIXELS_ROW = "BYOL", "untrained network", "raw pixels"
_RESULT = "eval_"
TASKS: dict[str, Protocol] = {
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
        InputError: the checkpoint, its config or the data set cannot be used, or no file can be written at `options.out`.
        RunError: the result could not be written in the end.
    """
    protocol = TASKS[name]
    path, config, model, step = load_checkpoint_model(Path(options.run), say)
    out = Path(options.out) if options.out else _run_folder(path) / _result_name(name, path, step, options, config)
    check_output(out, f"--out {out}")
    if out.is_file() and out.stat().st_size and not _is_result(read_json_or(out, lambda text: None)):
        if options.out:
            raise InputError(
                f"--out {out}: exists and is no result of `fastbyol eval`: it is not overwritten; name another file"
            )
        say(f"warning: {out}: is damaged; it will be replaced")
    frame = eval_context(config, options, say)
    data = protocol.open(options, config, frame)
    for note in (note for split in (data.train, data.val) for note in getattr(split, "notes", ())):
        say(f"warning: {note}")
    rows: dict[str, Row] = {}
    for title, backbone in _networks(protocol, model, config, data, frame, baselines=options.baselines):
        rows[title] = protocol.measure(backbone, data, options, frame)
        say(f"{title:<18} {protocol.row_text(rows[title])}")
    result = {
        "protocol": name,
        "checkpoint": str(path),
        "step": step,
        "root": str(options.root or config.data.root),
        "splits": [options.train_split or config.data.train_split, options.val_split or config.data.val_split],
        "train_images": len(data.train),
        "val_images": len(data.val),
        "classes": len(data.classes),
        "settings": options.settings,
        "rows": rows,
        "bad_images": frame.bad,
        "environment": environment.describe(),
    }
    write_json(out, result, f"--out {out}")
    if protocol.draw is not None:
        write_output(
            out.with_suffix(".png"), protocol.draw(rows), f"--out {out}: its picture {out.with_suffix('.png')}"
        )
    say(f"wrote {out}")
    return result


def _result_name(protocol: str, checkpoint_file: Path, step: int, options: EvalConfig, config: Config) -> str:
    """eval_PROTOCOL_KEY.json: another data set, checkpoint or setting has another key, the same evaluation again the same one."""
    data = config.data
    root = str(Path(options.root or data.root or "").resolve())
    key = [
        checkpoint_file.name,
        step,  # best.pt is not always the same
        root,
        options.train_split or data.train_split,
        options.val_split or data.val_split,
        data.classes,
        options.settings,
        options.baselines,
    ]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{_RESULT}{protocol}_{digest}.json"


def read_results(run: Path, warn: Callable[[str], None]) -> list[tuple[Path, dict[str, Any]]]:
    """What evaluations left in a run's folder, by protocol, data set and checkpoint; `warn` gets a line for each file that is damaged."""
    found = []
    for path in sorted(run.glob(f"{_RESULT}*.json")):
        result = read_json_or(path, warn)
        if not result:
            continue
        if not _is_result(result):
            warn(f"{path}: not a result of `fastbyol eval`; it is left out")
            continue
        found.append((path, result))
    order = list(TASKS)

    def place(item: tuple[Path, dict[str, Any]]) -> tuple[int, str, str]:
        protocol = item[1]["protocol"]
        return order.index(protocol) if protocol in order else len(order), item[1]["root"], item[1]["checkpoint"]

    return sorted(found, key=place)


def _is_result(values: dict[str, Any]) -> bool:
    texts = all(isinstance(values.get(key), str) for key in ("protocol", "checkpoint", "root"))
    counts = {"train_images", "val_images", "classes"} <= values.keys() and isinstance(values.get("settings"), dict)
    rows, splits = values.get("rows"), values.get("splits", [])
    return (
        texts
        and counts
        and isinstance(splits, list)
        and isinstance(rows, dict)
        and all(isinstance(row, dict) for row in rows.values())
    )


def is_metric(value: object) -> bool:
    """Whether a row's value is a number to be shown; compared, since a file may hold integers that no float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def eval_context(config: Config, options: EvalConfig, say: Callable[[str], None]) -> EvalContext:
    """Where and how a run's network is evaluated; float32 is exact or TF32 from here on, as the run had it."""
    cores.respect_quota()
    device = choose_device(options.device)
    set_float32_precision(config.precision)
    return EvalContext(
        size=config.data.image_size_px,
        device=device,
        dtype=compute_dtype(config.precision, device),
        threads=options.threads,
        say=say,
    )


class Loaded(NamedTuple):
    """A checkpoint's file and what it holds."""

    path: Path
    config: Config
    model: BYOL
    step: int  # optimizer steps done


def load_checkpoint_model(run_or_file: Path, say: Callable[[str], None]) -> Loaded:
    """The model of a run's newest good checkpoint or of a checkpoint file, with the config it was trained with.

    Raises:
        InputError: missing, damaged, or of a config or model that this version does not know.
    """
    path, state = checkpoint.resolve(run_or_file, lambda text: say(f"warning: {text}"))
    config = checkpoint.checkpoint_config(path, state)
    try:
        model = build_model(config.model, config.data.image_size_px, config.seed)
        model.load_state_dict(state["model"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"checkpoint {path} cannot be used: {first_line(error)}") from None
    return Loaded(path, config, model, state["step"])


def _networks(
    protocol: Protocol, model: BYOL, config: Config, data: Any, frame: EvalContext, *, baselines: bool
) -> Iterator[tuple[str, nn.Module | None]]:
    """The rows' titles and backbones, on the device, for plain batches of one view; None is raw pixels."""

    def ready(backbone: nn.Module) -> nn.Module:
        return one_view(backbone).to(device=frame.device, memory_format=torch.channels_last)

    yield BYOL_ROW, ready(model.online.backbone)
    if not baselines:
        return
    untrained = ready(build_model(config.model, frame.size, config.seed).online.backbone)
    images = protocol.calibration(data).subsample(config.knn.max_bank_images)
    calibrate_batchnorm(untrained, images, frame)
    yield UNTRAINED_ROW, untrained
    if protocol.takes_pixels:
        yield PIXELS_ROW, None


def _run_folder(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent
