"""What a run tells: the progress bar, metrics.jsonl, TensorBoard, and lines of text."""

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastbyol.errors import InputError, first_line

METRICS = "metrics.jsonl"


class RunLog:
    """Writes one line of metrics.jsonl per event and keeps the progress bar.

    Lines: {"kind": "train", step, epoch, loss, lr, tau, projection_std, images_per_s, wait_share},
    with float16 also loss_scale and skipped_steps, and
    {"kind": "knn", step, epoch, top1, top5} and {"kind": "probe", step, epoch, loss, top5, top1}; `step` counts the optimiser steps done.

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
        console: Console | None = None,
    ) -> None:
        self.console = console or Console(quiet=not speaks)
        self._folder, self._batch_size, self._steps_per_epoch = folder, batch_size, steps_per_epoch
        self._total_steps, self._epochs = total_steps, total_steps // steps_per_epoch
        self._file = None
        if speaks:
            _truncate(folder / METRICS, start)
            self._file = open(
                folder / METRICS, "ab", buffering=0
            )  # a line is on its way to the disk when it is written
        self._tensorboard = _tensorboard_writer(folder, start) if tensorboard and speaks else None
        self._mark = start, time.perf_counter(), 0.0  # step, clock and waiting time at the last training line
        self._paused_s = 0.0
        self._shown: dict[str, str] = {}
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

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def advance(self, step: int) -> None:
        """Moves the bar; reads nothing."""
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
        self._mark, self._paused_s = (step, now, wait_s), 0.0
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
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that asks for attention."""
        self.console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)

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
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
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
        if not self.console.is_terminal and kind == "knn":
            self.say(f"{self._epoch_text(step)}  step {step}/{self._total_steps}  {_join(self._shown)}")

    def _epoch_text(self, step: int) -> str:
        return f"epoch {max(1, -(-step // self._steps_per_epoch))}/{self._epochs}"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; empty if there is none."""
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run's folder; empty if it is not there.

    Raises:
        InputError: it cannot be read.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from None


def write_json(path: Path, values: dict[str, Any], key: str) -> None:
    """A JSON file that people read too.

    Args:
        key: the option that names the file, for errors.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{key}: cannot be written: {error.strerror}") from None


class _Values(ProgressColumn):
    def __init__(self, values: dict[str, str]) -> None:
        self._values = values
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(_join(self._values))


def _join(values: dict[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in values.items())


def _tensorboard_writer(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # a second of imports that only runs with TensorBoard pay

    return SummaryWriter(folder / "tensorboard", purge_step=start + 1 if start else None)


def _truncate(path: Path, step: int) -> None:
    """Keeps the lines of the steps up to `step`; a last line cut short by a crash goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
