"""What a run tells: the progress bar, metrics.jsonl, TensorBoard, and lines of text on the console and in train.log."""

import errno
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastbyol.errors import FastbyolError, printable
from fastbyol.runtime.console import SECONDS_BETWEEN_LINES, Output
from fastbyol.runtime.files import write_file

METRICS, LOG, TENSORBOARD = "metrics.jsonl", "train.log", "tensorboard"


class RunLog:
    """Writes one line of metrics.jsonl per event and keeps the progress bar.

    Lines: {"kind": "train", step, epoch, loss, lr, tau, projection_std, images_per_s, wait_share},
    with float16 also loss_scale and skipped_steps, and
    {"kind": "knn", step, epoch, top1, top5} and {"kind": "probe", step, epoch, loss, top5, top1}; `step` counts the optimizer steps done.

    Args:
        folder: of the run.
        start: steps done before; later lines of an earlier attempt are dropped, since those steps are done again.
        total_steps, steps_per_epoch, batch_size: of the run.
        tensorboard: also write event files.
        speaks: False for all ranks but the first: they write and print nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        tensorboard: bool,
        speaks: bool = True,
    ) -> None:
        self._output = Output.of(sys.stdout)
        self.console = Console(quiet=not speaks, file=self._output, emoji=False)  # type: ignore[arg-type]
        self._folder, self._batch_size, self._steps_per_epoch = folder, batch_size, steps_per_epoch
        self._total_steps, self._epochs = total_steps, total_steps // steps_per_epoch
        self._file = self._log = None
        if speaks:
            # Unbuffered: a line is on its way to the disk when it is written.
            self._log = open(folder / LOG, "ab", buffering=0)
            _truncate(folder, start, self.warn)
            self._file = open(folder / METRICS, "ab", buffering=0)
        self._tensorboard = _Events(folder / TENSORBOARD, start) if tensorboard and speaks else None
        self._mark = start, time.perf_counter(), 0.0  # step, clock and waiting time at the last training line
        self._paused_s, self._said = 0.0, time.monotonic()
        self._shown: dict[str, str] = {}
        # Step and clock of the first step, until a training line knows better.
        self._first: tuple[int, float] | None = None
        self._progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            _Values(self._shown),  # last: it is what a narrow terminal breaks into lines
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start, epoch=self._epoch_text(start))

    def reopen(self) -> None:
        """Goes on in new files, where the folder has been made anew."""
        for file in (self._file, self._log, self._tensorboard):
            if file is not None:
                file.close()
        self._log, self._file = (open(self._folder / name, "ab", buffering=0) for name in (LOG, METRICS))
        if self._tensorboard is not None:
            self._tensorboard = _Events(self._folder / TENSORBOARD, 0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
        if isinstance(error, FastbyolError):
            self._note(f"error: {error}")
        for file in (self._file, self._log):
            if file is not None:
                file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def first(self, step: int, loss: float) -> None:
        """The first step of this attempt: the bar shows its loss, and a rate from here on, before the first training line."""
        self._shown["loss"] = f"{loss:.3f}"
        self._show_rate(step, *self._mark[:2])
        self._first = step, time.perf_counter()

    def _show_rate(self, step: int, since: int, began: float) -> None:
        self._shown["img/s"] = f"{(step - since) * self._batch_size / max(time.perf_counter() - began, 1e-9):.0f}"

    def advance(self, step: int) -> None:
        """Moves the bar; reads nothing from the device."""
        if self._first is not None and step > self._first[0]:
            self._show_rate(step, *self._first)
        self._progress.update(self._task, completed=step, epoch=self._epoch_text(step))

    def train(
        self,
        step: int,
        *,
        loss: float,
        lr: float,
        tau: float,
        projection_std: float,
        wait_s: float,
        **more: float,
    ) -> None:
        """One training line; wait_s is the loader's total so far. Speed and waiting share are since the last line."""
        now, (last_step, last_time, last_wait) = time.perf_counter(), self._mark
        elapsed = max(now - last_time - self._paused_s, 1e-9)
        self._mark, self._paused_s, self._first = (step, now, wait_s), 0.0, None
        self._write(
            "train",
            step,
            loss=loss,
            lr=lr,
            tau=tau,
            projection_std=projection_std,
            images_per_s=(step - last_step) * self._batch_size / elapsed,
            wait_share=min((wait_s - last_wait) / elapsed, 1.0),
            **more,
        )

    def knn(self, step: int, accuracy: dict[str, float]) -> None:
        """One line of an online kNN evaluation."""
        self._write("knn", step, **accuracy)

    def probe(self, step: int, epoch: dict[str, float]) -> None:
        """One line of the online classifier's epoch, also on the console: Train Epoch, Loss, Top5 Accuracy, Top1 Accuracy."""
        self._write("probe", step, **epoch)
        self.say(
            f"Train {self._epoch_text(step).capitalize().replace(' ', ': ')}  Loss {epoch['loss']:.4f}  "
            f"Top5 Accuracy {epoch['top5']:.2%}  Top1 Accuracy {epoch['top1']:.2%}"
        )

    def say(self, text: str) -> None:
        """One line of text above the bar."""
        self._print(text, None)

    def warn(self, text: str) -> None:
        """One line that asks for attention."""
        self._print(f"warning: {text}", "yellow")

    def _print(self, text: str, style: str | None) -> None:
        gone = self._output.lost
        self._note(text)
        self.console.print(printable(text), style=style, highlight=False, markup=False, soft_wrap=True)
        if self._output.lost != gone:
            self._note(
                f"warning: the console is gone ({self._output.lost}): from here on this file alone tells of the run"
            )

    def _note(self, text: str) -> None:
        """A line of train.log. One that cannot be written must not end the run: metrics.jsonl says so if the disk is full."""
        if self._log is not None:
            with suppress(OSError):
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {printable(text)}\n".encode())

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside (evaluation, checkpoints) does not count as training time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - before

    def _write(self, kind: str, step: int, **values: float) -> None:
        if self._file is None:
            return
        epoch = step / self._steps_per_epoch
        line = (json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder / METRICS)) from None
        if self._tensorboard is not None:
            try:
                self._tensorboard.write(step, {f"{kind}/{name}": value for name, value in values.items()})
            except OSError as error:
                self._tensorboard.close()
                self._tensorboard = None
                self.warn(f"TensorBoard's events cannot be written: {error.strerror}; the run goes on without them")
        if kind == "train":
            self._shown |= {
                "loss": f"{values['loss']:.3f}",
                "lr": f"{values['lr']:.3g}",
                "tau": f"{values['tau']:.4f}",
                "img/s": f"{values['images_per_s']:.0f}",
                "wait": f"{values['wait_share']:.0%}",
            }
        elif kind == "knn":
            self._shown["knn"] = f"{values['top1']:.1%}"
        if not self.console.is_terminal and (kind == "knn" or time.monotonic() - self._said >= SECONDS_BETWEEN_LINES):
            self._said = time.monotonic()
            self.say(f"{self._epoch_text(step)}  step {step}/{self._total_steps}  {_join(self._shown)}")

    def _epoch_text(self, step: int) -> str:
        return f"epoch {max(1, -(-step // self._steps_per_epoch))}/{self._epochs}"


def read_metrics(folder: Path, warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; empty if there is none. Damaged lines are left out, and `warn` gets their number."""
    path = folder / METRICS
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        warn(f"{path}: cannot be read: {error.strerror}")
        return []
    found = [_line(line) for line in text.splitlines()]
    lines = [line for line in found if line is not None]
    if len(lines) < len(found):
        warn(f"{path}: {len(found) - len(lines)} of {len(found)} lines are damaged and left out")
    return lines


_NUMBERS = {  # of a line of each kind, beside step and epoch
    "train": ("loss", "lr", "tau", "projection_std", "images_per_s", "wait_share"),
    "knn": ("top1", "top5"),
    "probe": ("loss", "top1", "top5"),
}


def _line(text: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is damaged or of no kind that a run writes."""
    try:
        line = json.loads(text)
        sound = all(math.isfinite(line[key]) for key in ("step", "epoch", *_NUMBERS[line["kind"]]))
        return line if sound and isinstance(line["step"], int) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


class _Values(ProgressColumn):
    def __init__(self, values: dict[str, str]) -> None:
        self._values = values
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(_join(self._values))


def _join(values: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


class _Events:
    """An event file of TensorBoard's. Each line is written at once: a thread, such as SummaryWriter's, would fail beside the run.

    Args:
        folder: made where it is missing.
        start: steps done before; TensorBoard drops the events of later ones.
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
        """Scalars of a step, by tag.

        Raises:
            OSError: the file cannot be written.
        """
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=self._summary(value=scalars))

    def _add(self, **values: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **values).SerializeToString())

    def close(self) -> None:
        self._file.close()


def _truncate(folder: Path, step: int, warn: Callable[[str], None]) -> None:
    """Keeps the lines of the steps up to `step`; damaged ones, such as a last line cut short by a crash, go too."""
    path = folder / METRICS
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_metrics(folder, warn) if line["step"] <= step]
        write_file(path, "".join(kept))
