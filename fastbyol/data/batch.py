"""What every loader yields, and what every loader can do."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Batch(NamedTuple):
    """One optimizer step's images. Valid until the next batch is asked for: the memory is used again."""

    views: tuple[Tensor, Tensor]  # each (B, 3, S, S), channels_last, compute dtype, on the device, normalized
    labels: Tensor  # (B,) int64, -1 where the data set has none
    indices: Tensor  # (B,) int64, the image's place in the data set


class Loader(Protocol):
    """Endless epochs of N // B batches, addressed by optimizer step: epoch, batch = divmod(step, len(loader)).

    Over R ranks each yields its part of B / R images; B, and with it the epoch, stays the same for any R.
    """

    wait_s: float
    """Seconds that the consumer has waited for batches so far."""
    bad: dict[int, str]
    """Images skipped so far: index -> one line why."""

    def __len__(self) -> int:
        """Batches per epoch: N // B, no partial batch."""

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps start .. stop - 1; leaving the loop early stops all background work."""
