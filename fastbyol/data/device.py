"""Batches on a GPU, copied on a stream of their own, which overlaps with the previous step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastbyol.data.batch import Batch
from fastbyol.spans import COPY, span


class DeviceSlots:
    """Two batches on a GPU, filled alternately on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._slots: list[list[Tensor]] = [[], []]
        self._copied, self._used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def fill(self, step: int, tensors: list[Tensor]) -> list[Tensor]:
        """Return pinned `tensors` on the GPU.

        Work that the caller queues from now on waits for the copy; the host does not.
        """
        with span(COPY):
            k = step % 2
            if not self._slots[k]:
                self._slots[k] = [torch.empty_like(t, device=self._device) for t in tensors]
                # The allocator may return memory that work queued on the caller's stream still
                # writes to.
                self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(self._used[k])  # of the step before the last
                for target, source in zip(self._slots[k], tensors, strict=True):
                    target.copy_(source, non_blocking=True)
                self._copied[k].record()
            torch.cuda.current_stream(self._device).wait_event(self._copied[k])
            return self._slots[k]

    def release(self, step: int) -> None:
        """Wait until the pinned memory has been read.

        Call it after all work on the batch has been queued.
        """
        self._used[step % 2].record()
        self._copied[step % 2].synchronize()


def deliver(
    step: int, views: Tensor, labels: Tensor, indices: Tensor, device_slots: DeviceSlots | None, *, dim: int = 0
) -> Iterator[Batch]:
    """Yield one batch, copied to the GPU if there is one; the given memory is then free again.

    Args:
        views: (V, B, S, S, 3), or with the views in dimension `dim`; dense, so that it is copied as
            one block.
        labels, indices: (B,).
    """
    if device_slots is not None:
        views, labels, indices = device_slots.fill(step, [views, labels, indices])
    view1, view2 = (view.permute(0, 3, 1, 2) for view in views.unbind(dim))
    yield Batch((view1, view2), labels, indices)
    if device_slots is not None:
        device_slots.release(step)
