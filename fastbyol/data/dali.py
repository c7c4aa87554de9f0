"""DALI decodes: nvJPEG on a GPU, libjpeg-turbo on the CPU. Everything else is what it is with every other backend.

DALI is given each image's bytes once, in our order, and decodes the whole image; our kernels cut both views from that. DALI's own
resize is not used: it takes neighbors from outside the crop and repeats the image's edge, where the published code drops
them, and it would write both crops to memory once more than a kernel that reads the decoded image.

What the order of images, their boxes and their views depend on must not change with the decoder. So the readers look at each
file first: a plain JPEG goes to DALI, without its metadata; anything else (EXIF orientation, CMYK, PNG, raw pixels, a file that
was cut off) is decoded as the native backend decodes it, and a bad one is replaced by the same neighbor. The look is needed for safety too: a
file that DALI 2.4 cannot even parse makes its CPU decoder end the process now and then (its threads go on with a batch that has
been given up). One that it parses and then cannot decode costs a new pipeline, and the host decides what becomes of its batch.

On a GPU a batch is decoded on DALI's stream and cut and augmented by two kernels on the caller's current stream; the pixels
never visit the host. On the CPU the worker threads of native.py cut the views from DALI's memory.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from fastbyol.data.batch import Batch
from fastbyol.data.decode import DecodeBuffer, decode, is_whole_jpeg, jpeg_size, without_metadata
from fastbyol.data.native import Boxes, NativeLoader, Pipeline, timeout_error
from fastbyol.data.workers import PrefetchPool
from fastbyol.errors import first_line
from fastbyol.kernels import augment

CPU_BATCH = (
    64  # images that DALI decodes at a time on the CPU; with fewer its threads stand still more often at a batch's end
)
CPU_BATCH_PIXELS = 1 << 24  # and of large images only so many that they take 48 MB
CPU_IN_FLIGHT = 2  # batches that DALI holds there: one being decoded, one waiting for it
_NOTHING = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8)), dtype=np.uint8)


class Prepared(NamedTuple):
    """An image that is known to be good: bytes for DALI, or pixels (H, W, 3) where the host has decoded it."""

    index: int  # in the set
    size: tuple[int, int]  # height, width
    encoded: NDArray[np.uint8] | None
    pixels: Any  # an array, or a pinned tensor where it is to travel to a GPU


class DaliLoader(NativeLoader):
    """DALI -> batches; see `batch.Loader` for the contract.

    Args:
        hw_decoder_load: share of a batch's JPEGs for the hardware decoder of a GPU that has one.
        preallocate_px: side of the largest image to set decoder memory aside for; 0 lets it grow.
        native: as for `NativeLoader`.

    Raises (while iterating):
        RunError, HungLoader: as `NativeLoader` does.
    """

    def __init__(self, *, hw_decoder_load: float, preallocate_px: int, **native: Any) -> None:
        super().__init__(**native, dct_scaling=False)
        self._hints: dict[str, Any] = {}
        self.decode_batch, self.in_flight = self.batch_size, self.prefetch_batches
        if self.device.type == "cuda":
            self._hints = {"hw_decoder_load": hw_decoder_load}
            if preallocate_px:
                for side in ("width", "height"):
                    self._hints |= {f"preallocate_{side}_hint": preallocate_px}
        else:  # what is in flight, and as much again for the workers, must fit what the readers hold
            self.in_flight = CPU_IN_FLIGHT
            self.readahead_images = max(self.readahead_images, 2 * CPU_IN_FLIGHT)
            self.decode_batch = min(CPU_BATCH, self.readahead_images // (2 * CPU_IN_FLIGHT))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of steps start .. stop - 1; leaving the loop early stops all background work."""
        if self.device.type == "cpu":
            yield from super().batches(start, stop)
            return
        steps = self._read_steps(start, stop)
        decoded = self.decoder(steps).batches()
        try:
            for step in range(start, stop):
                before = time.perf_counter()
                prepared, images = next(decoded)
                self.wait_s += time.perf_counter() - before
                yield self._render(step, prepared, images)
        finally:
            decoded.close()
            steps.close()

    def decoder(self, source: Iterator[list[Prepared]]) -> "Decoder":
        """A DALI pipeline for the batches of `source`."""
        options = {"batch": self.decode_batch, "in_flight": self.in_flight, "threads": self.threads}
        return Decoder(source, self._on_host, **options, device=self.device, hints=self._hints)

    def _pipeline(self, start: int, stop: int) -> Pipeline:
        return _DaliPipeline(self, start, stop)

    def ready(self, index: int) -> Prepared:
        """The image, or the one that takes its place, ready for DALI."""
        found, (size, encoded, pixels) = self.load_or_substitute(index, self.fetch(index), _prepare)
        return Prepared(found, size, encoded, pixels if pixels is None else self._ready_to_travel(pixels))

    def _on_host(self, prepared: Prepared) -> Prepared:
        """The image decoded by the host, or the one that takes its place."""
        if prepared.encoded is None:
            return prepared
        found, pixels = self.load_or_substitute(prepared.index, prepared.encoded.tobytes(), decode)
        return Prepared(found, (pixels.shape[0], pixels.shape[1]), None, self._ready_to_travel(pixels))

    def _ready_to_travel(self, pixels: NDArray[np.uint8]) -> Any:
        """Pixels that the host has decoded; for a GPU in pinned memory, which the reader's thread copies, not the one that launches the step."""
        return pixels if self.device.type == "cpu" else torch.from_numpy(pixels).pin_memory()

    def load(
        self, index: int, data: Any, boxes: Boxes, buffer: DecodeBuffer
    ) -> tuple[int, NDArray[np.uint8], list[list[int]]]:
        """What DALI has decoded; `index` and `buffer` are not needed any more."""
        found, image = data
        return found, image, boxes(image.shape[0], image.shape[1])

    def _read_steps(self, start: int, stop: int) -> Iterator[list[Prepared]]:
        """The images of each step, read by `readers` threads `readahead_images` ahead."""
        places = ((step, i) for step in range(start, stop) for i in range(self.batch_size))
        ahead = PrefetchPool(
            lambda place: self.ready(self.index(*place)),
            places,
            threads=self.readers,
            window=self.readahead_images,
            name="fastbyol-loader-reader",
        )
        try:
            for _ in range(start, stop):
                yield [ahead.take(self.timeout_s) for _ in range(self.batch_size)]
        except TimeoutError:
            raise timeout_error(self) from None
        finally:
            ahead.close()

    def _render(self, step: int, prepared: list[Prepared], images: list[Tensor]) -> Batch:
        """Both views of a batch, by kernels on the current stream."""
        from fastbyol.kernels.triton.augment import augment_views
        from fastbyol.kernels.triton.crop import crop_views

        params = self.sampler(step).params([p.size for p in prepared])
        crops = crop_views(images, params.box, params.flip, self.size)
        rows = np.ascontiguousarray(params.pack().transpose(1, 0, 2).reshape(-1, augment.COLUMNS))
        views = augment_views(crops, self._upload(rows), self.dtype)
        indices = np.array([p.index for p in prepared])
        view1, view2 = views.split(self.batch_size)
        return Batch((view1, view2), self._upload(self.images.labels[indices]), self._upload(indices))

    def _upload(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)


class Decoder:
    """A DALI pipeline: batches of bytes in, decoded images out, in order.

    Args:
        source: batches of at most `batch` images.
        on_host: what to do instead with each image of a batch that DALI refuses; its result has pixels.
        batch: the most images that a batch has.
        in_flight: batches that DALI holds at a time.
        threads: of DALI.
        device: where the pixels are wanted.
        hints: further arguments of DALI's decoder.
    """

    def __init__(
        self,
        source: Iterator[list[Prepared]],
        on_host: Callable[[Prepared], Prepared],
        *,
        batch: int,
        in_flight: int,
        threads: int,
        device: torch.device,
        hints: dict[str, Any],
    ) -> None:
        self._source, self._on_host, self._device = source, on_host, device
        self._fed: deque[list[Prepared]] = deque()  # given to DALI, not yet back
        self._again: deque[list[Prepared]] = deque()  # to be given to a new pipeline, since the old one has failed
        self._options = {
            "batch_size": batch,
            "num_threads": threads,
            "device_id": device.index or 0 if device.type == "cuda" else None,
            "prefetch_queue_depth": in_flight,
        }
        self._hints = hints
        self._pipe = self._build()

    def _build(self) -> Any:
        device = "mixed" if self._device.type == "cuda" else "cpu"

        @pipeline_def(**self._options)
        def decoding() -> Any:
            encoded = fn.external_source(source=self._pull, batch=True, dtype=types.UINT8, ndim=1)
            # The chroma interpolation of libjpeg-turbo, so that a view is the same on any device.
            return fn.decoders.image(
                encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True, **self._hints
            )

        pipe = decoding()
        pipe.build()
        return pipe

    def _pull(self) -> list[NDArray[np.uint8]]:
        """DALI's next input; StopIteration, which ends its run, comes from the source."""
        batch = self._again.popleft() if self._again else next(self._source)
        self._fed.append(batch)
        return [p.encoded for p in batch if p.encoded is not None] or [_NOTHING]

    def batches(self) -> Iterator[tuple[list[Prepared], list[Any]]]:
        """Each batch with its images: tensors on the GPU, or arrays on the CPU, uint8 (H, W, 3)."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._pipe.schedule_run()
        while True:
            try:
                (decoded,) = self._pipe.share_outputs(stream)
            except StopIteration:
                return
            except RuntimeError as error:  # DALI's for a file that it cannot decode; this pipeline is lost
                yield self._refused(error)
                continue
            batch = self._fed.popleft()
            here = iter(self._unpack(decoded))
            yield batch, [next(here) if p.pixels is None else self._place(p.pixels) for p in batch]
            self._pipe.release_outputs()
            self._pipe.schedule_run()

    def _refused(self, error: RuntimeError) -> tuple[list[Prepared], list[Any]]:
        """The oldest batch, decoded by the host, which has the last word on what is a bad image; the others are fed again."""
        batch = self._fed.popleft()
        reason = next((line.strip() for line in str(error).splitlines() if "ailed" in line), first_line(error))
        warnings.warn(f"DALI refuses an image; its batch is decoded by libjpeg-turbo instead: {reason}", stacklevel=2)
        self._again = self._fed + self._again
        self._fed = deque()
        self._pipe = self._build()
        self._pipe.schedule_run()
        decoded = [self._on_host(prepared) for prepared in batch]
        return decoded, [self._place(prepared.pixels) for prepared in decoded]

    def _unpack(self, decoded: Any) -> Iterator[Any]:
        """Each image of DALI's output, without a copy; an image keeps the memory of its batch."""
        for k in range(len(decoded)):
            yield torch.from_dlpack(decoded[k]) if self._device.type == "cuda" else np.asarray(decoded[k])

    def _place(self, pixels: Any) -> Any:
        return pixels if self._device.type == "cpu" else pixels.to(self._device, non_blocking=True)


def _prepare(
    data: bytes | NDArray[np.uint8],
) -> tuple[tuple[int, int], NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
    """Size, bytes for DALI or None, pixels or None; raises BadImage."""
    if isinstance(data, bytes):
        size = jpeg_size(data) if is_whole_jpeg(data) else None
        if size is not None:
            return size, np.frombuffer(without_metadata(data), dtype=np.uint8), None
    pixels = decode(data)
    height, width = pixels.shape[:2]
    return (height, width), None, pixels


class _DaliPipeline(Pipeline):
    """native.py's pipeline with one more thread between readers and workers, which gives batches to DALI."""

    def __init__(self, loader: DaliLoader, start: int, stop: int) -> None:
        self._read_ahead: dict[int, Prepared] = {}
        self._next_given = start * loader.batch_size
        self._ends: deque[int] = deque()  # of batches that the workers have not used up: the image behind each
        super().__init__(loader, start, stop)

    def _jobs_of_threads(self) -> list[tuple[str, Callable[[], None]]]:
        return [*super()._jobs_of_threads(), ("dali", self._decode)]

    def _deliver(self, image: int, data: Any) -> None:
        self._read_ahead[image] = data
        self._space.notify()

    def _decode(self) -> None:
        loader: Any = self._loader
        image = self._next_given
        for batch, images in loader.decoder(self._batches()).batches():
            with self._work:
                for prepared, pixels in zip(batch, images, strict=True):
                    self._fetched[image] = (prepared.index, pixels)
                    image += 1
                self._work.notify_all()

    def _batches(self) -> Iterator[list[Prepared]]:
        """Neighbors that have been read, once the workers have used up all but a few of the batches before them."""
        loader: Any = self._loader
        while self._next_given < self._end:
            with self._space:
                first, last = self._next_given, min(self._next_given + loader.decode_batch, self._end)
                while not self._closed and not (self._room_for_decoded() and self._has_read(first, last)):
                    self._space.wait()
                if self._closed:
                    return
                batch: list[Prepared] = []
                pixels = 0
                while self._next_given < last and (not batch or pixels < CPU_BATCH_PIXELS):
                    batch.append(self._read_ahead.pop(self._next_given))
                    pixels += batch[-1].size[0] * batch[-1].size[1]
                    self._next_given += 1
                self._ends.append(self._next_given)
            yield batch

    def _room_for_decoded(self) -> bool:
        while self._ends and self._ends[0] <= self._next:
            self._ends.popleft()
        return len(self._ends) < 2 * CPU_IN_FLIGHT

    def _has_read(self, first: int, last: int) -> bool:
        return all(k in self._read_ahead for k in range(first, last))
