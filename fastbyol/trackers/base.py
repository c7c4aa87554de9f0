"""What the trackers have in common: which run of the service to continue, and how they fail.

A resumed run continues the same run of its trackers. RUN/trackers.json has their ids, and so has
the checkpoint, for a run whose folder is lost:

    {"wandb": {"id": "1x2y3z", "last_steps": {"train": 120, "knn": 100}}}

A resumed run repeats the steps after its checkpoint. Services keep both values of a repeated step,
or warn about each. Lines of metrics.jsonl that an earlier attempt has written are therefore not
sent again; `last_steps` has the last step of each kind.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from fastbyol.callbacks import Callback
from fastbyol.errors import InputError, error_reason
from fastbyol.run import Run
from fastbyol.runtime.files import json_text, read_json_or, write_file
from fastbyol.runtime.logging import logger
from fastbyol.runtime.run_folder import TRACKERS

Status = Literal["finished", "stopped", "failed"]


class Tracker(Callback):
    """Base class.

    A new run does not begin if a tracker cannot start. Later errors, and those at the start of a
    resumed run, which nobody may be watching, end the tracker with one warning but not the run.
    """

    label = ""
    """Name in messages."""

    def __init__(self) -> None:
        self.id: str | None = None
        """Of the service's run."""
        self._active = False
        self._saved: dict[str, Any] = {}  # of the checkpoint
        self._run_name = ""
        self._last_steps: dict[str, int] = {}

    def start(self, run: Run, known: str | None) -> str | None:
        """Start a run of the service, or continue the one with id `known`. Return its id."""
        raise NotImplementedError

    def log(self, run: Run, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send a line of metrics.jsonl."""
        raise NotImplementedError

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Send the summary, {} if the run failed, and end the service's run."""
        raise NotImplementedError

    def close(self) -> None:
        """Release files and threads after an error."""

    def on_start(self, run: Run) -> None:
        """Start or continue the service's run.

        Raises:
            InputError: a new run cannot start.
        """
        self._run_name = run.config.name
        path, entry = run.folder.path / TRACKERS, {}
        if run.config.resume != "none" or run.world.restarts:
            entry = read_json_or(path).get(self.name, {})
        if self._saved.get("run") == self._run_name:  # a branch with another name is another run
            entry = {"id": self._saved["id"]} | entry
        known = self.id = entry.get("id")
        if known is not None:
            before = entry.get("last_steps", {})
            self._last_steps = before | {k: max(s, before.get(k, 0)) for k, s in run.log.last_steps.items()}
        try:
            self.id = self.start(run, known)
            if self.id is not None:
                ids = read_json_or(path) | {self.name: {"id": self.id, "last_steps": self._last_steps}}
                write_file(path, json_text(ids))
            self._active = True
        except Exception as error:  # services raise errors of many types
            self.close()
            text = f"{self.label} cannot start: {error_reason(error).rstrip('.')}"
            if known is None:
                raise InputError(f"{text}; fix this, or remove the tracker from log.trackers") from error
            logger.warning(f"{text}; the run continues without it")

    def on_metrics(self, run: Run, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send a line, unless an earlier attempt has sent it."""
        if self._active and step > self._last_steps.get(kind, -1):
            try:
                self.log(run, kind, step, values)
            except Exception as error:
                self._active = False
                self.close()
                logger.warning(f"{self.label} has failed: {error_reason(error)}; the run continues without it")

    def on_end(self, run: Run, summary: Mapping[str, Any]) -> None:
        """Send the summary, and end the service's run."""
        self._finish(summary, "finished" if summary["steps"] == summary["total_steps"] else "stopped")

    def on_error(self, run: Run, error: BaseException) -> None:
        """End the service's run as failed."""
        self._finish({}, "failed")

    def _finish(self, summary: Mapping[str, Any], status: Status) -> None:
        if not self._active:
            return
        self._active = False
        try:
            self.finish(summary, status)
        except Exception as error:
            self.close()
            logger.warning(f"{self.label} has failed at the end of the run: {error_reason(error)}")

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the service's run."""
        return {} if self.id is None else {"run": self._run_name, "id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._saved = {"run": str(state["run"]), "id": str(state["id"])}


def summary_numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return {"summary/loss": 1.0}, for services without a summary."""
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float)}
    return {f"summary/{key}": value for key, value in numbers.items() if math.isfinite(value)}


def tagged(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return {"train/loss": 1.0} for the loss of a training line. The epoch is left out."""
    return {f"{kind}/{name}": value for name, value in values.items() if name != "epoch"}
