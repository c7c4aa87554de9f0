"""TensorBoard: event files in RUN/tensorboard."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbyol.run import Run
from fastbyol.runtime.run_folder import TENSORBOARD
from fastbyol.trackers.base import Status, Tracker, tagged


class TensorBoard(Tracker):
    """Writes a new event file in every attempt. TensorBoard itself drops repeated steps."""

    label = "TensorBoard"

    def __init__(self) -> None:
        super().__init__()
        self._events: EventFile | None = None
        self._times_lost = 0

    def start(self, run: Run, known: str | None) -> None:
        """Create an event file."""
        self._events = EventFile(run.folder.path / TENSORBOARD, run.start)

    def log(self, run: Run, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Write the scalars, to a new file if the run's folder was created again."""
        assert self._events is not None
        if run.folder.times_lost > self._times_lost:
            self._times_lost = run.folder.times_lost
            self._events.close()
            self._events = EventFile(run.folder.path / TENSORBOARD, 0)
        self._events.write(step, tagged(kind, values))

    def finish(self, summary: Mapping[str, Any], status: Status) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()


class EventFile:
    """An event file, written synchronously: an error in SummaryWriter's thread would print a
    traceback.

    Args:
        folder: created if missing.
        start: steps done before; TensorBoard drops events of later steps.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if start:
            self._add(step=start + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step, by tag. Raises OSError if the file cannot be written."""
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=self._summary(value=scalars))

    def _add(self, **values: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **values).SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
