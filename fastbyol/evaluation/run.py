"""Run an evaluation task on a checkpoint and write its result."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from fastbyol import __version__
from fastbyol.build import build_model
from fastbyol.config import Config, DistributedConfig
from fastbyol.data import Sources
from fastbyol.data.backends import choose_decoder
from fastbyol.data.storage import is_url
from fastbyol.errors import InputError
from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.detection import DETECTION
from fastbyol.evaluation.features import RAW_PIXELS_SIDES, RawPixels, calibrate_batchnorm, raw_pixels_side
from fastbyol.evaluation.fewshot import FEWSHOT
from fastbyol.evaluation.finetune import FINETUNE
from fastbyol.evaluation.knn import KNN
from fastbyol.evaluation.linear import LINEAR
from fastbyol.evaluation.options import EmbedConfig, EvalConfig
from fastbyol.evaluation.partial import SUFFIX, PartialResult
from fastbyol.evaluation.robustness import ROBUSTNESS
from fastbyol.evaluation.segmentation import SEGMENTATION
from fastbyol.evaluation.task import EvalTask
from fastbyol.layers import set_num_views
from fastbyol.model import BYOL
from fastbyol.precision import compute_dtype, set_float32_precision
from fastbyol.runtime import cores, environment
from fastbyol.runtime.checkpoint import run_folder_of
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.distributed import ProcessGroup, World, world_from_environment
from fastbyol.runtime.files import check_output, read_json_or, write_json, write_output
from fastbyol.runtime.logging import logger, muted
from fastbyol.runtime.memory import free_bytes
from fastbyol.runtime.results import BYOL_ROW, PIXELS_ROW, PREFIX, UNTRAINED_ROW, is_result
from fastbyol.runtime.signals import sigterm_raises
from fastbyol.weights.load import load_checkpoint_model

_TIMEOUT_S = 7 * 86400.0  # ranks meet once per pass over a split, and torchrun notices one that dies
TASKS: dict[str, EvalTask] = {
    task.name: task for task in (KNN, LINEAR, FINETUNE, FEWSHOT, ROBUSTNESS, SEGMENTATION, DETECTION)
}


def evaluate(name: str, options: EvalConfig, sources: Sources = Sources()) -> dict[str, Any]:  # noqa: B008
    """Run a task on a checkpoint and write the result as JSON. Logs one line per row.

    Args:
        name: key of TASKS.
        options: the task's class of options.py.
        sources: both splits, instead of those of the options and of the run.

    Returns:
        The contents of the JSON file: task (as "protocol"), checkpoint, data set, settings,
        environment, and one row each for the checkpoint, the untrained network and, if the task
        supports them, raw pixels.

    Raises:
        InputError: the checkpoint or data set cannot be used, or `options.out` cannot be written.
        RunError: writing the result failed.
    """
    with evaluation_ranks(options.device, remedy="start the evaluation again") as world:
        return _evaluate(TASKS[name], options, world, sources)


@contextmanager
def evaluation_ranks(device: str, *, remedy: str) -> Iterator[World]:
    """Context manager: the process group of a command that may run under torchrun.

    Args:
        device: as in EvalConfig.
        remedy: what to do if a rank fails.
    """
    cores.respect_quota()
    world = world_from_environment()
    group = ProcessGroup(
        world, DistributedConfig(timeout_s=_TIMEOUT_S), choose_device(device, world.local_rank), remedy=remedy
    )
    ended = sigterm_raises(f"received SIGTERM: another rank failed, or the job was stopped; {remedy}")
    with group, muted(not world.is_main_process), ended if world.size > 1 else nullcontext():
        yield world


def _evaluate(task: EvalTask, options: EvalConfig, world: World, sources: Sources) -> dict[str, Any]:
    """As `evaluate`, in the process group."""
    with world.sync_errors():
        path, config, model, step = load_checkpoint_model(Path(options.run))
        name = _result_name(task.name, path, step, options, config, sources)
        out = Path(options.out) if options.out else run_folder_of(path) / name
        if world.is_main_process:
            _check_result_file(out, named=options.out is not None)
    context = replace(eval_context(config, options, world), sources=sources)
    if not task.uses_loader:
        context = replace(context, decoder="native")
    data = task.open(options, config, context)
    partial = PartialResult(_partial_file(out), _partial_key(task, name, path, data, context), world)
    partial.open()
    context = replace(context, partial=partial, bad=partial.bad)
    for note in (note for split in (data.train, data.val) for note in getattr(split, "notes", ())):
        logger.warning(note)
    features, pixels = [model.num_features], None
    if options.baselines and task.uses_pixels:
        pixels = RawPixels(raw_pixels_side(len(data.train)))
        features.append(pixels.features(context.size))
    _check_memory(task, features, data, options, context)
    rows: dict[str, Row] = {}
    for title, network in _networks(task, model, config, data, context, pixels, baselines=options.baselines):
        is_finished = title in partial.rows
        rows[title] = partial.rows[title] if is_finished else task.measure(network(), data, options, context)
        logger.info(f"{title:<18} {task.format_row(rows[title])}{' (finished before)' if is_finished else ''}")
        if not is_finished:
            partial.finish_row(title, rows[title], context.images_per_s())
    result = {
        "protocol": task.name,
        "checkpoint": str(path),
        "step": step,
        "root": str(data.train.root if sources.train is not None else options.root or config.data.root),
        "splits": [options.train_split or config.data.train_split, options.val_split or config.data.val_split],
        "train_images": len(data.train),
        "val_images": len(data.val),
        "classes": len(data.classes),
        "settings": options.settings,
        "rows": rows,
        "bad_images": context.bad,
        "ranks": world.size,
        "decoder": context.decoder,
        "feature_images_per_s": partial.rates,
        "environment": environment.describe(),
    }
    if world.is_main_process:
        write_json(out, result, f"--out {out}")
        if task.has_figure:
            picture = out.with_suffix(".png")
            write_output(picture, _to_png(task.draw(rows)), f"--out {out}: figure {picture}")
        logger.info(f"wrote {out}")
    partial.remove()
    return result


def _partial_file(out: Path) -> Path | None:
    """Return the file of the partial result; None if the result is not a regular file.

    It lies beside the target of a link, in the folder that the result is written to.
    """
    return None if out.exists() and not out.is_file() else Path(os.path.realpath(out) + SUFFIX)


def _partial_key(task: EvalTask, name: str, checkpoint_file: Path, data: Any, context: EvalContext) -> str:
    """Return what identifies an evaluation: all that its rows depend on.

    Every rank must call this.
    """
    stat = checkpoint_file.stat()
    file = [str(checkpoint_file.resolve()), stat.st_size, stat.st_mtime_ns]
    how = [__version__, str(context.dtype), context.decoder]
    # The ranks read different caches and meet different errors: rank 0 identifies the images.
    images = context.world.gather(task.identity(data) if context.world.is_main_process else None)[0]
    return json.dumps([name, how, file, len(data.train), len(data.val), data.classes, images])


def _check_memory(task: EvalTask, features: list[int], data: Any, options: EvalConfig, context: EvalContext) -> None:
    """Check, before any work is done, that the features fit the device.

    Args:
        features: numbers of features of the rows to come.

    Raises:
        InputError: they do not.
    """
    world, device = context.world, context.device
    most = max(features)
    needed = task.memory(data, most, options, world)
    ranks = world.local_size if device.type == "cpu" else 1  # the ranks of a machine share its memory
    free = free_bytes(device)
    if needed * ranks > free:
        what = "raw pixels: leave them out with --baselines false" if most > features[0] else "features"
        raise InputError(
            f"{task.name}: {needed * ranks / 1e9:.1f} GB are needed for {most} values of each of {len(data.train)} training "
            f"and {len(data.val)} validation images ({what}), but {free / 1e9:.1f} GB are free; "
            "GPUs started with torchrun share the features"
        )


def _check_result_file(out: Path, *, named: bool) -> None:
    """Check, before any work is done, that the result can be written.

    Args:
        named: True if the user named the file; one that is not a result is then not overwritten.
    """
    check_output(out, f"--out {out}")
    if out.is_file() and out.stat().st_size and not is_result(read_json_or(out, lambda text: None)):
        if named:
            raise InputError(f"--out {out}: exists and is not a result of `fastbyol eval`; name another file")
        logger.warning(f"{out}: damaged; it will be replaced")


def _result_name(
    name: str, checkpoint_file: Path, step: int, options: EvalConfig, config: Config, sources: Sources
) -> str:
    """eval_TASK_KEY.json: KEY is a hash of the data set, the checkpoint and the settings."""
    data = config.data
    root = options.root or data.root or ""
    root = root if is_url(root) else str(Path(root).resolve())
    key = [
        checkpoint_file.name,
        step,  # best.pt changes during a run
        root,
        options.train_split or data.train_split,
        options.val_split or data.val_split,
        data.classes,
        options.settings,
        options.baselines,
        *(source.fingerprint() for source in sources if source is not None),
    ]
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{PREFIX}{name}_{digest}.json"


def eval_context(config: Config, options: EvalConfig | EmbedConfig, world: World | None = None) -> EvalContext:
    """Return the context for a run's network. Also sets torch's float32 precision to the run's."""
    world = world or World()
    device = choose_device(options.device, world.local_rank)
    set_float32_precision(config.precision)
    return EvalContext(
        size=config.data.image_size_px,
        device=device,
        dtype=compute_dtype(config.precision, device),
        threads=options.threads,
        decoder=choose_decoder(config.data, device),
        compiles=device.type == "cuda" and config.step.mode != "eager",
        world=world,
    )


def _networks(
    task: EvalTask,
    model: BYOL,
    config: Config,
    data: Any,
    context: EvalContext,
    pixels: RawPixels | None,
    *,
    baselines: bool,
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield row titles, and functions that return the backbones, on the device."""

    def prepare(backbone: nn.Module) -> nn.Module:
        return set_num_views(backbone, 1).to(device=context.device, memory_format=torch.channels_last)

    def untrained() -> nn.Module:
        network = prepare(build_model(config.model, context.size, config.seed).online.backbone)
        calibrate_batchnorm(network, task.calibration_images(data).subsample(config.knn.max_bank_images), context)
        return network

    yield BYOL_ROW, lambda: prepare(model.online.backbone)
    if not baselines:
        return
    yield UNTRAINED_ROW, untrained
    if pixels is not None:
        reduced = pixels.side < min(RAW_PIXELS_SIDES[0], context.size)
        yield f"{PIXELS_ROW}, {pixels.side} px" if reduced else PIXELS_ROW, lambda: pixels


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
