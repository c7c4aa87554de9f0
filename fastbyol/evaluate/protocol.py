"""What every protocol of evaluation is and gets."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from fastbyol.config import Config
from fastbyol.data.images import UNLABELED, ImageSet
from fastbyol.errors import join_names, printable
from fastbyol.runtime.console import SECONDS_BETWEEN_LINES

T = TypeVar("T")
Track = Callable[[Iterable[int], int], Iterable[int]]  # (numbers, how many) -> the numbers, beside a progress bar
Row = dict[str, Any]  # metric -> value; accuracies, mIoU and mAP lie in [0, 1]

LARGEST_SHARE_LOST = 0.01  # of a split: an accuracy may be off by as much
clock = time.monotonic


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """Where and how a protocol runs."""

    size: int  # side of the images in pixels, of the run
    device: torch.device
    dtype: torch.dtype  # of autocast
    threads: int  # that decode
    say: Callable[[str], None]  # one line of text
    bad: dict[str, str] = field(default_factory=dict)  # images that were left out: where they lie -> why

    @property
    def training_dtype(self) -> torch.dtype:
        """Autocast dtype of protocols that train the network: float32 for float16, which would need a loss scale."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def track(self, what: str, items: Iterable[T], total: int, *, each: int = 1, unit: str = "images") -> Iterator[T]:
        """The items, beside a progress bar; where there is no terminal, a line every 10 s of work.

        Args:
            total: how many images, or whatever `unit` names, all items are.
            each: how many an item is; the last one may be smaller.
        """
        console = Console()
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task(what, total=total)
            began = said = clock()
            for k, item in enumerate(items, start=1):
                yield item
                now, done = clock(), min(k * each, total)
                progress.update(task, completed=done)
                if not console.is_terminal and now - said >= SECONDS_BETWEEN_LINES and done < total:
                    left = _duration((now - began) / done * (total - done))
                    self.say(f"{what}: {done:,} of {total:,} {unit}, {left} left")
                    said = now

    def skipped(self, images: ImageSet, bad: dict[int, str]) -> None:
        """Names the unreadable images of a set, each once, and says where they are so many that a number would mislead.

        Args:
            bad: index -> why.
        """
        new = {where: reason for index, reason in bad.items() if (where := images.location(index)) not in self.bad}
        for where, reason in new.items():
            self.say(printable(f"warning: skipped {where}: {reason}"))
        self.bad.update(new)
        if new and (line := missing_images_warning(images, bad)) is not None:
            self.say(f"warning: {line}")


def missing_images_warning(images: ImageSet, bad: Iterable[int]) -> str | None:
    """What to know of a set of which many images, or all of a class, cannot be read; None where they are few.

    Args:
        bad: their indices.
    """
    lost = np.array(sorted(bad), dtype=np.int64)
    left = np.delete(images.labels, lost)
    gone = [images.classes[k] for k in np.unique(images.labels[lost]) if k != UNLABELED and k not in left]
    if len(lost) <= LARGEST_SHARE_LOST * len(images) and not gone:
        return None
    classes = f", none is of {join_names(gone)}" if gone else ""
    return printable(
        f"{len(lost)} of {len(images)} images of {images.root} cannot be read: results are of the other {len(left)}{classes}"
    )


def _duration(seconds: float) -> str:
    """In the largest unit that leaves two digits or less: 40 s, 12 min, 3 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def percentages(row: Row) -> str:
    """The row's metrics as text: "top-1  64.2%  top-5  91.0%"."""
    return "  ".join(f"{_NAMES.get(key, key)} {value:6.1%}" for key, value in row.items() if isinstance(value, float))


_NAMES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "map": "mAP", "pixel_accuracy": "pixel accuracy"}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to say what features are worth."""

    name: str  # of `fastbyol eval NAME` and eval_NAME.json
    title: str  # in the report
    open: Callable[[Any, Config, EvalContext], Any]
    """(options, config of the run, frame) -> the labeled data; raises InputError where it does not suit.

    Of the data `len(data.train)`, `len(data.val)` and `len(data.classes)` are known to all protocols.
    """
    measure: Callable[[nn.Module | None, Any, Any, EvalContext], Row]
    """(backbone, data, options, frame) -> a row, the metric that counts first; the backbone's weights and mode stay."""
    calibration: Callable[[Any], ImageSet] = lambda data: data.train
    """The data -> the images on which an untrained network's BatchNorm is measured."""
    takes_pixels: bool = True
    """Whether `measure` takes None for raw pixels."""
    row_text: Callable[[Row], str] = percentages
    draw: Callable[[dict[str, Row]], bytes] | None = None
    """All rows -> a PNG, written beside the result."""
