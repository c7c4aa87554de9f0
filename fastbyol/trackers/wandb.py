"""Weights & Biases. Its variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and more."""

import json
import os
from collections.abc import Mapping
from typing import Any

from fastbyol.run import Run
from fastbyol.runtime.files import json_text
from fastbyol.trackers.base import Status, Tracker, tagged


class Wandb(Tracker):
    """Sends metrics with `step` as W&B's step. The package sends them from another process."""

    name, label = "wandb", "W&B"

    def start(self, run: Run, known: str | None) -> str:
        """Start a run, or continue the one of this id, which W&B creates if it was never synced."""
        import wandb

        # Arguments would override the variables.
        defaults = {"project": "fastbyol", "name": run.config.name, "dir": str(run.folder.path)}
        chosen = {key: value for key, value in defaults.items() if f"WANDB_{key.upper()}" not in os.environ}
        continued = {} if known is None else {"id": known, "resume": "allow"}
        self._run = wandb.init(**chosen, **continued, config=run.config.to_dict())
        return self._run.id

    def log(self, run: Run, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Send a line."""
        self._run.log({"epoch": values["epoch"], **tagged(kind, values)}, step=step)

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Send the summary, and wait until everything is sent."""
        self._run.summary.update(json.loads(json_text(dict(summary))))  # without NaN
        self._run.finish(exit_code=int(status == "failed"))
