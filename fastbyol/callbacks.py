"""Hooks of a training run.

Evaluations beside the training, trackers and initial weights are callbacks.
"""

from typing import TYPE_CHECKING, Any

from fastbyol.build import Training
from fastbyol.config import Config
from fastbyol.data import Batch
from fastbyol.model import BYOL, BYOLOutput

if TYPE_CHECKING:
    from fastbyol.run import Run


class Callback:
    """Base class; every hook does nothing by default. All ranks call all hooks at the same time."""

    name = ""
    """Key of the state in checkpoints, unique. Empty: the callback has no state."""

    def on_model(self, model: BYOL, config: Config) -> None:
        """Called once in a new run, before the model moves to the device."""

    def on_build(self, training: Training) -> None:
        """Called when the parts are built, before a checkpoint is loaded.

        Raises:
            InputError: the config does not fit the data.
        """

    def on_step(self, run: "Run", batch: Batch, output: BYOLOutput) -> None:
        """Called after every step. Do not read device values here: that would wait for the GPU."""

    def on_epoch_end(self, run: "Run", done: int) -> bool:
        """Called after every epoch, `done` steps into the run.

        Return True on all ranks to save the best checkpoint.
        """
        return False

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
