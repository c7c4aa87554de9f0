"""What every loader yields, and the interface of loaders."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """Images of one optimizer step.

    Valid until the next batch is requested; the memory is then reused.
    """

    views: tuple[Tensor, Tensor]  # each (B, 3, S, S), channels_last, compute dtype, on the device, normalized
    labels: Tensor  # (B,) int64, -1 if the data set has none
    indices: Tensor  # (B,) int64, indices of the images in the data set


class Loader(Protocol):
    """Endless epochs of N // B batches, addressed by optimizer step.

    epoch, batch = divmod(step, len(loader))

    Each epoch of a loader has its own order of the images, of which the last N mod B are left out.
    A run counts its epochs in N / B steps (`Schedule`). Each of R ranks yields its share of B / R
    images; B, and with it the epoch, is the same for any R.
    """

    wait_s: float
    """Total time that the consumer has waited for batches, in seconds."""
    bad: dict[int, str]
    """Images skipped so far: index -> reason, one line."""

    def __len__(self) -> int:
        """Return the number of batches per epoch: N // B, no partial batch."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch; of the next one in every iteration."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start .. stop - 1. Leaving early stops all background work."""
