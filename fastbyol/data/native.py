"""The CPU data path: one process, threads, one decode per image, both views written straight into the batch.

Readers fetch the bytes of coming files. A worker takes the next image of the epoch's order, decodes it (the GIL is free),
and lets the kernels of crop.py and augment.py write its two views into its place in a preallocated ring of batches.
Nothing is pickled, copied or stacked. A slow disk is hidden by the readers, a slow consumer blocks all of them.

Memory: the ring has (prefetch_batches + 1) * V * B * S * S * 3 * bytes per value (V = 2 views); files read ahead take
readahead_images * bytes per file; each worker holds one decoded image and the planes of one view, 12 * S * S bytes.
"""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.batch import Batch
from fastbyol.data.decode import BadImage, DecodeBuffer, decode, decode_reduced, jpeg_size
from fastbyol.data.images import ImageSet
from fastbyol.data.sequence import DeterministicLoader
from fastbyol.data.views import AUGMENTATIONS, VIEWS, Sampler, center_box, epoch_order
from fastbyol.data.workers import resolve_threads
from fastbyol.errors import LoaderTimeout, first_line
from fastbyol.kernels import augment, crop

Boxes = Callable[[int, int], list[list[int]]]  # (height, width) -> V boxes of top, left, height, width
Fetched = bytes | NDArray[np.uint8] | OSError  # an image as it is stored, or why it could not be read


class NativeLoader(DeterministicLoader):
    """Threads -> ring of batches; see `batch.Loader` for the contract.

    Args:
        threads: workers; 0 is one per core.
        prefetch_batches: batches made ahead.
        readers: threads that read files.
        readahead_images: files read ahead of the workers.
        dct_scaling: decode at a reduced size where both crops keep at least S pixels.
        sequence: as for `DeterministicLoader`.

    Raises (while iterating):
        RunError: more files are unreadable than `max_bad_fraction` allows.
        HungLoader: no batch came within `timeout_s`.
    """

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
        """Yields the batches of steps start .. stop - 1; leaving the loop early stops the workers."""
        pipeline = self._pipeline(start, stop)
        on_device = DeviceSlots(self.device) if self.device.type == "cuda" else None
        try:
            for step in range(start, stop):
                before = time.perf_counter()
                slot = pipeline.wait_for(step)
                self.wait_s += time.perf_counter() - before
                yield from deliver(step, slot.memory, slot.labels, slot.indices, on_device)
                pipeline.release(step)
        finally:
            pipeline.close()

    def _pipeline(self, start: int, stop: int) -> "Pipeline":
        return Pipeline(self, start, stop)

    def ready(self, index: int) -> Any:
        """What a reader makes of an image, for `load`."""
        return self.fetch(index)

    def load(
        self, index: int, data: Fetched, boxes: Boxes, buffer: DecodeBuffer
    ) -> tuple[int, NDArray[np.uint8], list[list[int]]]:
        """Decodes image `index`, or, where that fails, the next one that can be read and decoded.

        Args:
            index: of the image wanted.
            data: what is stored of it, or why it could not be read.
            boxes: (height, width) -> the crop boxes of its views.
            buffer: of this thread.

        Returns:
            the index of the image delivered, its pixels, uint8 (H, W, 3), and the boxes in those pixels.
        """
        found, (image, places) = self.load_or_substitute(
            index, data, lambda content: self._decode(content, boxes, buffer)
        )
        return found, image, places

    def _decode(
        self, data: bytes | NDArray[np.uint8], boxes: Boxes, buffer: DecodeBuffer
    ) -> tuple[NDArray[np.uint8], list[list[int]]]:
        """Pixels and boxes, both at the reduced size where `dct_scaling` allows one."""
        full = jpeg_size(data) if self.dct_scaling and isinstance(data, bytes) else None
        if full is None:
            image = decode(data, buffer)
            return image, boxes(image.shape[0], image.shape[1])
        wanted = boxes(*full)
        shortest = min(min(box[2:]) for box in wanted)
        factor = next(f for f in (8, 4, 2, 1) if f == 1 or shortest >= f * self.size)
        image = decode_reduced(data, full, factor, buffer)
        return image, [_reduce_box(box, full, image.shape[:2]) for box in wanted]


def _reduce_box(box: list[int], full: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """The box in an image of another size: edges rounded to whole pixels, so a view moves by half a pixel at most."""
    top, left, height, width = box
    scale_y, scale_x = size[0] / full[0], size[1] / full[1]
    y0, y1 = round(top * scale_y), round((top + height) * scale_y)
    x0, x1 = round(left * scale_x), round((left + width) * scale_x)
    return [y0, x0, y1 - y0, x1 - x0]


class Scratch:
    """A thread's working memory: decoded image, planes of the view in hand, and what the kernels need."""

    def __init__(self, size: int) -> None:
        self.buffer = DecodeBuffer()
        self._planes = augment.new_planes(size)
        self._crop, self._augment = crop.CropScratch(size), augment.AugmentScratch(size)

    def render(
        self,
        image: NDArray[np.uint8],
        box: Sequence[int],
        p: NDArray[np.float32],
        out: NDArray[np.float32 | np.uint16 | np.int16],
    ) -> None:
        """One view of one image: crop, resize, flip, augment, normalize."""
        crop.crop_into(image, box, bool(p[augment.FLIP]), self._planes, self._crop)
        augment.augment_into(self._planes, p, out, self._augment)


class _Slot:
    """Memory of one batch, and the numpy views of it that the kernels write."""

    def __init__(self, loader: NativeLoader) -> None:
        b, s = loader.batch_size, loader.size
        pin = loader.device.type != "cpu"
        memory = torch.empty(VIEWS, b, s, s, 3, dtype=loader.dtype, pin_memory=pin)
        self.memory = memory
        self.labels = torch.empty(b, dtype=torch.int64, pin_memory=pin)
        self.indices = torch.empty(b, dtype=torch.int64, pin_memory=pin)
        # The same memory: writing one value through torch takes 8 microseconds of the interpreter lock.
        self.label_values, self.index_values = self.labels.numpy(), self.indices.numpy()
        self.out = augment.as_written(memory)


class DeviceSlots:
    """Two batches on a GPU, filled in turn from a stream of their own: a copy runs beside the step before it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._slots: list[list[Tensor]] = [[], []]
        self._copied, self._used = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))

    def fill(self, step: int, tensors: list[Tensor]) -> list[Tensor]:
        """The pinned `tensors` on the GPU; work that the caller queues from now on waits for the copy, the host does not."""
        k = step % 2
        if not self._slots[k]:
            self._slots[k] = [torch.empty_like(t, device=self._device) for t in tensors]
            # The allocator may hand out memory that work queued on the caller's stream still writes to.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[k])  # of the step before the last
            for mine, theirs in zip(self._slots[k], tensors, strict=True):
                mine.copy_(theirs, non_blocking=True)
            self._copied[k].record()
        torch.cuda.current_stream(self._device).wait_event(self._copied[k])
        return self._slots[k]

    def release(self, step: int) -> None:
        """After all work on the batch has been queued: waits until the pinned memory has been read."""
        self._used[step % 2].record()
        self._copied[step % 2].synchronize()


def deliver(
    step: int, views: Tensor, labels: Tensor, indices: Tensor, on_device: DeviceSlots | None, *, dim: int = 0
) -> Iterator[Batch]:
    """Yields a batch, copied to the GPU where there is one; its memory is free afterwards.

    Args:
        views: (V, B, S, S, 3), or with the views in another dimension `dim`; dense, so that it travels as one block.
        labels, indices: (B,).
    """
    if on_device is not None:
        views, labels, indices = on_device.fill(step, [views, labels, indices])
    view1, view2 = (view.permute(0, 3, 1, 2) for view in views.unbind(dim))
    yield Batch((view1, view2), labels, indices)
    if on_device is not None:
        on_device.release(step)


class _Job:
    """One batch in the making."""

    def __init__(self, slot: _Slot, sampler: Sampler, indices: NDArray[np.int64]) -> None:
        self.slot, self.sampler, self.indices = slot, sampler, indices
        self.packed = sampler.params().pack()  # (B, V, COLUMNS), boxes still 0
        self.remaining = len(indices)


class Pipeline:
    """The readers and workers of one iteration, and the ring between them and the consumer.

    Images are numbered through: image k belongs to step k // B and is the (k % B)-th of its batch.
    """

    def __init__(self, loader: NativeLoader, start: int, stop: int) -> None:
        self._loader, self._stop = loader, stop
        b = loader.batch_size
        self._slots = [_Slot(loader) for _ in range(loader.prefetch_batches + 1)]
        self._jobs: dict[int, _Job] = {}
        self._fetched: dict[int, Any] = {}  # image -> what the readers made of it, not yet taken
        self._next_read = self._next = start * b  # the next image to be read, and to be decoded
        self._end = stop * b
        self._released = start  # steps before this one have been consumed
        self._closed = self._hung = False
        self._error: BaseException | None = None
        lock = threading.Lock()
        # Waited for by workers, consumer, readers, and by a thread that decodes ahead of the workers where there is one.
        self._work, self._ready, self._room, self._space = (threading.Condition(lock) for _ in range(4))
        self._threads = [
            threading.Thread(target=self._guard, args=(target,), name=f"fastbyol-loader-{name}-{k}", daemon=True)
            for k, (name, target) in enumerate(self._jobs_of_threads())
        ]
        for thread in self._threads:
            thread.start()

    def _jobs_of_threads(self) -> list[tuple[str, Callable[[], None]]]:
        return [("reader", self._read)] * self._loader.readers + [("worker", self._run)] * self._loader.threads

    def wait_for(self, step: int) -> _Slot:
        """Blocks until the batch of `step` is complete.

        Raises:
            BaseException: whatever a thread died of.
            HungLoader: it does not come.
        """
        limit = time.monotonic() + self._loader.timeout_s
        with self._ready:
            while self._error is None and (step not in self._jobs or self._jobs[step].remaining):
                if not self._ready.wait(max(limit - time.monotonic(), 0)) and time.monotonic() >= limit:
                    self._hung = True
                    raise timeout_error(self._loader)
            if self._error is not None:
                raise self._error
            return self._jobs[step].slot

    def release(self, step: int) -> None:
        """Gives the slot of `step` back to the workers."""
        with self._work:
            del self._jobs[step]
            self._released = step + 1
            self._work.notify_all()

    def close(self) -> None:
        """Stops all threads after the image in hand and waits for them, unless they hang: then they die with the process."""
        with self._work:
            self._stop_all()
        for thread in self._threads:
            if not self._hung:
                thread.join()

    def _stop_all(self) -> None:
        self._closed = True
        for condition in (self._work, self._ready, self._room, self._space):
            condition.notify_all()

    def _guard(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:  # handed to the consumer, who raises it
            with self._work:
                self._error = self._error or error
                self._stop_all()

    def _read(self) -> None:
        """Keeps `readahead_images` files ahead of the workers; refills when a quarter of them is gone."""
        loader, window = self._loader, self._loader.readahead_images
        while True:
            with self._room:
                while not self._closed and self._next_read < self._end and self._next_read >= self._next + window:
                    self._room.wait()
                if self._closed or self._next_read >= self._end:
                    return
                image, self._next_read = self._next_read, self._next_read + 1
                index = self._index(image)
            data = loader.ready(index)
            with self._work:
                self._deliver(image, data)

    def _deliver(self, image: int, data: Any) -> None:
        """Called with the lock held."""
        self._fetched[image] = data
        self._work.notify_all()

    def _run(self) -> None:
        scratch = Scratch(self._loader.size)
        while (taken := self._take()) is not None:
            job, i, data = taken
            self._make(job, i, data, scratch)
            with self._ready:
                job.remaining -= 1
                if job.remaining == 0:
                    self._ready.notify_all()

    def _take(self) -> tuple[_Job, int, Any] | None:
        """The next image, once its batch has a slot and its file has been read; None at the end or after close."""
        b = self._loader.batch_size
        with self._work:
            while not self._closed and self._next < self._end:
                step, i = divmod(self._next, b)
                if step >= self._released + len(self._slots) or self._next not in self._fetched:
                    self._work.wait()
                    continue
                if i == 0:
                    self._jobs[step] = self._new_job(step)
                data = self._fetched.pop(self._next)
                self._next += 1
                self._space.notify()
                if self._next + self._loader.readahead_images * 3 // 4 >= self._next_read:
                    self._room.notify_all()
                return self._jobs[step], i, data
            return None

    def _index(self, image: int) -> int:
        """The place in the set of image number `image`."""
        return self._loader.index(*divmod(image, self._loader.batch_size))

    def _new_job(self, step: int) -> _Job:
        loader = self._loader
        return _Job(self._slots[step % len(self._slots)], loader.sampler(step), loader.indices(step))

    def _make(self, job: _Job, i: int, data: Any, scratch: Scratch) -> None:
        """Decodes image i of the batch once and writes its label, index and both views."""

        def boxes(height: int, width: int) -> list[list[int]]:
            return job.sampler.boxes(slice(i, i + 1), [(height, width)])[0].tolist()

        index, image, places = self._loader.load(int(job.indices[i]), data, boxes, scratch.buffer)
        for v, box in enumerate(places):
            scratch.render(image, box, job.packed[i, v], job.slot.out[v, i])
        job.slot.label_values[i] = self._loader.images.labels[index]
        job.slot.index_values[i] = index


def timeout_error(loader: DeterministicLoader) -> LoaderTimeout:
    """What to raise where a loader's batch does not come."""
    return LoaderTimeout(
        f"the loader has made no batch for {loader.timeout_s:g} s (data.timeout_s), reading from {loader.images.root}",
        _stacks(),
    )


def _stacks() -> str:
    """Where every thread of the process is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


Place = Callable[[int, int, int], tuple[Sequence[int], NDArray[np.float32]]]  # (k-th, height, width) -> box, parameters


CENTER_FRACTION = 0.875  # 224/256 of the short side: the center crop of BYOL's evaluation


def center_crops(
    images: ImageSet, *, size: int, fraction: float, batch_size: int, threads: int, bad: dict[int, str]
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """All images in index order, without augmentation: center crop, bicubic resize, normalize.

    Args:
        size: S.
        fraction: side of the crop as a share of the short side (BYOL: 224/256).
        bad: unreadable images are left out and entered here: index -> why.

    Yields:
        images (n, 3, S, S) float32, channels_last, normalized, and their indices (n,); n <= batch_size.
    """
    identity = np.zeros(augment.COLUMNS, dtype=np.float32)
    yield from _rendered(
        images,
        np.arange(len(images)),
        lambda k, height, width: (center_box(height, width, fraction), identity),
        size=size,
        batch_size=batch_size,
        threads=threads,
        bad=bad,
    )


def random_crops(
    images: ImageSet, *, size: int, seed: int, epoch: int, batch_size: int, threads: int, bad: dict[int, str]
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """One epoch of what classifiers are trained on: crop and flip (augmentation "crop_flip"), in the epoch's order.

    Order and crops are functions of (seed, epoch, position). The N % batch_size images left over are not delivered.

    Args, Yields:
        as `center_crops`.
    """
    sampler = Sampler(AUGMENTATIONS["crop_flip"], seed, epoch, np.arange(len(images)))
    packed = sampler.params().pack()[:, 0]

    def place(k: int, height: int, width: int) -> tuple[Sequence[int], NDArray[np.float32]]:
        return sampler.boxes(slice(k, k + 1), [(height, width)])[0, 0].tolist(), packed[k]

    order = epoch_order(seed, epoch, len(images))
    order = order[: len(order) // batch_size * batch_size]
    yield from _rendered(images, order, place, size=size, batch_size=batch_size, threads=threads, bad=bad)


def _rendered(
    images: ImageSet,
    order: NDArray[np.int64],
    place: Place,
    *,
    size: int,
    batch_size: int,
    threads: int,
    bad: dict[int, str],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Batches of one view of the images `order`; the next batch is made while the consumer has the last."""
    local = threading.local()

    def make(k: int, out: NDArray[np.float32]) -> bool:
        if not hasattr(local, "scratch"):
            local.scratch = Scratch(size)
        index = int(order[k])
        try:
            image = decode(images.read(index), local.scratch.buffer)
        except (OSError, BadImage) as error:
            bad[index] = first_line(error)
            return False
        box, p = place(k, *image.shape[:2])
        local.scratch.render(image, box, p, out)
        return True

    with ThreadPoolExecutor(resolve_threads(threads), thread_name_prefix="fastbyol-eval") as pool:

        def begin(start: int) -> tuple[NDArray[np.int64], NDArray[np.float32], Iterator[bool]]:
            stop = min(start + batch_size, len(order))
            crops = np.empty((max(stop - start, 0), size, size, 3), dtype=np.float32)
            return order[start:stop], crops, pool.map(make, range(start, stop), crops)

        ahead = begin(0)
        for start in range(0, len(order), batch_size):
            indices, crops, made = ahead
            good = np.array(list(made), dtype=bool)
            ahead = begin(start + batch_size)  # of nothing at the end
            if not good.all():
                indices, crops = indices[good], crops[good]
            if len(indices):
                yield torch.from_numpy(crops).permute(0, 3, 1, 2), indices
