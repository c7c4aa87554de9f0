"""Hooks of a training run.

Evaluations beside the training, experiment trackers and initial weights are callbacks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastbyol.build import Training
from fastbyol.config import Config
from fastbyol.data import Batch
from fastbyol.model import BYOL, BYOLOutput

if TYPE_CHECKING:
    from fastbyol.run import Run


class Callback:
    """Base class; every hook does nothing by default.

    A run calls its callbacks in the order in which they are given:

        on_model                            new runs only
        on_build
        load_state_dict                     resumed runs only
        on_start
        on_step, on_metrics, on_epoch_end   repeatedly
        on_end, or on_error

    All ranks call a hook at the same time, except `summary` and `state_dict`, which only rank 0
    calls, and `on_error`.

    An exception in a hook ends the run. The log is closed, and existing checkpoints stay valid. The
    exception propagates, but an OSError or a lack of memory becomes a RunError, with the exception
    as its cause.
    """

    name = ""
    """Key of the state in checkpoints, unique. Empty: the callback has no state."""

    def on_model(self, model: BYOL, config: Config) -> None:
        """Called once in a new run, before the model moves to the device."""

    def on_build(self, training: Training) -> None:
        """Called when the parts are built, before a checkpoint is loaded.

        Raises:
            InputError: the config does not fit the data.
        """

    def on_start(self, run: "Run") -> None:
        """Called before the first step. A checkpoint is loaded, and the log is open."""

    def on_step(self, run: "Run", batch: Batch, output: BYOLOutput) -> None:
        """Called after every step. Do not read device values here: that would wait for the GPU."""

    def on_metrics(self, run: "Run", kind: str, step: int, values: Mapping[str, float]) -> None:
        """Called after every line of metrics.jsonl, thus also after every evaluation.

        Args:
            kind: "train", "knn", "quality" or "probe".
            step: optimizer steps done.
            values: epoch, loss and all others of the line (see `RunLog`). Rate and waiting time are
                those of the rank.
        """

    def on_epoch_end(self, run: "Run", done: int) -> bool:
        """Called after every epoch, `done` steps into the run.

        Return True on all ranks to save the best checkpoint.
        """
        return False

    def on_end(self, run: "Run", summary: Mapping[str, Any]) -> None:
        """Called once, when the run is finished or was stopped by a signal, and is saved.

        Args:
            summary: of summary.json; empty on ranks other than 0.
        """

    def on_error(self, run: "Run", error: BaseException) -> None:
        """Called on the ranks where an error ends the built run; other ranks may be gone.

        The error may come before `on_start` or after `on_end` of this callback. An exception raised
        here is logged, and `error` propagates.
        """

    def summary(self) -> dict[str, Any]:
        """Return entries of summary.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the result of `state_dict`.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError: the state does not fit.
        """
