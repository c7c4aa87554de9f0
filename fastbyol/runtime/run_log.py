"""Log of a run: progress bar, metrics.jsonl, and train.log with messages."""

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from numbers import Rational
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastbyol.errors import FastbyolError, printable
from fastbyol.runtime.console import SECONDS_BETWEEN_LINES
from fastbyol.runtime.console import Output as SafeStream
from fastbyol.runtime.files import write_file
from fastbyol.runtime.logging import format_record, logger

METRICS, LOG = "metrics.jsonl", "train.log"


class RunLog:
    """Context manager that writes metrics.jsonl and train.log, and draws the progress bar.

    Lines of metrics.jsonl; `step` counts the optimizer steps done:
        {"kind": "train", step, epoch, loss, lr, tau, projection_std, images_per_s, wait_share}
            in float16 also loss_scale and skipped_steps
        {"kind": "knn", step, epoch, top1, top5, seconds, time_share}
            seconds of this evaluation; share of all so far in the time of the run
        {"kind": "quality", step, epoch, rank_me, alignment, uniformity, projection_std,
            seconds, time_share}
        {"kind": "probe", step, epoch, loss, top5, top1}

    Args:
        folder: of the run.
        start: steps done before. Later lines of an earlier attempt are dropped, since the run
            repeats these steps.
        total_steps, steps_per_epoch, batch_size: of the run; see `Schedule`.
        on_line: called with kind, step and the other values of a line, on all ranks, after the line
            is written.
        early: records logged before this; train.log begins with them.
        is_main_process: other ranks write and print nothing.

    Attributes:
        last_steps: kind -> step of the last line that earlier attempts wrote.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start: int,
        total_steps: int,
        steps_per_epoch: Rational,
        batch_size: int,
        on_line: Callable[[str, int, dict[str, float]], object] = lambda kind, step, values: None,
        early: Sequence[logging.LogRecord] = (),
        is_main_process: bool = True,
    ) -> None:
        self._folder, self._batch_size, self._steps_per_epoch = folder, batch_size, steps_per_epoch
        self._total_steps, self._epochs = total_steps, math.ceil(total_steps / steps_per_epoch)
        self._console = Console(quiet=not is_main_process, file=SafeStream.of(sys.stdout), emoji=False)  # type: ignore[arg-type]
        self._on_line = on_line
        self.last_steps: dict[str, int] = {}
        self._metrics: Any = None
        self._text = _TextLog(folder / LOG)
        if is_main_process:
            self._text.open(early)
            self.last_steps = _drop_later_lines(folder, start)
            self._metrics = _append(folder / METRICS)
        self._mark = start, time.perf_counter(), 0.0  # step, clock and waiting time at the last training line
        self._paused_s, self._printed = 0.0, time.monotonic()
        self._first: tuple[int, float] | None = None  # step and clock of the first step, until the first training line
        self._shown: dict[str, str] = {}  # values of the progress bar
        self._progress = Progress(
            TextColumn("{task.fields[epoch]}"),
            BarColumn(bar_width=10),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            _Values(self._shown),  # last, since a narrow terminal wraps it
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start, epoch=self._epoch_text(start))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
        if isinstance(error, FastbyolError):
            self._text.write(f"error: {error}")
        self._close_files()

    def reopen(self) -> None:
        """Continue in new files, after the folder has been created again."""
        self._close_files()
        self._text.open()
        self._metrics = _append(self._folder / METRICS)

    def first(self, step: int, loss: float) -> None:
        """Show loss and rate of the first step, before the first training line."""
        self._shown["loss"] = f"{loss:.3f}"
        self._show_rate(step, *self._mark[:2])
        self._first = step, time.perf_counter()

    def advance(self, step: int) -> None:
        """Move the progress bar. Reads nothing from the device."""
        if self._first is not None and step > self._first[0]:
            self._show_rate(step, *self._first)
        self._progress.update(self._task, completed=step, epoch=self._epoch_text(step))

    def train(
        self, step: int, *, loss: float, lr: float, tau: float, projection_std: float, wait_s: float, **more: float
    ) -> None:
        """Write a training line.

        `wait_s` is the loader's total so far; rate and share of waiting are since the last line.
        """
        now, (last_step, last_time, last_wait) = time.perf_counter(), self._mark
        elapsed = max(now - last_time - self._paused_s, 1e-9)
        self._mark, self._paused_s, self._first = (step, now, wait_s), 0.0, None
        rate, wait = (step - last_step) * self._batch_size / elapsed, min((wait_s - last_wait) / elapsed, 1.0)
        shown = {
            "loss": f"{loss:.3f}",
            "lr": f"{lr:.3g}",
            "tau": f"{tau:.4f}",
            "img/s": f"{rate:.0f}",
            "wait": f"{wait:.0%}",
        }
        values = {"loss": loss, "lr": lr, "tau": tau, "projection_std": projection_std}
        self._write("train", step, values | {"images_per_s": rate, "wait_share": wait} | more, shown)

    def knn(self, step: int, values: dict[str, float]) -> None:
        """Write a line of an online kNN evaluation."""
        self._write("knn", step, values, {"knn": f"{values['top1']:.1%}"})

    def quality(self, step: int, values: dict[str, float]) -> None:
        """Write a line of the features' quality without labels."""
        self._write("quality", step, values, {"rank": f"{values['rank_me']:.0f}"})

    def probe(self, step: int, epoch: dict[str, float]) -> None:
        """Write and print a line of the online classifier's epoch: Train Epoch, Loss, Top5
        Accuracy, Top1 Accuracy.
        """
        self._write("probe", step, epoch, {})
        if self._metrics is not None:
            logger.info(
                f"Train {self._epoch_text(step).capitalize().replace(' ', ': ')}  Loss {epoch['loss']:.4f}  "
                f"Top5 Accuracy {epoch['top5']:.2%}  Top1 Accuracy {epoch['top1']:.2%}"
            )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager: time inside (evaluation, checkpoints) is not training time."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - before

    def _write(self, kind: str, step: int, values: dict[str, float], shown: dict[str, str]) -> None:
        """Write a line of metrics.jsonl; the progress bar takes `shown`."""
        values = {"epoch": float(step / self._steps_per_epoch), **values}
        if self._metrics is None:
            self._on_line(kind, step, values)
            return
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        try:
            if self._metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder / METRICS)) from None
        self._on_line(kind, step, values)
        self._shown |= shown
        overdue = time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and (kind == "knn" or overdue):
            self._printed = time.monotonic()
            logger.info(f"{self._epoch_text(step)}  step {step}/{self._total_steps}  {_join(self._shown)}")

    def _close_files(self) -> None:
        self._text.close()
        if self._metrics is not None:
            self._metrics.close()

    def _show_rate(self, step: int, since: int, began: float) -> None:
        self._shown["img/s"] = f"{(step - since) * self._batch_size / max(time.perf_counter() - began, 1e-9):.0f}"

    def _epoch_text(self, step: int) -> str:
        return f"epoch {max(1, math.ceil(step / self._steps_per_epoch))}/{self._epochs}"


class _TextLog(logging.Handler):
    """Writes all records of the logger to train.log, with the time.

    A line that cannot be written does not end the run: metrics.jsonl fails too if the disk is full.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file: Any = None
        self._lost: str | None = None  # why the console cannot be written

    def open(self, early: Sequence[logging.LogRecord] = ()) -> None:
        """Start, with the records logged before."""
        self._file = _append(self._path)
        for record in early:
            self.emit(record)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, and one line as soon as the console is unavailable."""
        self.write(format_record(record), record.created)
        lost = getattr(sys.stdout, "lost", None)
        if lost != self._lost:
            self._lost = lost
            self.write(f"warning: the console is gone ({lost}): from here on only this file has the run's messages")

    def write(self, text: str, at: float | None = None) -> None:
        """Write one line."""
        if self._file is not None:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
            with suppress(OSError):
                self._file.write(f"{stamp} {printable(text)}\n".encode())

    def close(self) -> None:
        """Stop."""
        logger.removeHandler(self)
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


class EarlyRecords(logging.Handler):
    """Context manager that collects records until `release`, when train.log can take them."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect the record."""
        self._records.append(record)

    def release(self) -> list[logging.LogRecord]:
        """Return the records and stop collecting."""
        logger.removeHandler(self)
        return self._records

    def __enter__(self) -> Self:
        logger.addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        logger.removeHandler(self)


def _append(path: Path) -> Any:
    """Open a file to append to, unbuffered: a line is on its way to the disk when it is written."""
    return open(path, "ab", buffering=0)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, [] without one.

    Damaged lines are left out, with a warning.
    """
    path = folder / METRICS
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        logger.warning(f"{path}: cannot be read: {error.strerror}")
        return []
    found = [_parse_line(line) for line in text.splitlines()]
    lines = [line for line in found if line is not None]
    if len(lines) < len(found):
        logger.warning(f"{path}: left out {len(found) - len(lines)} of {len(found)} lines, which are damaged")
    return lines


_NUMBERS = {  # of each kind of line, besides step and epoch
    "train": ("loss", "lr", "tau", "projection_std", "images_per_s", "wait_share"),
    "knn": ("top1", "top5"),
    "quality": ("rank_me", "alignment", "uniformity", "projection_std"),
    "probe": ("loss", "top1", "top5"),
}


def _parse_line(text: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None if it is damaged or of an unknown kind."""
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


def _drop_later_lines(folder: Path, step: int) -> dict[str, int]:
    """Keep the lines up to `step`; return kind -> step of the last line before.

    Damaged lines, such as a last one cut short by a crash, are dropped too.
    """
    path = folder / METRICS
    if not path.exists():
        return {}
    lines = read_metrics(folder)
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
    return {line["kind"]: line["step"] for line in sorted(lines, key=itemgetter("step"))}
