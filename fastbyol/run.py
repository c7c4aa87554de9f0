"""A run in progress: what it logs, checks, saves and summarizes. loop.py has the loop."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fastbyol import resume
from fastbyol.batch_size import batch_bytes
from fastbyol.build import Training, build_training, find_training_images, with_batch_size
from fastbyol.callbacks import Callback
from fastbyol.config import DEFAULT_WARMUP_EPOCHS, Config
from fastbyol.data import Batch, Sources, choose_backend
from fastbyol.data.workers import resolve_threads
from fastbyol.errors import (
    InputError,
    LoaderTimeout,
    RunError,
    StorageError,
    error_reason,
    first_line,
    is_out_of_memory,
)
from fastbyol.kernels import describe
from fastbyol.kernels.cpu.jit_cache import compile_cpu_kernels
from fastbyol.model import BYOL, BYOLOutput
from fastbyol.runtime import checkpoint, cores
from fastbyol.runtime.distributed import World
from fastbyol.runtime.files import json_text, write_file
from fastbyol.runtime.logging import logger
from fastbyol.runtime.memory import MemoryBreakdown, SavedTensorBytes, measure_memory
from fastbyol.runtime.run_folder import STACKS, SUMMARY, RunFolder
from fastbyol.runtime.run_log import EarlyRecords, RunLog, read_metrics


def build_run(
    config: Config,
    world: World,
    device: torch.device,
    folder: RunFolder,
    callbacks: Sequence[Callback],
    sources: Sources = Sources(),  # noqa: B008 - immutable
) -> "Run":
    """Build a training, or continue the one of the folder's checkpoint. Every rank must call this.

    Raises:
        InputError: the config does not fit the data, the machine or the checkpoint.
    """
    resume.check_callback_names(callbacks)
    found = folder.found
    images = find_training_images(config, world, sources.train)
    with world.sync_errors():
        identity = resume.ImageIdentity(images)
        if found is not None:
            config = resume.with_checkpoint_batch_size(config, found)
            resume.check_compatible(config, identity, found)
    config = with_batch_size(config, images, device, world)

    def on_model(model: BYOL) -> None:
        for callback in callbacks if found is None else ():
            callback.on_model(model, config)

    training = build_training(config, world, device, images, on_model)
    training.sources = sources
    with world.sync_errors():
        for callback in callbacks:
            callback.on_build(training)
        start = 0 if found is None else resume.restore(training, callbacks, found)
        if world.is_main_process:
            folder.prepare(config)
    if len(set(world.gather(start))) > 1:
        raise InputError(f"the ranks found different checkpoints in {folder.path}: runs must lie on a shared disk")
    return Run(training, folder, identity, callbacks, start)


class Run:
    """Everything around the loop.

    Args:
        start: steps done before.
        callbacks: may read all attributes.
    """

    def __init__(
        self,
        training: Training,
        folder: RunFolder,
        identity: resume.ImageIdentity,
        callbacks: Sequence[Callback],
        start: int,
    ) -> None:
        self.training, self.folder, self.callbacks, self.start = training, folder, callbacks, start
        self.config, self.world, self.step = training.config, training.world, training.step
        self.named_bad: set[int] = set()  # unreadable training images that have been logged
        self.memory: MemoryBreakdown | None = None
        self._identity = identity
        self._saved_at = start if start else -1
        self._collapsing = False
        self._began = time.perf_counter()

    def open_log(self, early: EarlyRecords) -> RunLog:
        """Open the files of the log.

        Args:
            early: records that were logged before the run's folder was ready.
        """
        self.log = RunLog(
            self.folder.path,
            start=self.start,
            total_steps=self.step.total_steps,
            steps_per_epoch=self.step.schedule.steps_per_epoch,
            batch_size=self.config.data.batch_size,
            on_line=self._call_on_metrics,
            early=early.release(),
            is_main_process=self.world.is_main_process,
        )
        return self.log

    def announce(self) -> None:
        """Log what runs where, and compile the CPU kernels."""
        config, training, step = self.config, self.training, self.step
        for note in training.images.notes:
            logger.warning(note)
        if config.optim.warmup_epochs is None and config.optim.warmup < DEFAULT_WARMUP_EPOCHS:
            logger.info(
                f"optim.warmup_epochs: the default of {DEFAULT_WARMUP_EPOCHS} is longer than half of the run; using "
                f"{config.optim.warmup:g} epochs"
            )
        compile_cpu_kernels()
        if self.world.size == 1:  # otherwise the other ranks would count as other processes
            cores.warn_if_shared(resolve_threads(config.data.threads))
        images, classes = training.images, len(training.images.classes)
        backend, why = choose_backend(config.data, images, step.device)
        of_classes = f" of {classes} classes" if classes else ""
        logger.info(f"{len(images)} images{of_classes} in {images.root}, data backend {backend}: {why}")
        parameters = sum(p.numel() for p in training.model.online.parameters()) / 1e6
        ranks = f"{self.world.size} ranks on " if self.world.size > 1 else ""
        logger.info(
            f"{config.model.backbone} (width {config.model.width:g}, {parameters:.1f} M parameters with projector) on "
            f"{ranks}{step.device}, {str(step.dtype).removeprefix('torch.')}, step {step.mode}, "
            f"{config.optim.name}, batch {config.data.batch_size}, steps {self.start} to {step.total_steps} in {self.folder.path}"
        )
        logger.info(describe(step.device, backend))

    def start_callbacks(self) -> None:
        """Call `on_start` of all callbacks. Every rank must call this.

        Raises:
            InputError: a callback cannot start, on any rank.
        """
        with self.world.sync_errors():
            for callback in self.callbacks:
                callback.on_start(self)

    def first_step(self, step: int, batch: Batch) -> BYOLOutput:
        """Run a step and measure its memory; the progress bar shows its loss at once."""
        device = self.step.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with SavedTensorBytes(self.training.model) as saved:
            output = self.step(step, batch)
        views = batch_bytes(self.config, len(batch.indices), device, batch.views[0].dtype)
        self.memory = measure_memory(self.training.model, self.step.optimizer, views, device, saved)
        logger.info(self.memory)
        self.log.first(step + 1, output.loss.item())
        return output

    def log_step(self, step: int, output: BYOLOutput) -> None:
        """Log a step. Only here does the loop read device values.

        Raises:
            RunError: a loss since the last call was not finite.
        """
        self.check_finite()
        loss, std = self.world.mean(torch.stack((output.loss, output.projection_std))).tolist()
        scale = self.step.loss_scale
        scaling = {} if scale is None else {"loss_scale": scale.scale.item(), "skipped_steps": int(scale.skipped)}
        self.log.train(
            step + 1,
            loss=loss,
            lr=self.step.schedule.lr(step),
            tau=self.step.schedule.tau(step),
            projection_std=std,
            wait_s=self.training.loader.wait_s,
            **scaling,
        )
        self._warn_of_collapse(step, std)
        self._log_bad_images()

    def end_of_epoch(self, done: int) -> None:
        """Run the callbacks, and save a checkpoint as often as configured."""
        epoch, epochs = self.step.schedule.epoch(done), self.config.optim.epochs
        best = False
        for callback in self.callbacks:
            best |= callback.on_epoch_end(self, done)
        if best or epoch % self.config.checkpoint.every_epochs == 0 or epoch == epochs:
            self.save(done, best=best)

    def save(self, done: int, *, best: bool = False) -> None:
        """Write a checkpoint, unless the newest one is of this step.

        Raises:
            RunError: the loss was not finite, or the file cannot be written.
        """
        if self._saved_at == done:
            return
        self.check_finite()
        self._saved_at = done
        if not self.world.is_main_process:
            return
        state = resume.capture(self.training, self._identity, self.callbacks, done)
        if self.folder.ensure_exists(self.config):
            self.log.reopen()
        with self.log.pause():
            checkpoint.save(self.folder.checkpoints, state, keep_last=self.config.checkpoint.keep_last, best=best)

    def summarize(self, done: int) -> dict[str, Any]:
        """Log the result, write summary.json, and call `on_end` of all callbacks.

        Returns:
            the summary; empty on ranks other than 0.
        """
        summary = self._write_summary(done)
        for callback in self.callbacks:
            callback.on_end(self, summary)
        return summary

    def _write_summary(self, done: int) -> dict[str, Any]:
        self._log_bad_images()
        bad = {index: reason for bad in self.world.gather(self.training.loader.bad) for index, reason in bad.items()}
        if not self.world.is_main_process:
            return {}
        lines = [m for m in read_metrics(self.folder.path) if m["kind"] == "train"]
        if self.start < done:  # otherwise this attempt only closes the run
            lines = [m for m in lines if m["step"] > self.start]
        summary: dict[str, Any] = {
            "steps": done,
            "total_steps": self.step.total_steps,
            "seconds": time.perf_counter() - self._began,
            "images_per_s": float(np.median([m["images_per_s"] for m in lines])) if lines else None,
            "wait_share": float(np.median([m["wait_share"] for m in lines])) if lines else None,
            "loss": lines[-1]["loss"] if lines else None,
            "memory_bytes": None if self.memory is None else dataclasses.asdict(self.memory),
            "bad_images": {self.training.images.name(i): reason for i, reason in sorted(bad.items())},
        }
        for callback in self.callbacks:
            summary |= callback.summary()
        write_file(self.folder.path / SUMMARY, json_text(summary))
        self._log_summary(done, summary, len(bad))
        return summary

    def check_finite(self) -> None:
        """Raise RunError if a loss on any rank has been NaN or infinite.

        All ranks must call this.
        """
        bad = int(self.world.maximum(self.step.first_bad_step))
        if bad >= 0:
            raise RunError(
                f"the loss became NaN or infinite at step {bad} (lr {self.step.schedule.lr(bad):.4g}); {self.folder.last_good()}; "
                "lower optim.base_lr, or set precision=fp32"
            )

    @contextmanager
    def errors_to_callbacks(self) -> Iterator[None]:
        """Context manager: call `on_error` of all callbacks if the body raises."""
        try:
            yield
        except BaseException as error:
            for callback in self.callbacks:
                try:
                    callback.on_error(self, error)
                except Exception as second:
                    name = type(callback).__name__
                    logger.warning(f"{name}.on_error failed too: {first_line(second)}", exc_info=True)
            raise

    @contextmanager
    def user_facing_errors(self) -> Iterator[None]:
        """Context manager: turn what can go wrong during a run into a one-line RunError that says
        what to do.
        """
        folder = self.folder
        try:
            yield
        except LoaderTimeout as error:
            path = folder.path / (STACKS if self.world.is_main_process else f"rank{self.world.rank}_{STACKS}")
            write_file(path, error.stacks)
            raise RunError(f"{error}; {path} has the stacks of all threads; {folder.last_good()}") from None
        except StorageError as error:
            raise StorageError(f"{error}; {folder.last_good()}") from None
        except torch.OutOfMemoryError as error:
            parts = f" ({self.memory})" if self.memory is not None else ""
            raise RunError(
                f"out of GPU memory: {first_line(error)}{parts}; lower data.batch_size (auto finds the largest), raise "
                f"step.micro_batches or step.activation_checkpointing, or lower data.image_size_px; {folder.last_good()}"
            ) from error
        except OSError as error:
            raise RunError(f"{error.filename or folder.path}: {error_reason(error)}; {folder.last_good()}") from error
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RunError(
                f"step.mode={self.step.mode}: the model does not compile here ({first_line(error)}); "
                "step.mode=eager needs no compiler"
            ) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory or threads: {first_line(error)}; lower data.batch_size, data.image_size_px or data.prefetch_batches; "
                f"{folder.last_good()}"
            ) from error

    def _call_on_metrics(self, kind: str, step: int, values: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_metrics(self, kind, step, values)

    def _warn_of_collapse(self, step: int, std: float) -> None:
        threshold = self.config.log.collapse_threshold / math.sqrt(self.config.model.projection_dim)
        if std < threshold and not self._collapsing:
            logger.warning(
                f"step {step + 1}: std of the normalized projections is {std:.2g}, below {threshold:.2g}: the network is "
                "collapsing; a lower optim.base_lr or a higher optim.tau_base helps"
            )
        self._collapsing = std < threshold

    def _log_bad_images(self) -> None:
        for index, reason in sorted(self.training.loader.bad.items()):
            if index not in self.named_bad:
                self.named_bad.add(index)
                logger.warning(f"skipped {self.training.images.location(index)}: {reason}")

    def _log_summary(self, done: int, summary: dict[str, Any], bad: int) -> None:
        if summary["loss"] is not None:
            accuracy = summary.get("knn_last", math.nan) if self.config.knn.every_epochs else math.nan
            knn = ""
            if math.isfinite(accuracy):
                share = f"{summary['knn_time_share']:.1%} of the time"
                knn = f", kNN {accuracy:.1%} (best {summary['knn_best']:.1%}, {share})"
            logger.info(
                f"{done - self.start} steps in {summary['seconds']:.0f} s: {summary['images_per_s']:.0f} images/s, "
                f"{summary['wait_share']:.0%} of the time waiting for data, loss {summary['loss']:.3f}{knn}"
            )
        if bad:
            logger.warning(f"{bad} unreadable images were skipped, listed in {self.folder.path / SUMMARY}")
        if done < self.step.total_steps:
            logger.info(
                f"stopped after step {done} of {self.step.total_steps}, saved in {self.folder.checkpoints}; "
                "the same command with --resume auto continues from here"
            )
