"""Rendering in one thread: stored bytes -> decoded image -> augmented, normalized views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.data.decode import BadImage, DecodeBuffer, decode, decode_reduced, jpeg_size
from fastbyol.data.images import Images
from fastbyol.data.sequence import DeterministicLoader, StoredImage
from fastbyol.data.views import VIEWS, Sampler
from fastbyol.errors import first_line
from fastbyol.kernels import augment, augment_params, crop

T = TypeVar("T")
Box = Sequence[int]  # top, left, height, width in source pixels
Pixels = NDArray[np.uint8]  # (H, W, 3)
# (position, height, width) -> crop box and parameters (augment_params.COLUMNS,) of the view
ViewFunction = Callable[[int, int, int], tuple[Box, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """The crops of an evaluation: one view of each of the images `order`, in batches."""

    images: Images
    order: NDArray[np.int64]  # indices, by position
    view_of: ViewFunction
    size: int  # S, side of a crop in pixels
    batch_size: int
    threads: int  # 0 is one per core
    bad: dict[int, str]  # receives the unreadable images: index -> reason
    dtype: torch.dtype
    device: torch.device
    substitute: bool = False  # use the next readable image instead of an unreadable one

    def load(self, index: int, decode: Callable[[StoredImage], T]) -> tuple[int, T] | None:
        """Return the index of the image used, and decode(image); None if there is none.

        Args:
            index: the wanted image.
            decode: raises BadImage.
        """
        for offset in range(len(self.images) if self.substitute else 1):
            candidate = (index + offset) % len(self.images)
            if candidate in self.bad:
                continue
            try:
                return candidate, decode(self.images.read(candidate))
            except (OSError, BadImage) as error:
                self.bad[candidate] = first_line(error)
        return None


class Slot:
    """Memory of one batch: tensors for the consumer, numpy views of them for the workers."""

    def __init__(self, loader: DeterministicLoader) -> None:
        b, s = loader.batch_size, loader.size
        pin = loader.device.type != "cpu"
        self.views = torch.empty(VIEWS, b, s, s, 3, dtype=loader.dtype, pin_memory=pin)
        self.labels = torch.empty(b, dtype=torch.int64, pin_memory=pin)
        self.indices = torch.empty(b, dtype=torch.int64, pin_memory=pin)
        # Writing one value through torch would hold the interpreter lock for 8 us.
        self.label_values, self.index_values = self.labels.numpy(), self.indices.numpy()
        self.out = augment.as_written(self.views)


class BatchPlan:
    """A batch in the making: its images, the parameters of their views, and its memory."""

    def __init__(self, slot: Slot, sampler: Sampler, indices: NDArray[np.int64]) -> None:
        self.slot, self.sampler, self.indices = slot, sampler, indices
        self.params = sampler.params().pack()  # (B, V, augment_params.COLUMNS); boxes are still 0


class Renderer:
    """Decodes, crops and augments images, with the memory that one thread needs for it.

    Args:
        size: S, side of a view in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._buffer = DecodeBuffer()
        self._planes = augment.new_planes(size)
        self._crop_scratch, self._augment_scratch = crop.CropScratch(size), augment.AugmentScratch(size)

    def decode(self, data: bytes | Pixels) -> Pixels:
        """Decode an image; the pixels are valid until the next call.

        Raises:
            BadImage: the image cannot be decoded.
        """
        return decode(data, self._buffer)

    def decode_reduced(self, data: bytes, full: tuple[int, int], factor: int) -> Pixels:
        """Decode a JPEG of (height, width) `full` at 1/factor of its size, like `decode`."""
        return decode_reduced(data, full, factor, self._buffer)

    def crop(self, image: Pixels, box: Box, flip: bool) -> None:
        """Crop and resize a box of the image, and flip it if asked to.

        The result is what `augment` reads.
        """
        crop.crop_into(image, box, flip, self._planes, self._crop_scratch)

    def augment(self, params: NDArray[np.float32], out: NDArray[np.float32 | np.uint16 | np.int16]) -> None:
        """Augment and normalize the current crop.

        Args:
            params: (augment_params.COLUMNS,), see `ViewParams.pack`.
            out: (S, S, 3), float32 or the bits of a 16-bit float.
        """
        augment.augment_into(self._planes, params, out, self._augment_scratch)


class Worker(Renderer):
    """Renders the images of a `NativeLoader`'s batches.

    Called with one image of a batch at a time.
    """

    def __init__(self, loader: DeterministicLoader, *, dct_scaling: bool) -> None:
        super().__init__(loader.size)
        self._loader, self._labels, self._dct_scaling = loader, loader.images.labels, dct_scaling

    def __call__(self, task: tuple[BatchPlan, int, Any]) -> None:
        """Write label, index and both views of the i-th image of a batch.

        Args:
            task: the batch, i, and what the readers made of the image.
        """
        batch, i, data = task
        index, image, boxes = self.load(batch, i, data)
        params, slot = batch.params[i], batch.slot
        for v, box in enumerate(boxes):
            p = params[v]
            self.crop(image, box, bool(p[augment_params.FLIP]))
            self.augment(p, slot.out[v, i])
        slot.label_values[i] = self._labels[index]
        slot.index_values[i] = index

    def load(self, batch: BatchPlan, i: int, data: Any) -> tuple[int, Pixels, list[Box]]:
        """Decode the i-th image of a batch, or its substitute.

        Returns:
            the index of the image used, its pixels, and the crop boxes of its views in those
            pixels.
        """
        index, (image, boxes) = self._loader.load_or_substitute(
            int(batch.indices[i]), data, self._decode_and_place, batch.sampler, i
        )
        return index, image, boxes

    def _decode_and_place(self, data: bytes | Pixels, sampler: Sampler, i: int) -> tuple[Pixels, list[Box]]:
        """Return pixels and boxes; both at a reduced size if `dct_scaling` allows it."""
        full = jpeg_size(data) if self._dct_scaling and isinstance(data, bytes) else None
        if full is None:
            image = self.decode(data)
            return image, sampler.boxes(slice(i, i + 1), (image.shape[:2],))[0].tolist()
        boxes = sampler.boxes(slice(i, i + 1), (full,))[0].tolist()
        shortest = min(min(box[2:]) for box in boxes)
        factor = next(f for f in (8, 4, 2, 1) if f == 1 or shortest >= f * self.size)
        image = self.decode_reduced(data, full, factor)
        return image, [_scale_box(box, full, image.shape[:2]) for box in boxes]


def _scale_box(box: Box, full: tuple[int, int], size: tuple[int, int]) -> Box:
    """Return the box in an image of another size. Rounding moves a view by at most 0.5 px."""
    top, left, height, width = box
    scale_y, scale_x = size[0] / full[0], size[1] / full[1]
    y0, y1 = round(top * scale_y), round((top + height) * scale_y)
    x0, x1 = round(left * scale_x), round((left + width) * scale_x)
    return [y0, x0, y1 - y0, x1 - x0]
