"""The CPU data path: threads, one decode per image, both views written straight into the batch.

Readers fetch the bytes of coming images. A worker takes the next image of the epoch's order,
decodes it without the interpreter lock, and lets the kernels crop.py and augment.py write both
views into a preallocated ring of batches. Nothing is pickled, copied or stacked. Readers hide a
slow disk; a slow consumer blocks readers and workers.

Memory: the ring has (prefetch_batches + 1) * V * B * S * S * 3 * bytes per value (V = 2 views);
files read ahead take readahead_images * bytes per file; each worker holds one decoded image and the
planes of one view, 12 * S * S bytes.
"""

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from fastbyol.data.batch import Batch
from fastbyol.data.device import DeviceSlots, deliver
from fastbyol.data.rendering import BatchPlan, Slot, Worker
from fastbyol.data.sequence import DeterministicLoader, timeout_error
from fastbyol.data.workers import PrefetchPool, resolve_threads


class NativeLoader(DeterministicLoader):
    """Loader that decodes and augments in threads; see `batch.Loader` for the contract.

    Args:
        threads: number of workers; 0 is one per core.
        prefetch_batches: number of batches made ahead.
        readers: number of threads that read files.
        readahead_images: number of files read ahead of the workers.
        dct_scaling: decode at a reduced size if both crops keep at least S pixels.
        sequence: arguments of `DeterministicLoader`.

    Raises (while iterating):
        RunError: more images are unreadable than `max_bad_fraction` allows.
        LoaderTimeout: no batch arrived within `timeout_s`.
    """

    worker_class: type[Worker] = Worker
    """Makes the worker of each thread. A profiler may set a subclass."""

    def __init__(
        self,
        *,
        threads: int,
        prefetch_batches: int,
        readers: int,
        readahead_images: int,
        dct_scaling: bool,
        **sequence: Any,
    ) -> None:
        super().__init__(**sequence)
        self.threads, self.prefetch_batches = resolve_threads(threads), prefetch_batches
        self.readers, self.readahead_images, self.dct_scaling = readers, readahead_images, dct_scaling

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start .. stop - 1. Leaving early stops all threads."""
        ring = [Slot(self) for _ in range(self.prefetch_batches + 1)]
        device_slots = DeviceSlots(self.device) if self.device.type == "cuda" else None
        source = self._start_source(start, stop)
        rendering = PrefetchPool(
            lambda: self.worker_class(self, dct_scaling=self.dct_scaling),
            self._plan(start, stop, ring, self._images(source)),
            threads=self.threads,
            window=len(ring) * self.batch_size,
            name="fastbyol-loader-worker",
            upstream=source,
        )
        try:
            for step in range(start, stop):
                before = time.perf_counter()
                try:
                    rendering.take(self.batch_size, self.timeout_s)
                except TimeoutError:
                    raise timeout_error(self) from None
                self.wait_s += time.perf_counter() - before
                slot = ring[step % len(ring)]
                yield from deliver(step, slot.views, slot.labels, slot.indices, device_slots)
        finally:
            rendering.close()

    def new_reader(self) -> Callable[[int], Any]:
        """Return a reader's function: index -> the image in the form that decoding takes."""
        return self.fetch

    def _start_reading(self, start: int, stop: int) -> PrefetchPool[int, Any]:
        return PrefetchPool(
            self.new_reader,
            chain.from_iterable(self.indices(step).tolist() for step in range(start, stop)),
            threads=self.readers,
            window=self.readahead_images,
            refill=max(1, self.readahead_images // 4),
            name="fastbyol-loader-reader",
        )

    def _start_source(self, start: int, stop: int) -> PrefetchPool[Any, Any]:
        """Start the threads in front of the workers."""
        return self._start_reading(start, stop)

    def _images(self, source: PrefetchPool[Any, Any]) -> Iterator[Any]:
        """Return the images of `source` in order, in the form that the worker's `load` takes."""
        return source

    def _plan(
        self, start: int, stop: int, ring: list[Slot], images: Iterator[Any]
    ) -> Iterator[tuple[BatchPlan, int, Any]]:
        """Yield the workers' tasks.

        The pool's window ensures that a batch's slot is free when its first task is taken.
        """
        for step in range(start, stop):
            batch = BatchPlan(ring[step % len(ring)], self.sampler(step), self.indices(step))
            for i in range(self.batch_size):
                if (image := next(images, None)) is None:  # the source was closed
                    return
                yield batch, i, image
