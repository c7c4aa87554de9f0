"""The context that evaluation tasks run in: device, precision, progress, unreadable images."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from fastbyol.data import Sources
from fastbyol.data.crops import DecoderName
from fastbyol.data.images import UNLABELED, Images
from fastbyol.data.workers import map_in_order
from fastbyol.errors import join_names
from fastbyol.evaluation.partial import PartialResult
from fastbyol.runtime.console import SECONDS_BETWEEN_LINES
from fastbyol.runtime.distributed import World
from fastbyol.runtime.logging import logger

T = TypeVar("T")
R = TypeVar("R")
Track = Callable[[Iterable[int], int], Iterable[int]]
"""(items, total) -> the items, with a progress bar."""
Row = dict[str, Any]  # metric -> value; accuracy, mIoU and mAP lie in [0, 1]

MAX_UNREADABLE_FRACTION = 0.01  # of a split; more give a warning
clock = time.monotonic


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """Where and how a task runs."""

    size: int  # side of the run's images in pixels
    device: torch.device
    dtype: torch.dtype  # of autocast
    threads: int  # decoder threads
    decoder: DecoderName = "native"  # of images that are passed to a network unchanged
    sources: Sources = Sources()  # noqa: RUF009 - immutable; images that replace the run's
    compiles: bool = False  # a network that sees COMPILE_IMAGES images
    world: World = field(default_factory=World)
    partial: PartialResult = field(default_factory=PartialResult)
    bad: dict[str, str] = field(default_factory=dict)  # path of an unreadable image -> reason
    extractions: list[tuple[int, float]] = field(default_factory=list)  # images and seconds of each pass over a split

    @property
    def training_dtype(self) -> torch.dtype:
        """Autocast dtype for training: not float16, which would need loss scaling."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def track(
        self, description: str, items: Iterable[T], total: int, *, each: int = 1, unit: str = "images"
    ) -> Iterator[T]:
        """Yield the items and show a progress bar. Without a terminal, log one line every 10 s.

        Args:
            total: number of units over all items.
            each: units per item; the last item may hold fewer.
        """
        console = Console()
        with Progress(
            console=console, disable=not (console.is_terminal and self.world.is_main_process), transient=True
        ) as progress:
            bar = progress.add_task(description, total=total)
            start = last_line = clock()
            for k, item in enumerate(items, start=1):
                yield item
                now, done = clock(), min(k * each, total)
                progress.update(bar, completed=done)
                if not console.is_terminal and now - last_line >= SECONDS_BETWEEN_LINES and done < total:
                    left = _format_duration((now - start) / done * (total - done))
                    logger.info(f"{description}: {done:,} of {total:,} {unit}, {left} left")
                    last_line = now

    def map_images(self, description: str, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Return function(item) for all items, computed in threads and shared by the ranks.

        Shows progress. Every rank must call this.

        Raises:
            FastbyolError: what the function raised, on one rank.
        """
        own = items[self.world.rank :: self.world.size]
        with self.world.sync_errors():
            found = list(self.track(description, map_in_order(function, own, self.threads), len(own)))
        parts = self.world.gather(found)
        return [parts[k % self.world.size][k // self.world.size] for k in range(len(items))]

    def images_per_s(self) -> float | None:
        """Return the rate of feature extraction over all ranks since the last call.

        None if there was none.
        """
        if not self.extractions:
            return None
        images, seconds = map(sum, zip(*self.extractions, strict=True))
        self.extractions.clear()
        return images / seconds

    def skipped(self, images: Images, bad: dict[int, str]) -> None:
        """Log unreadable images, each once. Warn if enough are missing to distort the results.

        Args:
            bad: index of an image -> reason.
        """
        new = {path: reason for index, reason in bad.items() if (path := images.location(index)) not in self.bad}
        for path, reason in new.items():
            logger.warning(f"skipped {path}: {reason}")
        self.bad.update(new)
        if new and (text := missing_images_warning(images, bad)) is not None:
            logger.warning(text)


def missing_images_warning(images: Images, bad: Iterable[int]) -> str | None:
    """Return a warning if more than 1 % of the images, or all images of a class, are unreadable.

    Args:
        bad: indices of the unreadable images.
    """
    missing = np.array(sorted(bad), dtype=np.int64)
    left = np.delete(images.labels, missing)
    empty = [images.classes[k] for k in np.unique(images.labels[missing]) if k != UNLABELED and k not in left]
    if len(missing) <= MAX_UNREADABLE_FRACTION * len(images) and not empty:
        return None
    classes = f", without any image of {join_names(empty)}" if empty else ""
    return (
        f"{len(missing)} of {len(images)} images of {images.root} cannot be read: "
        f"results cover the other {len(left)}{classes}"
    )


def _format_duration(seconds: float) -> str:
    """Format as 40 s, 12 min or 3.0 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
