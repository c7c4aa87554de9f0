"""The run: loader -> step -> log -> evaluate -> checkpoint."""

import json
import math
import signal
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch

from fastbyol import checkpoint, environment
from fastbyol.config import Config
from fastbyol.data import ImageFolder, build_loader, index_folder
from fastbyol.errors import InputError, RunError, first_line
from fastbyol.evaluate.features import check_splits, extract
from fastbyol.evaluate.knn import knn_accuracy
from fastbyol.kernels import dispatch
from fastbyol.model import BYOLOutput, build_model
from fastbyol.runlog import RunLog, read_metrics
from fastbyol.step import TrainStep, choose_device

SUMMARY, ENVIRONMENT, CONFIG, CHECKPOINTS = "summary.json", "environment.json", "config.json", "checkpoints"


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int  # optimiser steps done
    total_steps: int
    stopped_by: signal.Signals | None  # the signal that ended it early


def train(config: Config) -> RunResult:
    """Pre-trains a backbone as `config` says; everything is written under config.runs/config.name.

    Raises:
        InputError: the config does not fit the data, the machine or the checkpoint; nothing was started.
        RunError: the run had to stop; the message names the last good checkpoint.
    """
    run = _Run(config)
    start, total = run.start, run.step.total_steps
    done = start
    with run.log, _StopSignals() as stop, closing(run.loader.batches(start, total)) as batches:
        run.announce()
        for step, batch in zip(range(start, total), batches, strict=True):
            output = run.step(step, batch)
            done = step + 1
            run.log.advance(done)
            if done % config.log.log_every_steps == 0 or done == total:
                run.log_step(step, output)
            if done % len(run.loader) == 0:
                run.end_of_epoch(done)
            if stop.received is not None:
                break
        run.save(done)
        run.summarise(done)
    return RunResult(run.folder, done, total, stop.received if done < total else None)


class _Run:
    """Everything around the loop: set-up, resume, logging, evaluation, saving."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.runs) / config.name
        device = choose_device(config.device)
        self.images = index_folder(config.data.root, config.data.train_split)
        model = build_model(config.model, config.data.image_size_px, config.seed)
        self.model = model.to(device=device, memory_format=torch.channels_last)
        steps_per_epoch = len(self.images) // config.data.batch_size
        self.step = TrainStep(self.model, config, steps_per_epoch, device)
        self.loader = build_loader(config.data, self.images, seed=config.seed, device=device, dtype=self.step.dtype)
        self.knn: dict[str, float] = {"last": math.nan, "best": math.nan}
        self._notes: list[str] = []  # said once the log is open
        self.start = self._resume()
        self._prepare_folder()
        self.log = RunLog(
            self.folder,
            start=self.start,
            total_steps=self.step.total_steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=config.data.batch_size,
            tensorboard=config.log.tensorboard,
        )
        self._val = self._knn_split()
        self._saved_at = self.start if self.start else -1
        self._named_bad: set[int] = set()
        self._collapse_warned = False
        self._began = time.perf_counter()

    def announce(self) -> None:
        """What runs here, before the first step."""
        config, total = self.config, self.step.total_steps
        for note in self._notes:
            self.log.warn(note)
        dispatch.compile_cpu_kernels(self.log.say)
        classes = f" of {len(self.images.classes)} classes" if self.images.classes else ""
        self.log.say(f"{len(self.images)} images{classes} in {self.images.root}")
        parameters = sum(p.numel() for p in self.model.online.parameters()) / 1e6
        self.log.say(
            f"{config.model.backbone} (width {config.model.width:g}, {parameters:.1f} M parameters with projector) on "
            f"{self.step.device}, {str(self.step.dtype).removeprefix('torch.')}, {config.optim.name}, "
            f"steps {self.start} to {total} in {self.folder}"
        )
        self.log.say(dispatch.describe(self.step.device))

    def log_step(self, step: int, output: BYOLOutput) -> None:
        """Reads the device values of this step; nothing else in the loop does.

        Raises:
            RunError: a loss since the last look was not finite.
        """
        self._check_finite()
        std = output.projection_std.item()
        self.log.train(
            step + 1,
            loss=output.loss.item(),
            lr=self.step.lr_at(step),
            tau=self.step.tau_at(step),
            projection_std=std,
            wait_s=self.loader.wait_s,
        )
        threshold = self.config.log.collapse_threshold / math.sqrt(self.config.model.projection_dim)
        if std < threshold and not self._collapse_warned:
            self.log.warn(
                f"step {step + 1}: std of the normalised projections is {std:.2g}, below {threshold:.2g}: the network is "
                "collapsing; a lower optim.base_lr or a higher optim.tau_base helps"
            )
        self._collapse_warned = std < threshold
        self._name_bad_images()

    def end_of_epoch(self, done: int) -> None:
        """Online kNN and checkpoint, as often as configured."""
        epoch, epochs = done // len(self.loader), self.config.optim.epochs
        every = self.config.knn.every_epochs
        best = False
        if self._val is not None and (epoch % every == 0 or epoch == epochs):
            self._check_finite()
            with self.log.pause():
                accuracy = self._evaluate_knn()
            best = not accuracy["top1"] <= self.knn["best"]  # also true while best is NaN
            self.knn = {"last": accuracy["top1"], "best": accuracy["top1"] if best else self.knn["best"]}
            self.log.knn(done, accuracy)
        if best or epoch % self.config.checkpoint.every_epochs == 0 or epoch == epochs:
            self.save(done, best=best)

    def save(self, done: int, *, best: bool = False) -> None:
        """Writes a checkpoint unless the newest one already is of this step.

        Raises:
            RunError: the loss was not finite, or the file cannot be written.
        """
        if self._saved_at == done:
            return
        self._check_finite()
        state = {
            "step": done,
            "config": self.config.to_dict(),
            "images": len(self.images),
            "model": self.model.state_dict(),
            "optimizer": self.step.state_dict(),
            "rng": _rng_state(),
            "knn": self.knn,
        }
        with self.log.pause():
            checkpoint.save(self.folder / CHECKPOINTS, state, keep_last=self.config.checkpoint.keep_last, best=best)
        self._saved_at = done

    def summarise(self, done: int) -> None:
        """The closing lines, and summary.json."""
        self._name_bad_images()
        lines = [m for m in read_metrics(self.folder) if m["kind"] == "train" and m["step"] > self.start]
        summary: dict[str, Any] = {
            "steps": done,
            "total_steps": self.step.total_steps,
            "seconds": time.perf_counter() - self._began,
            "images_per_s": float(np.median([m["images_per_s"] for m in lines])) if lines else None,
            "wait_share": float(np.median([m["wait_share"] for m in lines])) if lines else None,
            "loss": lines[-1]["loss"] if lines else None,
            "knn_last": _finite_or_none(self.knn["last"]),
            "knn_best": _finite_or_none(self.knn["best"]),
            "bad_images": {self.images.paths[i]: reason for i, reason in sorted(self.loader.bad.items())},
        }
        (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        if lines:
            knn = f", kNN {self.knn['last']:.1%} (best {self.knn['best']:.1%})" if self._val is not None else ""
            self.log.say(
                f"{done - self.start} steps in {summary['seconds']:.0f} s: {summary['images_per_s']:.0f} images/s, "
                f"{summary['wait_share']:.0%} of the time waiting for data, loss {summary['loss']:.3f}{knn}"
            )
        if self.loader.bad:
            self.log.warn(f"{len(self.loader.bad)} unreadable images were skipped, listed in {self.folder / SUMMARY}")
        if done < self.step.total_steps:
            self.log.say(
                f"stopped after step {done} of {self.step.total_steps}, saved in {self.folder / CHECKPOINTS}; "
                "the same command with --resume auto goes on from here"
            )

    def _resume(self) -> int:
        """Loads the checkpoint that config.resume names; returns the number of steps it had done.

        Raises:
            InputError: it does not exist, does not verify or does not fit; or resume=none would mix two runs.
        """
        folder, resume = self.folder / CHECKPOINTS, self.config.resume
        if resume == "none":
            if checkpoint.listed(folder):
                raise InputError(
                    f"{self.folder} already holds a run: continue it with --resume auto, or choose another --name"
                )
            return 0
        if resume == "auto":
            found = checkpoint.newest_good(folder, self._notes.append)
            if found is None:
                if checkpoint.listed(folder):
                    raise InputError(f"--resume auto: none of the checkpoints in {folder} is usable: {self._notes[-1]}")
                return 0
        else:
            found = checkpoint.resolve(Path(resume), self._notes.append)
        path, state = found
        self._check_fits(path, state)
        try:
            self.model.load_state_dict(state["model"])
            self.step.load_state_dict(state["optimizer"])
            self.knn = {key: float(state["knn"][key]) for key in ("last", "best")}
            _set_rng_state(state["rng"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"checkpoint {path} does not fit this model: {first_line(error)}") from None
        return state["step"]

    def _check_fits(self, path: Path, state: dict[str, Any]) -> None:
        """What must be equal for the run to go on as if it had not been cut is equal; other changes are named."""
        ours, theirs = _flat(self.config.to_dict()), _flat(state["config"])
        changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        for key in changed:
            if key.startswith("model.") or key in ("optim.name", "data.batch_size", "data.image_size_px"):
                raise InputError(
                    f"checkpoint {path} was made with {key}={theirs[key]}, this run has {key}={ours[key]}: "
                    "use the same value, or another --name"
                )
        if state["images"] != len(self.images):
            raise InputError(
                f"checkpoint {path} was made on {state['images']} images, {self.images.root} has {len(self.images)}"
            )
        free = (
            "resume",
            "runs",
            "name",
            "device",
            "data.root",
            "data.threads",
            "data.prefetch_batches",
            "log.",
            "knn.",
            "checkpoint.",
        )
        named = [f"{key} {theirs[key]} -> {ours[key]}" for key in changed if not key.startswith(free)]
        if named:
            self._notes.append(f"resumed with other settings than the run began with: {', '.join(named)}")

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            (self.folder / ENVIRONMENT).write_text(json.dumps(environment.describe(), indent=2) + "\n")
        except OSError as error:
            raise InputError(f"runs={self.config.runs}: {self.folder} cannot be written: {error.strerror}") from None

    def _knn_split(self) -> ImageFolder | None:
        """The validation split of the online kNN; None, and a line why, where there can be none."""
        data = self.config.data
        if self.config.knn.every_epochs == 0:
            return None
        try:
            val = index_folder(data.root, data.val_split)
            check_splits(self.images, val)
        except InputError as error:
            self._notes.append(f"no online kNN: {error}")
            return None
        return val

    def _evaluate_knn(self) -> dict[str, float]:
        """Top-1 and top-5 of the online backbone; at most knn.max_bank_images training images vote."""
        assert self._val is not None
        options = {
            "size": self.config.data.image_size_px,
            "device": self.step.device,
            "dtype": self.step.dtype,
            "threads": self.config.data.threads,
        }
        bank = extract(self.model.online.backbone, self.images.spread(self.config.knn.max_bank_images), **options)
        val = extract(self.model.online.backbone, self._val, **options)
        return knn_accuracy(bank, val, k=self.config.knn.k, temperature=self.config.knn.temperature)

    def _check_finite(self) -> None:
        bad = int(self.step.first_bad_step)
        if bad >= 0:
            saved = checkpoint.listed(self.folder / CHECKPOINTS)
            last = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
            raise RunError(
                f"the loss became NaN or infinite at step {bad} (lr {self.step.lr_at(bad):.4g}); {last}; "
                "lower optim.base_lr, or set precision=fp32"
            )

    def _name_bad_images(self) -> None:
        for index, reason in sorted(self.loader.bad.items()):
            if index not in self._named_bad:
                self._named_bad.add(index)
                self.log.warn(f"skipped {self.images.root / self.images.paths[index]}: {reason}")


class _StopSignals:
    """SIGTERM and SIGINT ask the loop to stop after the step in hand; a second one ends the program at once."""

    received: signal.Signals | None = None

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(number, self._old[self.received])


def _rng_state() -> dict[str, Any]:
    """torch's generators: nothing of BYOL's own draws from them, but a backbone with dropout does."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"root": x}} -> {"data.root": x}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
