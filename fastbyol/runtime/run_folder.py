"""The folder of a run: its files, its lock, and the checkpoint that the run continues from."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastbyol.config import Config
from fastbyol.errors import InputError, RunError
from fastbyol.runtime import checkpoint, environment
from fastbyol.runtime.distributed import World
from fastbyol.runtime.files import FolderLock, json_text, read_json_or, write_file
from fastbyol.runtime.logging import logger
from fastbyol.runtime.run_files import CHECKPOINTS, CONFIG, ENVIRONMENT, REPORT, STACKS, SUMMARY
from fastbyol.runtime.run_log import LOG, METRICS

TENSORBOARD, TRACKERS = "tensorboard", "trackers.json"
_LOCK_WAIT_S = 20.0

Checkpoint = tuple[Path, dict[str, Any]]  # file and content


class RunFolder:
    """RUNS/NAME, locked by the main process.

    Args:
        lock: of the folder; None on other ranks.
        found: the checkpoint to continue from, None for a new run.
    """

    def __init__(self, path: Path, lock: FolderLock | None, found: Checkpoint | None) -> None:
        self.path, self._lock, self.found = path, lock, found
        self.times_lost = 0
        """How often `ensure_exists` has created the folder again."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def last_good(self) -> str:
        """Return the end of an error message: which checkpoint is the last good one."""
        saved = checkpoint.list_checkpoints(self.checkpoints)
        return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"

    def finished_step(self, config: Config) -> int | None:
        """Return the step of the checkpoint if it is all that the config asks for, None if there is
        work left.

        A run that was killed between its last checkpoint and its summary is not finished: the
        summary is work left.

        Raises:
            InputError: see `checkpoint.checkpoint_config`.
        """
        if self.found is None:
            return None
        path, state = self.found
        step, total = state["step"], _total_steps(config, self.found)
        own = path.resolve().parent == self.checkpoints.resolve()
        summary = read_json_or(self.path / SUMMARY, lambda text: None)
        closed = isinstance(summary.get("steps"), int) and summary["steps"] >= step
        # Older versions counted floor(N / B) steps per epoch: what was complete then stays so.
        same_epochs = state["config"].get("optim", {}).get("epochs") == config.optim.epochs
        complete = closed and summary.get("total_steps") == summary["steps"] == step and same_epochs
        return step if step > total or complete or (step == total and (closed or not own)) else None

    def log_finished(self, config: Config) -> None:
        """Log that there is nothing to do."""
        assert self.found is not None
        path, _ = self.found
        has_report = (self.path / REPORT).exists() or not (self.path / SUMMARY).exists()
        report = "" if has_report else f"; `fastbyol report --run {self.path}` writes the missing report"
        logger.info(
            f"already finished: checkpoint {path} is of epoch {_epoch(config, self.found)}, optim.epochs={config.optim.epochs}; "
            f"nothing to do. A larger optim.epochs continues from there, with the schedules of the larger number{report}"
        )

    def prepare(self, config: Config) -> None:
        """Write the config and the environment.

        Raises:
            InputError: the folder cannot be written, or something is in the way of one of the run's
                files.
        """
        self._check_names()
        try:
            write_file(self.path / CONFIG, json_text(config.to_dict()))
            write_file(self.path / ENVIRONMENT, json_text(environment.describe()))
        except OSError as error:
            raise InputError(f"runs={config.runs}: {self.path} cannot be written: {error.strerror}") from None

    def ensure_exists(self, config: Config) -> bool:
        """Create the folder again if it was moved or removed during the run; return True if it was.

        Raises:
            RunError: another run has taken the folder's name.
        """
        assert self._lock is not None
        try:
            if not self._lock.renew() or (self.path / CONFIG).exists():  # only the lock file was removed
                return False
            self.prepare(config)
        except InputError as error:
            raise RunError(f"{error} (this run's own folder was moved or removed); {self.last_good()}") from None
        self.times_lost += 1
        logger.warning(f"{self.path} was moved or removed during the run; the run continues in a new folder")
        return True

    def _check_names(self) -> None:
        """Fail now rather than when a file is written, which may be after the training."""
        names = (CONFIG, ENVIRONMENT, SUMMARY, METRICS, LOG, STACKS, REPORT, TRACKERS)
        files = [self.path / name for name in names]
        files += [self.checkpoints / checkpoint.BEST, *checkpoint.list_checkpoints(self.checkpoints)]
        for path in files:
            if os.path.lexists(path) and not (path.is_file() or path.is_char_device()):
                raise InputError(f"{path} is not a file, but the run writes one there: move it away")
        for path in (self.checkpoints, self.path / TENSORBOARD):
            if os.path.lexists(path) and not path.is_dir():
                raise InputError(f"{path} is not a folder, but the run writes into one there: move it away")


@contextmanager
def open_run_folder(config: Config, world: World) -> Iterator[RunFolder]:
    """Context manager: lock the run's folder and find the checkpoint to continue from.

    Every rank must call this.

    Raises:
        InputError: another run holds the folder, or see `_find_checkpoint`.
    """
    path = Path(config.runs) / config.name
    with ExitStack() as stack:
        with world.sync_errors():
            lock = None
            if world.is_main_process:  # after a restart by torchrun, the old workers may still hold the lock
                lock = FolderLock(path, wait_s=_LOCK_WAIT_S if world.restarts else 0)
                stack.enter_context(lock)
        with world.sync_errors():
            found = _find_checkpoint(config, path, world)
        yield RunFolder(path, lock, found)


def _find_checkpoint(config: Config, run: Path, world: World) -> Checkpoint | None:
    """Return the checkpoint that config.resume names, None for a new run.

    Workers restarted by torchrun continue the run.

    Raises:
        InputError: it does not exist or is damaged, or resume=none would mix two runs.
    """
    folder = run / CHECKPOINTS
    own = checkpoint.list_checkpoints(folder)
    resume = "auto" if world.restarts and (own or config.resume == "none") else config.resume
    if resume == "none":
        if own:
            raise InputError(f"{run} already holds a run: continue it with --resume auto, or choose another --name")
        return None
    if Path(resume).is_dir() and Path(resume).resolve() in (run.resolve(), folder.resolve()):
        resume = "auto"
    return _latest_valid(folder) if resume == "auto" else _named_checkpoint(resume, run, folder, own)


def _named_checkpoint(resume: str, run: Path, folder: Path, own: list[Path]) -> Checkpoint:
    found = checkpoint.resolve(Path(resume))
    inside = found[0].resolve().parent == folder.resolve()
    if own and not (inside and found[1]["step"] >= checkpoint.checkpoint_step(own[-1])):
        raise InputError(
            f"--resume {resume}: {run} already holds a run up to {own[-1].name}: continue it with --resume auto, or continue from "
            f"{found[0].name} with another --name"
        )
    return found


def _latest_valid(folder: Path) -> Checkpoint | None:
    damaged: list[str] = []
    found = checkpoint.latest_valid(folder, damaged.append)
    if found is None and damaged:
        best = folder / checkpoint.BEST
        hint = f"; --resume {best} with another --name continues from the best one" if best.exists() else ""
        raise InputError(f"--resume auto: no checkpoint in {folder} is usable: {damaged[-1]}{hint}")
    for text in damaged:
        logger.warning(text)
    return found


def _total_steps(config: Config, found: Checkpoint) -> int:
    """Return the steps of a run that continues from a checkpoint with this config."""
    return config.optim.epochs * found[1]["images"] // _batch_size(config, found)


def _epoch(config: Config, found: Checkpoint) -> int:
    """Return the epoch that a checkpoint is of, complete or not."""
    return -(-found[1]["step"] * _batch_size(config, found) // found[1]["images"])


def _batch_size(config: Config, found: Checkpoint) -> int:
    data = config.data if config.data.batch_size != "auto" else checkpoint.checkpoint_config(*found).data
    return data.batch_size
