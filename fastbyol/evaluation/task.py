"""Base class of evaluation tasks."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from matplotlib.figure import Figure
from torch import nn

from fastbyol.config import Config
from fastbyol.data.images import Images
from fastbyol.evaluation.context import EvalContext, Row
from fastbyol.evaluation.features import open_splits
from fastbyol.runtime.distributed import World
from fastbyol.runtime.results import SELECTION

_METRIC_NAMES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "map": "mAP", "pixel_accuracy": "pixel accuracy"}


class EvalTask(ABC):
    """An evaluation task: opens its data, measures a backbone, formats the result."""

    name: ClassVar[str]  # of `fastbyol eval NAME` and eval_NAME_KEY.json
    title: ClassVar[str]  # in the report
    uses_pixels: ClassVar[bool] = True  # True if raw pixels may stand for features
    uses_loader: ClassVar[bool] = True  # False if it decodes images by itself, on the CPU
    has_figure: ClassVar[bool] = False

    def open(self, options: Any, config: Config, context: EvalContext) -> Any:
        """Return the labeled data, with `train`, `val` and `classes`. By default the run's splits.

        Args:
            options: the task's options, see options.py.
            config: the run's.

        Raises:
            InputError: the data is missing or does not suit the task.
        """
        return open_splits(options, config, context.sources, context.world)

    def calibration_images(self, data: Any) -> Images:
        """Return the images that give an untrained network its BatchNorm statistics."""
        return data.train

    def identity(self, data: Any) -> Any:
        """Return JSON values that identify the images and their labels, without reading all."""
        return [(split.fingerprint(), split.content_hashes()) for split in (data.train, data.val)]

    def memory(self, data: Any, features: int, options: Any, world: World) -> int:
        """Return the bytes that `measure` keeps on a rank's device beside the network; 0 if few.

        Args:
            features: F of the backbone.
        """
        return 0

    @abstractmethod
    def measure(self, backbone: nn.Module, data: Any, options: Any, context: EvalContext) -> Row:
        """Return a backbone's metrics, the most important first. Does not change the backbone.

        Every rank calls this; all return the same.

        Args:
            backbone: (n, 3, S, S) -> (n, F), on the context's device.
            data: what `open` returned.
        """

    def format_row(self, row: Row) -> str:
        """Return the metrics as text, e.g. "top-1  64.2%  top-5  91.0%  (base lr 0.1)"."""
        shown = {key: value for key, value in row.items() if isinstance(value, float) and key not in SELECTION}
        text = "  ".join(f"{_METRIC_NAMES.get(key, key)} {value:6.1%}" for key, value in shown.items())
        return f"{text}  (base lr {row['base_lr']:g})" if "base_lr" in row else text

    def draw(self, rows: dict[str, Row]) -> Figure:
        """Return a figure of all rows, to be stored next to the result, if `has_figure`."""
        raise NotImplementedError
