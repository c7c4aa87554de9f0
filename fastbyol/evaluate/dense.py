"""What segmentation and detection share: a backbone's maps, images at a given size, training's schedule and random numbers.

Shapes: n images, H x W pixels, C channels of a map.
"""

import copy
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fastbyol.config import DetectionEval, SegmentationEval
from fastbyol.data.decode import BadImage, decode
from fastbyol.data.folder import ImageFolder
from fastbyol.data.images import UNLABELED
from fastbyol.data.workers import map_in_order
from fastbyol.errors import InputError, RunError, error_reason, first_line, join_names, printable
from fastbyol.evaluate.protocol import EvalContext
from fastbyol.kernels.augment import IMAGENET_MEAN, IMAGENET_STD

T = TypeVar("T")
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4
_WARMUP_STEPS = 50
_MAX_GRADIENT_NORM = 10.0  # far above a usual step's: it only stops the rare one that would end the run


class MapShape(NamedTuple):
    """One of a backbone's maps."""

    index: int  # in timm's forward_intermediates
    channels: int
    side: int  # of an S x S image's map


class Maps(nn.Module):
    """(n, 3, H, W) -> maps of chosen depths, by timm's forward_intermediates."""

    def __init__(self, backbone: nn.Module, shapes: Sequence[MapShape]) -> None:
        super().__init__()
        self.backbone, self.indices = backbone, [shape.index for shape in shapes]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps, shallowest first."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.backbone.forward_intermediates(images, indices=self.indices, intermediates_only=True)


def copy_for(backbone: nn.Module, size: int) -> nn.Module:
    """A frozen copy in eval mode that takes images of S x S pixels.

    Transformers have a grid of positions, which timm resamples.

    Raises:
        InputError: it cannot be used at this size.
    """
    own = copy.deepcopy(backbone).eval().requires_grad_(False)
    if hasattr(own, "set_input_size"):
        with _refused(own, size):
            own.set_input_size(img_size=(size, size))
    return own


def map_shapes(backbone: nn.Module, size: int, *, wider: int = 0) -> list[MapShape]:
    """A backbone's maps of S x S images, of each size the deepest, from the finest to the coarsest.

    Args:
        wider: by so many pixels are the images wider than high.

    Raises:
        InputError: the backbone gives no maps, or not at this size.
    """
    if not hasattr(backbone, "forward_intermediates"):
        raise InputError(
            f"model.backbone: timm's {type(backbone).__name__} does not give its maps (forward_intermediates), "
            "so it cannot be evaluated on dense tasks"
        )
    images = torch.zeros(1, 3, size, size + wider, device=next(backbone.parameters()).device)
    with _refused(backbone, size, wider), torch.no_grad():
        maps = backbone.forward_intermediates(images, intermediates_only=True)
    deepest = {x.shape[2]: MapShape(i, x.shape[1], x.shape[2]) for i, x in enumerate(maps)}
    return sorted(deepest.values(), key=lambda shape: -shape.side)


@contextmanager
def _refused(backbone: nn.Module, size: int, wider: int = 0) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise InputError(
            f"image_size_px={size}: {type(backbone).__name__} cannot take images of {size + wider}x{size} pixels: "
            f"{first_line(error)}"
        ) from None


def dense_size(option: int, frame: EvalContext) -> int:
    """The side in pixels that `image_size_px` means.

    0 is 9/4 of the run's, up to a multiple of 32: as the paper, which segments at 513 after pre-training at 224.
    """
    return option or 32 * math.ceil(frame.size * 9 / 4 / 32)


def head_width(shape: MapShape) -> int:
    """An eighth of the channels of the backbone's last map, within 64 .. 256: the usual 256 behind a ResNet-50."""
    return min(max(shape.channels // 8, 64), 256)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators start from `seed` within and are as they were afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def read_pixels(file: Path) -> NDArray[np.uint8]:
    """An image (H, W, 3).

    Raises:
        RunError: it cannot be read or decoded.
    """
    try:
        return decode(file.read_bytes())
    except (OSError, ValueError, BadImage) as error:  # ValueError: a name that no file can have
        raise RunError(f"{file}: {error_reason(error)}; mend it or take it out of the lists") from None


def checked_size(file: Path) -> tuple[int, int]:
    """(height, width) of an image that can be read: it is decoded, since training is too long to end at a file that breaks off.

    Raises:
        InputError: it cannot be read or decoded.
    """
    try:
        height, width, _ = read_pixels(file).shape
    except RunError as error:
        raise InputError(str(error)) from None
    return height, width


def spellings(name: str) -> list[str]:
    """A file's name as a list or an annotation gives it: as it is, and what it means where it is a file: URL or of Windows."""
    found = [name]
    if name.lower().startswith("file:"):
        found.append(unquote(urlsplit(name).path))
    if "\\" in name:
        found.append(name.replace("\\", "/"))
    return found


def warn_of_absent(
    what: str, names: Sequence[str], seen: dict[str, set[int]], frame: EvalContext, consequence: str
) -> None:
    """Says which classes a split has nothing of, a line per split.

    Args:
        what: they have none of, in words.
        names: of the classes 0 .. K - 1.
        seen: split -> the classes that occur in it.
    """
    for split, classes in seen.items():
        absent = [name for k, name in enumerate(names) if k not in classes]
        if absent:
            then = f": {consequence}" if split == "val" else ""
            frame.say(
                printable(
                    f"warning: {split} has no {what} of {join_names(absent)} ({len(absent)} of {len(names)}){then}"
                )
            )


def resize(pixels: NDArray[np.uint8], height: int, width: int, *, labels: bool = False) -> NDArray[np.uint8]:
    """An image (H, W, 3) by bicubic interpolation, antialiased, or a mask (H, W) by nearest neighbor."""
    how = Image.Resampling.NEAREST if labels else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


def normalize(images: Tensor) -> Tensor:
    """uint8 (n, H, W, 3) -> float32 (n, 3, H, W), channels_last, as in pre-training."""
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def read_text(file: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a text file in UTF-8") from None


def unlabeled(files: Sequence[Path]) -> ImageFolder:
    """Files of any folders as a set of images without labels."""
    absolute = [file.absolute() for file in files]
    root = Path(os.path.commonpath([file.parent for file in absolute]))
    paths = [str(file.relative_to(root)) for file in absolute]
    return ImageFolder(root, paths, np.full(len(paths), UNLABELED, dtype=np.int64), [])


def fit(
    network: nn.Module,
    loss_of: Callable[[list[T]], Tensor],
    make: Callable[[int, np.random.Generator], T],
    images: int,
    options: SegmentationEval | DetectionEval,
    frame: EvalContext,
) -> None:
    """Trains what takes gradients of a network: SGD with momentum, linear warm-up, cosine to 0.

    Args:
        loss_of: a batch of made images -> loss.
        make: (index, random numbers) -> an image as `loss_of` wants it; called on threads.
        images: number of training images; those of an epoch that fill no batch are left out.
        options: epochs, batch size, learning rate and seed.

    Raises:
        RunError: the loss became NaN or infinite.
    """
    batch_size = min(options.batch_size, images)
    steps = options.epochs * (images // batch_size)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, options.lr, momentum=_MOMENTUM, weight_decay=_WEIGHT_DECAY)
    warmup = min(_WARMUP_STEPS, steps // 4)
    batches = _batches(make, images, batch_size, options, frame)
    for step, batch in enumerate(frame.track("training", batches, steps, unit="steps")):
        rise = min(1.0, (step + 1) / (warmup + 1))
        optimizer.param_groups[0]["lr"] = options.lr * rise * (1 + math.cos(math.pi * step / steps)) / 2
        loss = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_GRADIENT_NORM)
        optimizer.step()
        if (step + 1) % (images // batch_size) == 0 and not all(torch.isfinite(x).all() for x in (loss, *parameters)):
            raise RunError(f"lr={options.lr:g}: the loss became NaN or infinite; choose a lower one")


def _batches(
    make: Callable[[int, np.random.Generator], T],
    images: int,
    batch_size: int,
    options: SegmentationEval | DetectionEval,
    frame: EvalContext,
) -> Iterator[list[T]]:
    """All batches, in an order drawn anew every epoch; what is made depends on seed, epoch and index alone."""
    tasks = (
        (epoch, int(index))
        for epoch in range(options.epochs)
        for index in np.random.default_rng([options.seed, epoch]).permutation(images)[
            : images // batch_size * batch_size
        ]
    )
    made = map_in_order(lambda task: make(task[1], np.random.default_rng([options.seed, *task])), tasks, frame.threads)
    while batch := list(itertools.islice(made, batch_size)):
        yield batch
