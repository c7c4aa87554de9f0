"""Trackio. Its variables: TRACKIO_SPACE_ID, TRACKIO_SERVER_URL, TRACKIO_DIR and more."""

import uuid
from collections.abc import Mapping
from typing import Any

from fastbyol.run import Run
from fastbyol.trackers.base import Status, Tracker, summary_numbers, tagged

_PROJECT = "fastbyol"  # Trackio has no variable for it


class Trackio(Tracker):
    """Sends metrics. The package sends them in a thread and only warns if it cannot."""

    name, label = "trackio", "Trackio"

    def start(self, run: Run, known: str | None) -> str:
        """Start a run, or continue the one of this name.

        Trackio continues the newest run of a name, so names need a unique suffix.
        """
        import trackio

        name = known or f"{run.config.name}-{uuid.uuid4().hex[:8]}"
        resume = "never" if known is None else "allow"
        self._run = trackio.init(_PROJECT, name=name, resume=resume, config=run.config.to_dict())
        return name

    def log(self, run: Run, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Queue a line."""
        self._run.log({"epoch": values["epoch"], **tagged(kind, values)}, step=step)

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Send the numbers of the summary as metrics, and what is queued."""
        import trackio

        if numbers := summary_numbers(summary):
            self._run.log(numbers, step=summary["steps"])
        trackio.finish()
