"""The CPU data path: one process, threads, one decode per image, both views written straight into the batch.

A worker takes the next image of the epoch's order, reads and decodes it (the GIL is free in both), and lets the
kernels of crop.py and augment.py write its two views into its place in a preallocated ring of batches. Nothing is
pickled, copied or stacked.

Memory of the ring: (prefetch_batches + 1) * V * B * S * S * 3 * bytes per value (V = 2 views).
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.batch import Batch
from fastbyol.data.decode import BadImage, decode
from fastbyol.data.folder import ImageFolder
from fastbyol.errors import RunError, first_line
from fastbyol.kernels import augment, crop
from fastbyol.views import VIEWS, Recipe, Sampler, centre_box, epoch_order


def cpu_threads(threads: int) -> int:
    """The number of threads that a setting means: 0 is one per core that this process may use."""
    return threads or len(os.sched_getaffinity(0))


class NativeLoader:
    """Threads -> ring of batches; see `batch.Loader` for the contract.

    Args:
        folder: the indexed images, at least `batch_size` of them.
        batch_size: B.
        size: S, side of a view in pixels.
        recipe: how views are drawn.
        seed: of the sample order and the views.
        threads: workers; 0 is one per core.
        prefetch_batches: batches made ahead.
        dtype: float32 or bfloat16.
        device: where batches are delivered.
        max_bad_fraction: share of the files that may be unreadable.

    Raises (while iterating):
        RunError: more files are unreadable than `max_bad_fraction` allows.
    """

    def __init__(
        self,
        folder: ImageFolder,
        *,
        batch_size: int,
        size: int,
        recipe: Recipe,
        seed: int,
        threads: int,
        prefetch_batches: int,
        dtype: torch.dtype,
        device: torch.device,
        max_bad_fraction: float,
    ) -> None:
        self.folder, self.batch_size, self.size, self.recipe, self.seed = folder, batch_size, size, recipe, seed
        self.threads, self.prefetch_batches = cpu_threads(threads), prefetch_batches
        self.dtype, self.device, self.max_bad_fraction = dtype, device, max_bad_fraction
        self.wait_s = 0.0
        self.bad: dict[int, str] = {}
        self._bad_lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.folder) // self.batch_size

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps start .. stop - 1; leaving the loop early stops the workers."""
        pipeline = _Pipeline(self, start, stop)
        copied: torch.cuda.Event | None = None
        try:
            for step in range(start, stop):
                before = time.perf_counter()
                slot = pipeline.wait_for(step)
                self.wait_s += time.perf_counter() - before
                views, labels, indices = slot.views, slot.labels, slot.indices
                if self.device.type != "cpu":
                    views, labels, indices = (t.to(self.device, non_blocking=True) for t in (views, labels, indices))
                    copied = torch.cuda.Event()
                    copied.record()
                yield Batch((views[0], views[1]), labels, indices)
                if copied is not None:
                    copied.synchronize()  # the workers may overwrite the slot only after the copy has read it
                pipeline.release(step)
        finally:
            pipeline.close()

    def load(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        """Reads and decodes image `index`, or, where that fails, the next one in the index that can be read.

        The substitute depends on the files alone, so batches stay the same for any number of threads.

        Returns:
            the index of the image delivered, and its pixels, uint8 (H, W, 3).
        """
        n = len(self.folder)
        for candidate in ((index + k) % n for k in range(n)):
            if candidate in self.bad:
                continue
            try:
                return candidate, decode(self.folder.read(candidate))
            except OSError as error:
                self._count_bad(candidate, error.strerror or first_line(error))
            except BadImage as error:
                self._count_bad(candidate, str(error))
        raise RunError(f"none of the {n} images in {self.folder.root} can be read")

    def _count_bad(self, index: int, reason: str) -> None:
        with self._bad_lock:
            self.bad[index] = reason
            count = len(self.bad)
        if count > self.max_bad_fraction * len(self.folder):
            raise RunError(
                f"{count} of {len(self.folder)} images cannot be read, more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows; the last one: {self.folder.root / self.folder.paths[index]}: {reason}"
            )


class _Slot:
    """Memory of one batch, and the numpy views of it that the kernels write."""

    def __init__(self, loader: NativeLoader) -> None:
        b, s = loader.batch_size, loader.size
        pin = loader.device.type != "cpu"
        memory = torch.empty(VIEWS, b, s, s, 3, dtype=loader.dtype, pin_memory=pin)
        self.views = memory.permute(0, 1, 4, 2, 3)  # each view is (B, 3, S, S) in channels_last layout
        self.labels = torch.empty(b, dtype=torch.int64, pin_memory=pin)
        self.indices = torch.empty(b, dtype=torch.int64, pin_memory=pin)
        bits = memory.view(torch.int16) if loader.dtype == torch.bfloat16 else memory
        self.out = bits.numpy().view(np.uint16) if loader.dtype == torch.bfloat16 else bits.numpy()


class _Job:
    """One batch in the making."""

    def __init__(self, slot: _Slot, sampler: Sampler, indices: NDArray[np.int64]) -> None:
        self.slot, self.sampler, self.indices = slot, sampler, indices
        self.packed = sampler.params().pack()  # (B, V, COLUMNS), boxes still 0
        self.remaining = len(indices)


class _Pipeline:
    """The workers of one iteration, and the ring between them and the consumer."""

    def __init__(self, loader: NativeLoader, start: int, stop: int) -> None:
        self._loader, self._stop = loader, stop
        self._slots = [_Slot(loader) for _ in range(loader.prefetch_batches + 1)]
        self._jobs: dict[int, _Job] = {}
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the epoch whose job was made last
        self._next = (start, 0)  # step and place in the batch of the next image to be taken
        self._released = start  # steps before this one have been consumed
        self._closed = False
        self._error: BaseException | None = None
        lock = threading.Lock()
        self._work, self._ready = threading.Condition(lock), threading.Condition(lock)
        self._workers = [
            threading.Thread(target=self._run, name=f"fastbyol-loader-{k}", daemon=True) for k in range(loader.threads)
        ]
        for worker in self._workers:
            worker.start()

    def wait_for(self, step: int) -> _Slot:
        """Blocks until the batch of `step` is complete.

        Raises:
            BaseException: whatever a worker died of.
        """
        with self._ready:
            while self._error is None and (step not in self._jobs or self._jobs[step].remaining):
                self._ready.wait()
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
        """Stops the workers after the image in hand and waits for them."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        for worker in self._workers:
            worker.join()

    def _run(self) -> None:
        loader = self._loader
        scratch = crop.CropScratch(loader.size), augment.AugmentScratch(loader.size)
        planes = np.empty((3, loader.size, loader.size), dtype=np.float32)
        try:
            while (taken := self._take()) is not None:
                job, i = taken
                self._make(job, i, planes, *scratch)
                with self._ready:
                    job.remaining -= 1
                    if job.remaining == 0:
                        self._ready.notify_all()
        except BaseException as error:  # handed to the consumer, who raises it
            with self._ready:
                self._error = self._error or error
                self._closed = True
                self._ready.notify_all()
                self._work.notify_all()

    def _take(self) -> tuple[_Job, int] | None:
        """The next image of the next batch that has a slot; None when there is none left or the loop was closed."""
        with self._work:
            while not self._closed and self._next[0] < self._stop:
                step, i = self._next
                if step >= self._released + len(self._slots):
                    self._work.wait()
                    continue
                if i == 0:
                    self._jobs[step] = self._new_job(step)
                    self._work.notify_all()
                job = self._jobs[step]
                self._next = (step, i + 1) if i + 1 < self._loader.batch_size else (step + 1, 0)
                return job, i
            return None

    def _new_job(self, step: int) -> _Job:
        loader = self._loader
        epoch, batch = divmod(step, len(loader))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(loader.seed, epoch, len(loader.folder))
        positions = np.arange(batch * loader.batch_size, (batch + 1) * loader.batch_size)
        sampler = Sampler(loader.recipe, loader.seed, epoch, positions)
        return _Job(self._slots[step % len(self._slots)], sampler, self._order[1][positions])

    def _make(
        self,
        job: _Job,
        i: int,
        planes: NDArray[np.float32],
        crop_scratch: crop.CropScratch,
        augment_scratch: augment.AugmentScratch,
    ) -> None:
        """Decodes image i of the batch once and writes its label, index and both views."""
        index, image = self._loader.load(int(job.indices[i]))
        boxes = job.sampler.boxes(slice(i, i + 1), [image.shape[:2]])[0].tolist()
        for v in range(VIEWS):
            p = job.packed[i, v]
            crop.crop_into(image, boxes[v], bool(p[augment.FLIP]), planes, crop_scratch)
            augment.augment_into(planes, p, job.slot.out[v, i], augment_scratch)
        job.slot.labels[i] = int(self._loader.folder.labels[index])
        job.slot.indices[i] = index


def centre_crops(
    folder: ImageFolder, *, size: int, fraction: float, batch_size: int, threads: int, bad: dict[int, str]
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """All images in index order, without augmentation: centre crop, bicubic resize, normalise.

    Args:
        size: S.
        fraction: side of the crop as a share of the short side (BYOL: 224/256).
        bad: unreadable images are left out and entered here: index -> why.

    Yields:
        images (n, 3, S, S) float32, channels_last, normalised, and their indices (n,); n <= batch_size.
    """
    identity = np.zeros(augment.COLUMNS, dtype=np.float32)
    local = threading.local()

    def make(index: int, out: NDArray[np.float32]) -> bool:
        try:
            image = decode(folder.read(index))
        except (OSError, BadImage) as error:
            bad[index] = first_line(error)
            return False
        if not hasattr(local, "scratch"):
            local.scratch = crop.CropScratch(size), augment.AugmentScratch(size)
            local.planes = np.empty((3, size, size), dtype=np.float32)
        crop.crop_into(image, centre_box(*image.shape[:2], fraction), False, local.planes, local.scratch[0])
        augment.augment_into(local.planes, identity, out, local.scratch[1])
        return True

    with ThreadPoolExecutor(cpu_threads(threads), thread_name_prefix="fastbyol-eval") as pool:
        for start in range(0, len(folder), batch_size):
            indices = np.arange(start, min(start + batch_size, len(folder)))
            images = np.empty((len(indices), size, size, 3), dtype=np.float32)
            good = np.array(list(pool.map(make, indices.tolist(), images)), dtype=bool)
            if good.any():
                yield torch.from_numpy(images[good]).permute(0, 3, 1, 2), indices[good]
