"""Base class of all loaders: order of the images, parameters of the views, substitutes."""

import faulthandler
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.data.batch import Batch
from fastbyol.data.decode import BadImage
from fastbyol.data.images import Images
from fastbyol.data.views import Augmentation, Sampler, epoch_order
from fastbyol.errors import LoaderTimeout, RunError, error_reason

T = TypeVar("T")
StoredImage = bytes | NDArray[np.uint8]  # an encoded file, or pixels (H, W, 3)


class DeterministicLoader:
    """Order of images and views as a function of (seed, epoch, position).

    It does not depend on the backend, the number of ranks or restarts.

    Args:
        images: the data set, at least `batch_size` images.
        batch_size: images per batch over all ranks.
        shard: (B,) positions within every batch that this rank makes.
        size: S, side of a view in pixels.
        augmentation: distribution of the views.
        seed: seed of the order and the views.
        dtype: float32, bfloat16 or float16.
        device: where batches are delivered.
        max_bad_fraction: largest share of unreadable images.
        timeout_s: longest time to wait for a batch.
    """

    def __init__(
        self,
        *,
        images: Images,
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
        self.global_batch_size, self.shard, self.batch_size = batch_size, shard, len(shard)
        self.dtype, self.device = dtype, device
        self.max_bad_fraction, self.timeout_s = max_bad_fraction, timeout_s
        self.wait_s = 0.0
        self.bad: dict[int, str] = {}
        self._bad_lock = threading.Lock()
        self._image_count = len(images)
        self._orders: dict[int, NDArray[np.int64]] = {}  # epoch -> order, of the epochs in use
        self._epoch = 0  # of the next iteration

    def __len__(self) -> int:
        return self._image_count // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch; of the next one in every iteration. Leaving early stops
        all background work.
        """
        epoch, self._epoch = self._epoch, self._epoch + 1
        with closing(self.batches(epoch * len(self), (epoch + 1) * len(self))) as batches:
            yield from batches

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start .. stop - 1."""
        raise NotImplementedError

    def positions(self, step: int) -> tuple[int, NDArray[np.int64]]:
        """Return the epoch of a step, and the positions (B,) of this rank's images in its order."""
        epoch, batch = divmod(step, len(self))
        return epoch, batch * self.global_batch_size + self.shard

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the indices (B,) of this rank's images of a step."""
        epoch, positions = self.positions(step)
        return self._order(epoch)[positions]

    def sampler(self, step: int) -> Sampler:
        """Return the sampler of the views of this rank's images of a step."""
        epoch, positions = self.positions(step)
        return Sampler(self.augmentation, self.seed, epoch, positions)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self.seed, epoch, self._image_count)
            # Threads work on two neighboring epochs at most. The dict is replaced, since other
            # threads may read it.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1} | {epoch: order}
        return order

    def fetch(self, index: int) -> StoredImage | OSError:
        """Return an image as it is stored, or the error that reading it raised."""
        try:
            return self.images.read(index)
        except OSError as error:
            return error

    def load_or_substitute(
        self, index: int, data: StoredImage | OSError, function: Callable[..., T], *args: Any
    ) -> tuple[int, T]:
        """Call function(data, *args) for image `index`, or for the next image that is not bad.

        The substitute depends on the images alone, so batches are the same for any number of
        threads.

        Args:
            index: the wanted image.
            data: what `fetch` returned for it.
            function: raises BadImage if the image is unusable.
            args: further arguments of `function`.

        Returns:
            the index of the image used, and what `function` returned.

        Raises:
            RunError: more images are bad than `max_bad_fraction` allows.
        """
        n = self._image_count
        for k in range(n):
            candidate = (index + k) % n
            if candidate in self.bad:
                continue
            content = data if k == 0 else self.fetch(candidate)
            try:
                if isinstance(content, OSError):
                    raise BadImage(error_reason(content))
                return candidate, function(content, *args)
            except BadImage as error:
                with self._bad_lock:
                    self.bad[candidate] = str(error)
                self._check_bad_fraction()
        self._check_bad_fraction()  # other threads found the bad images
        raise RunError(f"none of the {n} images in {self.images.root} can be read")

    def _check_bad_fraction(self) -> None:
        with self._bad_lock:
            count = len(self.bad)
            index, reason = next(reversed(self.bad.items()))
        if count > self.max_bad_fraction * self._image_count:
            raise RunError(
                f"{count} of {self._image_count} images cannot be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows; the last one: {self.images.location(index)}: {reason}"
            )


def timeout_error(loader: DeterministicLoader) -> LoaderTimeout:
    """Return the error to raise if no batch arrived in time, with the stacks of all threads."""
    return LoaderTimeout(
        f"the loader has made no batch for {loader.timeout_s:g} s (data.timeout_s), reading from {loader.images.root}",
        _stacks(),
    )


def _stacks() -> str:
    """Return the stack of every thread of the process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
