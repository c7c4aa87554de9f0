"""Partial result of an evaluation, saved so that one that was killed goes on: the finished rows,
and the training of the current row after every epoch.

The file lies beside the result and is removed with it. Rank 0 writes it, all ranks read it.
"""

from pathlib import Path
from typing import Any

import torch

from fastbyol.data.decode import BadImage, decode
from fastbyol.errors import InputError, RunError, error_reason
from fastbyol.runtime.checkpoint import read_archive
from fastbyol.runtime.distributed import World
from fastbyol.runtime.files import atomic_write
from fastbyol.runtime.logging import logger

SUFFIX = ".partial"
State = dict[str, Any]  # plain values and tensors


class PartialResult:
    """Finished rows, and states of the current one.

    Args:
        path: the file; None keeps nothing.
        key: identifies the evaluation. A file with another key is not used.
        world: all ranks must call all methods.
    """

    def __init__(self, path: Path | None = None, key: str = "", world: World | None = None) -> None:
        self._path, self._key, self._world = path, key, world or World()
        self.rows: dict[str, State] = {}
        """Finished rows: title -> metrics."""
        self.rates: dict[str, float] = {}
        """Images per second of the rows that extracted features."""
        self.bad: dict[str, str] = {}
        """Unreadable images so far: path -> reason."""
        self._stages: dict[str, State] = {}

    def open(self) -> None:
        """Read the file if there is one. It is not used if an image that it lacks is readable now.

        Raises:
            InputError: the ranks evaluate different things, or read different files.
        """
        found: State = {}
        if self._path is not None and self._path.exists():
            try:
                found = read_archive(self._path, f"{self._path}")
            except InputError as error:
                logger.warning(f"{error}; the evaluation starts from the beginning")
        if found.get("key") == self._key:
            self.rows, self.rates, self.bad = found["rows"], found["rates"], found["bad"]
            self._stages = found["stages"]
        epochs = {name: stage.get("epoch") for name, stage in self._stages.items()}
        keys, *states = zip(*self._world.gather((self._key, list(self.rows), epochs)), strict=True)
        if len(set(keys)) > 1:
            raise InputError(
                "the ranks found different checkpoints or data: use a shared disk, and name a checkpoint file if a "
                "training still writes to the run"
            )
        if any(part != parts[0] for parts in states for part in parts):
            raise InputError(f"the ranks found different files {self._path}: results must lie on a shared disk")
        repaired = next(filter(_is_readable, self.bad), None) if self._world.is_main_process else None
        if (repaired := self._world.gather(repaired)[0]) is not None:
            logger.warning(
                f"{repaired} was skipped before and can be read now: the evaluation starts from the beginning"
            )
            self.rows, self.rates, self.bad, self._stages = {}, {}, {}, {}

    def stage(self, name: str) -> State | None:
        """Return the last state that was saved under a name for the current row, or None."""
        return self._stages.get(name)

    def save(self, name: str, state: State) -> None:
        """Save a state of the current row, in place of the last one of this name.

        Does nothing without a file.

        Raises:
            RunError: the file cannot be written.
        """
        if self._path is not None:
            self._stages[name] = state
            self._write()

    def finish_row(self, title: str, row: State, images_per_s: float | None = None) -> None:
        """Save a row, and drop the states that led to it.

        Args:
            images_per_s: rate of feature extraction, if there was any.

        Raises:
            RunError: the file cannot be written.
        """
        self.rows[title], self._stages = row, {}
        if images_per_s is not None:
            self.rates[title] = images_per_s
        self._write()

    def remove(self) -> None:
        """Remove the file: the result is written."""
        if self._path is not None and self._world.is_main_process:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._path is None or not self._world.is_main_process:
            return
        values = {
            "key": self._key,
            "rows": self.rows,
            "rates": self.rates,
            "bad": self.bad,
            "stages": self._stages,
        }
        try:
            with atomic_write(self._path) as temporary, open(temporary, "wb") as file:
                torch.save(values, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise RunError(f"partial result {self._path} could not be written: {error_reason(cause)}") from None


def _is_readable(path: str) -> bool:
    try:
        decode(Path(path).read_bytes())
    except (OSError, BadImage):
        return False
    return True
