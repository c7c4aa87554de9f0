"""What every protocol of evaluation is and gets."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from fastbyol.config import Config
from fastbyol.data.images import ImageSet

T = TypeVar("T")
Row = dict[str, Any]  # metric -> value; accuracies, mIoU and mAP lie in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Frame:
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

    def track(self, what: str, items: Iterable[T], total: int) -> Iterator[T]:
        """The items, beside a progress bar where there is a terminal."""
        console = Console()
        with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
            yield from progress.track(items, total=total, description=what)


def percentages(row: Row) -> str:
    """The row's metrics as text: "top-1  64.2%  top-5  91.0%"."""
    return "  ".join(f"{_NAMES.get(key, key)} {value:6.1%}" for key, value in row.items() if isinstance(value, float))


_NAMES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "map": "mAP", "pixel_accuracy": "pixel accuracy"}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to say what features are worth."""

    name: str  # of `fastbyol eval NAME` and eval_NAME.json
    title: str  # in the report
    open: Callable[[Any, Config], Any]
    """(options, config of the run) -> the labelled data; raises InputError where it does not suit.

    Of the data `len(data.train)`, `len(data.val)` and `len(data.classes)` are known to all protocols.
    """
    measure: Callable[[nn.Module | None, Any, Any, Frame], Row]
    """(backbone, data, options, frame) -> a row, the metric that counts first; the backbone's weights and mode stay."""
    calibration: Callable[[Any], ImageSet] = lambda data: data.train
    """The data -> the images on which an untrained network's BatchNorm is measured."""
    takes_pixels: bool = True
    """Whether `measure` takes None for raw pixels."""
    row_text: Callable[[Row], str] = percentages
    draw: Callable[[dict[str, Row]], bytes] | None = None
    """All rows -> a PNG, written beside the result."""
