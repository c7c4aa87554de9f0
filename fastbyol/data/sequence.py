"""What all loaders have in common: which image stands where, how its views are drawn, and what is done about bad images."""

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.data.decode import BadImage
from fastbyol.data.images import ImageSet
from fastbyol.data.views import Augmentation, Sampler, epoch_order
from fastbyol.errors import RunError, error_reason

T = TypeVar("T")


class DeterministicLoader:
    """The order of images and views as a function of (seed, epoch, position), for any backend, ranks and restart.

    Args:
        images: at least `batch_size` of them.
        batch_size: images of a batch over all ranks.
        shard: (B,) the positions of every batch that this rank makes.
        size: S, side of a view in pixels.
        augmentation: how views are drawn.
        seed: of the sample order and the views.
        dtype: float32, bfloat16 or float16.
        device: where batches are delivered.
        max_bad_fraction: share of the images that may be unreadable.
        timeout_s: how long to wait for a batch.
    """

    def __init__(
        self,
        *,
        images: ImageSet,
        batch_size: int,
        shard: NDArray[np.int64],
        size: int,
        augmentation: Augmentation,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        max_bad_fraction: float,
        timeout_s: float,
    ) -> None:
        self.images, self.size, self.augmentation, self.seed = images, size, augmentation, seed
        self.global_batch, self.shard, self.batch_size = batch_size, shard, len(shard)
        self.dtype, self.device = dtype, device
        self.max_bad_fraction, self.timeout_s = max_bad_fraction, timeout_s
        self.wait_s = 0.0
        self.bad: dict[int, str] = {}
        self._bad_lock = threading.Lock()
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the epochs in hand

    def __len__(self) -> int:
        return len(self.images) // self.global_batch

    def positions(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """The epoch of a step, and the places in that epoch's order of this rank's images (B,)."""
        epoch, batch = divmod(step, len(self))
        return epoch, batch * self.global_batch + self.shard

    def indices(self, step: int) -> NDArray[np.int64]:
        """The images of a step that this rank makes (B,)."""
        epoch, positions = self.positions(step)
        return self._order(epoch)[positions]

    def index(self, step: int, i: int) -> int:
        """The i-th of this rank's images of a step."""
        epoch, batch = divmod(step, len(self))
        return int(self._order(epoch)[batch * self.global_batch + self.shard[i]])

    def sampler(self, step: int) -> Sampler:
        """Draws the views of this rank's images of a step."""
        epoch, positions = self.positions(step)
        return Sampler(self.augmentation, self.seed, epoch, positions)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self.seed, epoch, len(self.images))
            # At one time images of two neighboring epochs are in hand. Replaced whole: other threads may be reading.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: order}
        return order

    def fetch(self, index: int) -> bytes | NDArray[np.uint8] | OSError:
        """What is stored of an image, or why it cannot be read."""
        try:
            return self.images.read(index)
        except OSError as error:
            return error

    def load_or_substitute(
        self,
        index: int,
        data: bytes | NDArray[np.uint8] | OSError,
        use: Callable[[bytes | NDArray[np.uint8]], T],
    ) -> tuple[int, T]:
        """use(data of image `index`), or, where that raises BadImage, of the next image in the set for which it does not.

        The substitute depends on the images alone, so batches stay the same for any number of threads.

        Args:
            index: of the image wanted.
            data: what `fetch` made of it.
            use: what is to be done; BadImage says that the image is no good.

        Returns:
            the index of the image used, and what `use` returned.

        Raises:
            RunError: more images are bad than `max_bad_fraction` allows.
        """
        n = len(self.images)
        for k in range(n):
            candidate = (index + k) % n
            if candidate in self.bad:
                continue
            content = data if k == 0 else self.fetch(candidate)
            try:
                if isinstance(content, OSError):
                    raise BadImage(error_reason(content))
                return candidate, use(content)
            except BadImage as error:
                self._count_bad(candidate, str(error))
        raise RunError(f"none of the {n} images in {self.images.root} can be read")

    def _count_bad(self, index: int, reason: str) -> None:
        with self._bad_lock:
            self.bad[index] = reason
            count = len(self.bad)
        if count > self.max_bad_fraction * len(self.images):
            raise RunError(
                f"{count} of {len(self.images)} images cannot be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows; the last one: {self.images.where(index)}: {reason}"
            )
