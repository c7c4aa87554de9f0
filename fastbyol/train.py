"""The run: loader -> step -> log -> evaluate -> checkpoint."""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch

from fastbyol import batch_size
from fastbyol.config import DEFAULT_WARMUP_EPOCHS, Config, OptimConfig
from fastbyol.data import Batch, ImageSet, build_loader, choose_backend, find_images
from fastbyol.data.workers import resolve_threads
from fastbyol.errors import InputError, LoaderTimeout, RunError, error_reason, first_line, is_out_of_memory
from fastbyol.evaluate.features import check_splits, extract
from fastbyol.evaluate.knn import knn_accuracy
from fastbyol.evaluate.online_probe import OnlineProbe
from fastbyol.evaluate.protocol import missing_images_warning
from fastbyol.kernels import dispatch
from fastbyol.model import BYOL, BYOLOutput, build_model
from fastbyol.runtime import checkpoint, cores, environment, memory
from fastbyol.runtime.console import say
from fastbyol.runtime.distributed import ProcessGroup, StopConsensus, World, world_from_environment
from fastbyol.runtime.files import FolderLock, json_text, read_json_or, write_file
from fastbyol.runtime.runlog import LOG, METRICS, TENSORBOARD, RunLog, read_metrics
from fastbyol.schedules import Schedule
from fastbyol.step import TrainStep, choose_device
from fastbyol.weights.load import load_backbone

SUMMARY, ENVIRONMENT, CONFIG, CHECKPOINTS = "summary.json", "environment.json", "config.json", "checkpoints"
REPORT = "report.html"
STACKS = "stacks.txt"
_LOCK_WAIT_S = 20.0
_DIFFERENCES = 3  # between two sets of images, that a message names


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    folder: Path
    step: int  # optimizer steps done
    total_steps: int
    first_rank: bool
    stopped_by: signal.Signals | None  # the signal that ended it early
    finished_before: bool = False  # there was nothing left to do, and nothing was done


def train(config: Config) -> RunResult:
    """Pre-trains a backbone as `config` says; everything is written under config.runs/config.name.

    Under torchrun every rank calls this; rank 0 writes and speaks.

    Raises:
        InputError: the config does not fit the data, the machine or the checkpoint; nothing was started.
        RunError: the run had to stop; the message names the last good checkpoint.
    """
    cores.respect_quota()
    world = world_from_environment()
    device = choose_device(config.device, world.local_rank)
    folder, notes = Path(config.runs) / config.name, list[str]()
    # Signals are heeded until the process group has said why a run ends: torchrun sends SIGTERM to those who lost a rank.
    with ExitStack() as last, ProcessGroup(world, config.distributed, device):
        with world.sync_errors():
            lock = None
            if world.is_main_process:  # workers that torchrun starts anew may come before the old ones are gone
                lock = FolderLock(folder, wait_s=_LOCK_WAIT_S if world.restarts else 0, warn=notes.append)
                last.enter_context(lock)
        with world.sync_errors():
            found = _find_checkpoint(config, world, notes.append)
            finished = None if found is None else _finished_step(folder, found, config)
        if (done := world.gather(finished)[0]) is not None:  # as the first rank sees it: all leave, or none
            if world.is_main_process:
                say(_already_finished(found, config))
            return RunResult(folder, done, done, world.is_main_process, None, finished_before=True)
        run = _Run(config, world, device, found, notes, lock)
        stop = last.enter_context(_StopSignals())
        with closing(run.step), run.log, run.user_facing_errors(), StopConsensus(world) as consensus:
            run.announce()
            done = run.start
            with closing(run.loader.batches(run.start, run.step.total_steps)) as batches:
                for step, batch in zip(range(run.start, run.step.total_steps), batches, strict=True):
                    output = run.first_step(step, batch) if step == run.start else run.step(step, batch)
                    if run.probe is not None:
                        run.probe.step(output.features, batch.labels, output.loss)
                    done = step + 1
                    run.log.advance(done)
                    if done % config.log.log_every_steps == 0 or done == run.step.total_steps:
                        run.log_step(step, output)
                    if done % len(run.loader) == 0:
                        run.end_of_epoch(done)
                    if consensus.agree(stop.received is not None):
                        break
            run.save(done)
            run.summarize(done)
    total = run.step.total_steps
    stopped_by = (stop.received or signal.SIGTERM) if done < total else None  # another rank may have got the signal
    return RunResult(run.folder, done, total, world.is_main_process, stopped_by)


Found = tuple[Path, dict[str, Any]]  # a checkpoint's file and content


def _find_checkpoint(config: Config, world: World, warn: Callable[[str], None]) -> Found | None:
    """The checkpoint that config.resume names, None for a fresh start. Workers that torchrun started anew go on.

    Raises:
        InputError: it does not exist or does not verify; or resume=none would mix two runs.
    """
    run = Path(config.runs) / config.name
    folder = run / CHECKPOINTS
    own = checkpoint.list_checkpoints(folder)
    resume = "auto" if world.restarts and (own or config.resume == "none") else config.resume
    if resume == "none":
        if own:
            raise InputError(f"{run} already holds a run: continue it with --resume auto, or choose another --name")
        return None
    if Path(resume).is_dir() and Path(resume).resolve() in (run.resolve(), folder.resolve()):
        resume = "auto"
    if resume != "auto":
        found = checkpoint.resolve(Path(resume), warn)
        inside = found[0].resolve().parent == folder.resolve()
        if own and not (inside and found[1]["step"] >= checkpoint.checkpoint_step(own[-1])):
            raise InputError(
                f"--resume {resume}: {run} already holds a run up to {own[-1].name}: continue it with --resume auto, or go on from "
                f"{found[0].name} with another --name"
            )
        return found
    damaged: list[str] = []
    found = checkpoint.latest_valid(folder, damaged.append)
    if found is None and damaged:
        best = folder / checkpoint.BEST
        hint = f"; --resume {best} with another --name goes on from the best one" if best.exists() else ""
        raise InputError(f"--resume auto: none of the checkpoints in {folder} is usable: {damaged[-1]}{hint}")
    for text in damaged:
        warn(text)
    return found


def _total_steps(config: Config, found: Found) -> int:
    """Of a run that goes on from a checkpoint with this config."""
    data = config.data if config.data.batch_size != "auto" else checkpoint.checkpoint_config(*found).data
    return config.optim.epochs * (found[1]["images"] // data.batch_size)


def _finished_step(folder: Path, found: Found, config: Config) -> int | None:
    """The steps of a checkpoint that has done all that the config asks for; None where something is left to do.

    A run that was killed between its own last checkpoint and its summary is still to be closed.

    Raises:
        InputError: as checkpoint.config_of.
    """
    path, state = found
    step, total = state["step"], _total_steps(config, found)
    own = path.resolve().parent == (folder / CHECKPOINTS).resolve()
    summed_up = read_json_or(folder / SUMMARY, lambda text: None).get("steps")
    closed = isinstance(summed_up, int) and summed_up >= step
    return step if step > total or (step == total and (closed or not own)) else None


def _already_finished(found: Found, config: Config) -> str:
    path, state = found
    steps_per_epoch = max(_total_steps(config, found) // config.optim.epochs, 1)
    run = Path(config.runs) / config.name
    closed = (run / REPORT).exists() or not (run / SUMMARY).exists()
    report = "" if closed else f"; `fastbyol report --run {run}` writes the report, which is missing"
    return (
        f"already finished: checkpoint {path} is of epoch {state['step'] // steps_per_epoch}, optim.epochs={config.optim.epochs}; nothing "
        "was done. A larger optim.epochs goes on from there, with the schedules of the larger number" + report
    )


class _Run:
    """Everything around the loop: set-up, resume, logging, evaluation, saving."""

    def __init__(
        self,
        config: Config,
        world: World,
        device: torch.device,
        found: Found | None,
        notes: list[str],
        lock: FolderLock | None,
    ) -> None:
        self.world, self.folder, self._lock = world, Path(config.runs) / config.name, lock
        self._notes, self._news = notes, list[str]()  # warnings, and news, for when the log is open
        self.knn: dict[str, float] = {"last": math.nan, "best": math.nan}
        with world.sync_errors():
            self.images = find_images(config.data, "train")
            self._files, self._sample = self.images.fingerprint(), self.images.content_hashes()
            fits = 0
            if config.data.batch_size == "auto":
                dispatch.compile_cpu_kernels(self._news.append)  # the trial steps need them
                fits = batch_size.find_batch_size(config, device, world) if found is None else -1
        with world.sync_errors():
            self.config = config = self._with_batch_size(config, found, fits)
            if found is not None:
                self._check_fits(*found)
            model = build_model(config.model, config.data.image_size_px, config.seed)
            if config.init != "none" and found is None:
                self._news.append(self._load_backbone(model, config))
            self.model = model.to(device=device, memory_format=torch.channels_last)
        steps_per_epoch = len(self.images) // config.data.batch_size
        with world.sync_errors():
            self.step = TrainStep(self.model, config, steps_per_epoch, device, world)
            self.loader = build_loader(
                config.data,
                self.images,
                seed=config.seed,
                device=device,
                dtype=self.step.dtype,
                shard=world.shard(config.data.batch_size, config.step.micro_batches),
            )
            self.probe = self._build_probe()
            self.start = 0 if found is None else self._load(*found)
            if world.is_main_process:
                self._prepare_folder()
        if len(set(world.gather(self.start))) > 1:
            raise InputError(f"the ranks found different checkpoints in {self.folder}: runs must lie on a shared disk")
        self.memory: memory.MemoryBreakdown | None = None
        self.log = RunLog(
            self.folder,
            start=self.start,
            total_steps=self.step.total_steps,
            steps_per_epoch=steps_per_epoch,
            batch_size=config.data.batch_size,
            tensorboard=config.log.tensorboard,
            speaks=world.is_main_process,
        )
        self._val = self._knn_split()
        self._saved_at = self.start if self.start else -1
        self._named_bad: set[int] = set()
        self._collapse_warned = False
        self._began = time.perf_counter()

    def announce(self) -> None:
        """What runs here, before the first step."""
        config, total = self.config, self.step.total_steps
        for note in (*self._notes, *self.images.notes, *(self._val.notes if self._val is not None else ())):
            self.log.warn(note)
        for text in self._news:
            self.log.say(text)
        if config.optim.warmup_epochs is None and config.optim.warmup < DEFAULT_WARMUP_EPOCHS:
            self.log.say(
                f"optim.warmup_epochs: the default of {DEFAULT_WARMUP_EPOCHS} is longer than half of the run; "
                f"it is {config.optim.warmup:g} epochs"
            )
        dispatch.compile_cpu_kernels(self.log.say)
        if self.world.size == 1:  # the other ranks would count as others
            cores.warn_if_shared(resolve_threads(config.data.threads), self.log.warn)
        classes = f" of {len(self.images.classes)} classes" if self.images.classes else ""
        backend, why = choose_backend(config.data, self.images, self.step.device)
        self.log.say(f"{len(self.images)} images{classes} in {self.images.root}, read by {backend}: {why}")
        parameters = sum(p.numel() for p in self.model.online.parameters()) / 1e6
        ranks = f"{self.world.size} ranks on " if self.world.size > 1 else ""
        self.log.say(
            f"{config.model.backbone} (width {config.model.width:g}, {parameters:.1f} M parameters with projector) on "
            f"{ranks}{self.step.device}, {str(self.step.dtype).removeprefix('torch.')}, step {self.step.mode}, "
            f"{config.optim.name}, batch {config.data.batch_size}, steps {self.start} to {total} in {self.folder}"
        )
        self.log.say(dispatch.describe(self.step.device, backend))

    def first_step(self, step: int, batch: Batch) -> BYOLOutput:
        """A step whose memory is counted, and whose loss the progress bar shows at once."""
        device = self.step.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with memory.SavedTensorBytes(self.model) as saved:
            output = self.step(step, batch)
        views = batch_size.batch_bytes(self.config, len(batch.indices), device, batch.views[0].dtype)
        self.memory = memory.measure_memory(self.model, self.step.optimizer, views, device, saved)
        self.log.say(str(self.memory))
        self.log.first(step + 1, output.loss.item())
        return output

    @contextmanager
    def user_facing_errors(self) -> Iterator[None]:
        """Turns what can go wrong in the middle of a run into one line that says what to do."""
        try:
            yield
        except LoaderTimeout as error:
            path = self.folder / (STACKS if self.world.is_main_process else f"rank{self.world.rank}_{STACKS}")
            write_file(path, error.stacks)
            raise RunError(f"{error}; {path} has the stacks of all threads; {self._last_good()}") from None
        except torch.OutOfMemoryError as error:
            parts = f" ({self.memory})" if self.memory is not None else ""
            raise RunError(
                f"out of GPU memory: {first_line(error)}{parts}; lower data.batch_size (auto finds the largest), raise "
                f"step.micro_batches or step.activation_checkpointing, or lower data.image_size_px; {self._last_good()}"
            ) from None
        except OSError as error:
            where = error.filename or self.folder
            raise RunError(f"{where}: {error_reason(error)}; {self._last_good()}") from None
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
                f"{self._last_good()}"
            ) from None

    def log_step(self, step: int, output: BYOLOutput) -> None:
        """Reads the device values of this step; nothing else in the loop does.

        Raises:
            RunError: a loss since the last look was not finite.
        """
        self._check_finite()
        loss, std = self.world.mean(torch.stack((output.loss, output.projection_std))).tolist()
        scale = self.step.loss_scale
        scaling = {} if scale is None else {"loss_scale": scale.scale.item(), "skipped_steps": int(scale.skipped)}
        self.log.train(
            step + 1,
            loss=loss,
            lr=self.step.schedule.lr(step),
            tau=self.step.schedule.tau(step),
            projection_std=std,
            wait_s=self.loader.wait_s,
            **scaling,
        )
        threshold = self.config.log.collapse_threshold / math.sqrt(self.config.model.projection_dim)
        if std < threshold and not self._collapse_warned:
            self.log.warn(
                f"step {step + 1}: std of the normalized projections is {std:.2g}, below {threshold:.2g}: the network is "
                "collapsing; a lower optim.base_lr or a higher optim.tau_base helps"
            )
        self._collapse_warned = std < threshold
        self._name_bad_images()

    def end_of_epoch(self, done: int) -> None:
        """Online kNN and checkpoint, as often as configured."""
        epoch, epochs = done // len(self.loader), self.config.optim.epochs
        every = self.config.knn.every_epochs
        best = False
        if self.probe is not None:
            self._check_finite()
            self.log.probe(done, self.probe.end_of_epoch())
        if every and (epoch % every == 0 or epoch == epochs):  # the same on all ranks, as everything that they exchange
            self._check_finite()
            best = self.world.gather(self._val is not None and self._evaluate_knn(done))[0]
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
        self._saved_at = done
        if not self.world.is_main_process:
            return
        state = {
            "step": done,
            "config": self.config.to_dict(),
            "images": len(self.images),
            "files": self._files,
            "sample": self._sample,
            "model": self.model.state_dict(),
            **self.step.state_dict(),
            "rng": _rng_state(),
            "knn": self.knn,
        }
        if self.probe is not None:
            state["probe"] = self.probe.state_dict()
        self._keep_folder()
        with self.log.pause():
            checkpoint.save(self.folder / CHECKPOINTS, state, keep_last=self.config.checkpoint.keep_last, best=best)

    def _keep_folder(self) -> None:
        """Goes on in a new folder where the run's was moved or removed while it trained.

        Raises:
            RunError: another run writes there by now.
        """
        assert self._lock is not None
        try:
            if self._lock.renew() and not (self.folder / CONFIG).exists():  # else the lock alone was removed
                self._prepare_folder()
                self.log.reopen()
                self.log.warn(
                    f"{self.folder} was moved or removed while the run wrote into it: it goes on in a new one"
                )
        except InputError as error:
            raise RunError(f"{error} (this run's own was moved or removed); {self._last_good()}") from None

    def summarize(self, done: int) -> None:
        """The closing lines, and summary.json."""
        self._name_bad_images()
        bad = self._all_bad_images()
        if not self.world.is_main_process:
            return
        lines = [m for m in read_metrics(self.folder) if m["kind"] == "train"]
        if self.start < done:  # else this attempt had nothing left to do but to close the run
            lines = [m for m in lines if m["step"] > self.start]
        summary: dict[str, Any] = {
            "steps": done,
            "total_steps": self.step.total_steps,
            "seconds": time.perf_counter() - self._began,
            "images_per_s": float(np.median([m["images_per_s"] for m in lines])) if lines else None,
            "wait_share": float(np.median([m["wait_share"] for m in lines])) if lines else None,
            "loss": lines[-1]["loss"] if lines else None,
            "knn_last": self.knn["last"],
            "knn_best": self.knn["best"],
            "memory_bytes": None if self.memory is None else dataclasses.asdict(self.memory),
            "bad_images": {self.images.name(i): reason for i, reason in sorted(bad.items())},
            "knn_bad_images": self.knn_bad,
        }
        write_file(self.folder / SUMMARY, json_text(summary))
        if lines:
            measured = self.config.knn.every_epochs > 0 and math.isfinite(self.knn["last"])
            knn = f", kNN {self.knn['last']:.1%} (best {self.knn['best']:.1%})" if measured else ""
            self.log.say(
                f"{done - self.start} steps in {summary['seconds']:.0f} s: {summary['images_per_s']:.0f} images/s, "
                f"{summary['wait_share']:.0%} of the time waiting for data, loss {summary['loss']:.3f}{knn}"
            )
        if bad:
            self.log.warn(f"{len(bad)} unreadable images were skipped, listed in {self.folder / SUMMARY}")
        if done < self.step.total_steps:
            self.log.say(
                f"stopped after step {done} of {self.step.total_steps}, saved in {self.folder / CHECKPOINTS}; "
                "the same command with --resume auto goes on from here"
            )

    def _with_batch_size(self, config: Config, found: Found | None, fits: int) -> Config:
        """The config with a number for data.batch_size=auto: the checkpoint's, or the largest that fits on every rank.

        Raises:
            InputError: the split is smaller than two images per rank and micro-batch.
        """
        if config.data.batch_size != "auto":
            return config
        if found is not None:
            size = found[1]["config"]["data"]["batch_size"]
        else:
            size = batch_size.global_batch_size(fits, self.images, config, self.world)
            peak = config.optim.base_lr * size / 256
            self._news.append(
                f"data.batch_size=auto: {size}; the learning rate rises to {peak:.4g} (optim.base_lr * {size} / 256)"
            )
        return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=size))

    def _load_backbone(self, model: BYOL, config: Config) -> str:
        """Takes over config.init's weights, in the target too where it starts as a copy; returns a line that says so."""
        online, target = model.online.backbone, model.target
        line = load_backbone(config.init, online, config.model.backbone, config=config.model)
        if target is not None and config.model.target_init == "copy":
            target.backbone.load_state_dict(online.state_dict())
        return line

    def _build_probe(self) -> OnlineProbe | None:
        """The online classifier, where one is configured.

        Raises:
            InputError: the images have no classes.
        """
        if not self.config.probe.enabled:
            return None
        if len(self.images.classes) < 2:
            raise InputError(f"probe.enabled=true: {self.images.root} has fewer than 2 classes; set it to false")
        self.model.return_features = True
        return OnlineProbe(
            self.model.features, len(self.images.classes), self.config.probe, self.step.device, self.world
        )

    def _load(self, path: Path, state: dict[str, Any]) -> int:
        """Takes over a checkpoint; returns the number of steps it had done.

        Raises:
            InputError: it does not fit this model.
        """
        try:
            self.model.load_state_dict(state["model"])
            if state["step"] and not state["optimizer"] and self.config.optim.momentum:
                raise ValueError("it holds no momenta")
            self.step.load_state_dict(state)
            if self.probe is not None and "probe" in state:
                self.probe.load_state_dict(state["probe"])
            elif self.probe is not None:
                self._news.append(f"checkpoint {path} has no online classifier: it starts anew")
            self.knn = {key: float(state["knn"][key]) for key in ("last", "best")}
            _set_rng_state(state["rng"])
            self._say_new_schedule(checkpoint.checkpoint_config(path, state).optim, state["step"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"checkpoint {path} does not fit this model: {first_line(error)}") from None
        return state["step"]

    def _check_fits(self, path: Path, state: dict[str, Any]) -> None:
        """What must be equal for the run to go on as if it had not been cut is equal; other changes are named."""
        # A default is compared by the number that it means.
        ours = _flat(self.config.to_dict()) | {"optim.warmup_epochs": self.config.optim.warmup}
        theirs = _flat(state["config"]) | {
            "optim.warmup_epochs": checkpoint.checkpoint_config(path, state).optim.warmup
        }
        changed = [key for key in ours if key in theirs and ours[key] != theirs[key]]
        for key in changed:
            if key.startswith("model.") or key in ("optim.name", "data.batch_size", "data.image_size_px"):
                raise InputError(
                    f"checkpoint {path} was made with {key}={theirs[key]}, this run has {key}={ours[key]}: "
                    "use the same value, or another --name"
                )
        changes = _other_files(state, self._files, len(self.images))
        pairs = [pair for pair in zip(state.get("sample", []), self._sample, strict=False) if all(pair)]
        others = sum(before != now for before, now in pairs)
        if not changes and others > len(pairs) / 2:
            changes = "files of the same names hold other images"
        elif not changes and others:
            self._notes.append(
                f"{others} of {len(pairs)} images that were compared are not what they were when the run began"
            )
        if changes:
            raise InputError(
                f"checkpoint {path} was made on other images than those of {self.images.root}: {changes}; resume with the same "
                "images, or start anew with another --name (--init takes over the backbone)"
            )
        free = (
            "resume",
            "runs",
            "name",
            "device",
            "data.threads",
            "data.prefetch_batches",
            "data.timeout_s",
            "step.",
            "distributed.",
            "init",
            "log.",
            "knn.",
            "probe.",
            "checkpoint.",
        )
        named = [f"{key} {theirs[key]} -> {ours[key]}" for key in changed if not key.startswith(free)]
        if named:
            self._notes.append(f"resumed with other settings than the run began with: {', '.join(named)}")

    def _say_new_schedule(self, before: OptimConfig, step: int) -> None:
        """What a changed number of epochs does to the learning rate and tau of the step that comes next."""
        now = self.config.optim
        if (before.epochs, before.warmup) == (now.epochs, now.warmup):
            return
        steps_per_epoch = self.step.total_steps // now.epochs
        old, new = Schedule(before, self.config.data.batch_size, steps_per_epoch), self.step.schedule
        self._news.append(
            f"optim.epochs {before.epochs} -> {now.epochs}: the schedules span {now.epochs} epochs, so at step {step} the "
            f"learning rate is {new.lr(step):.4g} instead of {old.lr(step):.4g}, tau {new.tau(step):.4g} instead of "
            f"{old.tau(step):.4g}"
        )

    def _prepare_folder(self) -> None:
        # What stands in the way would be found out when a file is written, at the latest after the training.
        checkpoints = self.folder / CHECKPOINTS
        names = (CONFIG, ENVIRONMENT, SUMMARY, METRICS, LOG, STACKS, REPORT)
        for path in (
            *(self.folder / name for name in names),
            checkpoints / checkpoint.BEST,
            *checkpoint.list_checkpoints(checkpoints),
        ):
            if os.path.lexists(path) and not (path.is_file() or path.is_char_device()):
                raise InputError(f"{path} is not a file, but the run writes one there: move it away")
        for path in (checkpoints, self.folder / TENSORBOARD):
            if os.path.lexists(path) and not path.is_dir():
                raise InputError(f"{path} is not a folder, but the run writes into one there: move it away")
        try:
            write_file(self.folder / CONFIG, json_text(self.config.to_dict()))
            write_file(self.folder / ENVIRONMENT, json_text(environment.describe()))
        except OSError as error:
            raise InputError(f"runs={self.config.runs}: {self.folder} cannot be written: {error.strerror}") from None

    def _knn_split(self) -> ImageSet | None:
        """The validation split of the online kNN; None, and a line why, where there can be none."""
        self.knn_bad: dict[str, str] = {}  # images that the online kNN left out: where they lie -> why
        data = self.config.data
        if self.config.knn.every_epochs == 0 or not self.world.is_main_process:
            return None
        try:
            val = find_images(data, "val")
            check_splits(self.images, val)
        except InputError as error:
            self._notes.append(f"no online kNN: {error}")
            return None
        return val

    def _evaluate_knn(self, done: int) -> bool:
        """Logs top-1 and top-5 of the online backbone and says whether top-1 is the best so far; rank 0 alone does it."""
        with self.log.pause():
            accuracy = self._knn_accuracy()
        if accuracy is None:
            return False
        best = not accuracy["top1"] <= self.knn["best"]  # also true while best is NaN
        self.knn = {"last": accuracy["top1"], "best": accuracy["top1"] if best else self.knn["best"]}
        self.log.knn(done, accuracy)
        return best

    def _knn_accuracy(self) -> dict[str, float] | None:
        """Top-1 and top-5 of the online backbone; at most knn.max_bank_images training images vote.

        None, and a line why, where no image of a split can be read: the training goes on without kNN.
        """
        assert self._val is not None
        options = {
            "size": self.config.data.image_size_px,
            "device": self.step.device,
            "dtype": self.step.dtype,
            "threads": self.config.data.threads,
        }
        voters = self.images.subsample(self.config.knn.max_bank_images)
        try:
            bank, val = (extract(self.model.online.backbone, split, **options) for split in (voters, self._val))
        except InputError as error:
            self.log.warn(f"no online kNN from here on: {error}")
            self._val = None
            return None
        self._name_what_knn_left_out(voters, bank.bad, self._val, val.bad)
        try:
            return knn_accuracy(bank, val, k=self.config.knn.k, temperature=self.config.knn.temperature)
        except InputError as error:
            raise RunError(f"online kNN: {error}; {self._last_good()}") from None

    def _name_what_knn_left_out(
        self, voters: ImageSet, bad_voters: dict[int, str], val: ImageSet, bad_val: dict[int, str]
    ) -> None:
        """Names unreadable images, unless they were when they were to be trained on, and enters them in `knn_bad`."""
        places = self.images.subsample_indices(len(voters))
        indices = {voters.location(i): int(places[i]) for i in bad_voters}
        for split, bad in ((voters, bad_voters), (val, bad_val)):
            new = {where: reason for i, reason in bad.items() if (where := split.location(i)) not in self.knn_bad}
            self.knn_bad |= new
            for where, reason in new.items():
                if indices.get(where) not in self._named_bad:
                    self.log.warn(f"skipped {where}: {reason}")
            if new and (line := missing_images_warning(split, bad)) is not None:
                self.log.warn(f"online kNN: {line}")
        self._named_bad.update(indices.values())

    def _check_finite(self) -> None:
        bad = int(self.world.maximum(self.step.first_bad_step))
        if bad >= 0:
            raise RunError(
                f"the loss became NaN or infinite at step {bad} (lr {self.step.schedule.lr(bad):.4g}); {self._last_good()}; "
                "lower optim.base_lr, or set precision=fp32"
            )

    def _last_good(self) -> str:
        saved = checkpoint.list_checkpoints(self.folder / CHECKPOINTS)
        return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    def _all_bad_images(self) -> dict[int, str]:
        """Every rank's."""
        return {index: reason for bad in self.world.gather(self.loader.bad) for index, reason in bad.items()}

    def _name_bad_images(self) -> None:
        for index, reason in sorted(self.loader.bad.items()):
            if index not in self._named_bad:
                self._named_bad.add(index)
                self.log.warn(f"skipped {self.images.location(index)}: {reason}")


class _StopSignals:
    """SIGTERM, SIGINT and SIGHUP ask the loop to stop after the step in hand; a second SIGTERM or SIGINT ends the program at once.

    A SIGHUP that is ignored already, as under nohup, stays ignored. Shell and kernel may each send one when a terminal goes away.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Self:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._old = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else self._old[self.received])


def _other_files(state: dict[str, Any], ours: dict[str, list[int | str]], images: int) -> str:
    """What of the images is not what the checkpoint was made on; empty if they are the same. Old checkpoints hold their number only."""
    theirs = state.get("files")
    if theirs is None:
        return "" if state["images"] == images else f"{images} images instead of {state['images']}"
    differences = []
    for name in sorted(theirs.keys() | ours.keys()):
        (before, digest), (now, other) = theirs.get(name, (0, "")), ours.get(name, (0, ""))
        where = f"class {name!r}" if name else "the split"
        if before != now:
            differences.append(f"{where} has {now} images instead of {before}")
        elif digest != other:
            differences.append(f"{where} has other files")
    if len(differences) > 1 and all(text.endswith("has other files") for text in differences):
        return "every class has other files (those of a folder and of a .beton file made of it cannot be compared)"
    more = f" (and {len(differences) - _DIFFERENCES} more differences)" if len(differences) > _DIFFERENCES else ""
    return "; ".join(differences[:_DIFFERENCES]) + more


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
