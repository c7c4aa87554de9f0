"""DALI as decoder: nvJPEG on a GPU, libjpeg-turbo on the CPU. The rest is shared with all backends.

DALI gets each image's bytes once, in our order, and decodes the whole image; our kernels cut both
views from it. DALI's own resize is not used: it reads neighbors from outside the crop and repeats
the image's edge, where the published code drops them, and it would write both crops to memory once
more than a kernel that reads the decoded image.

The order of images, their boxes and their views must not depend on the decoder. So the readers
inspect each file first: a plain JPEG goes to DALI, without its metadata; anything else (EXIF
orientation, CMYK, PNG, raw pixels, a truncated file) is decoded as in the native backend, and a bad
image is replaced by the same neighbor. The inspection is also needed for safety: a file that DALI
2.4 cannot parse occasionally crashes the process in its CPU decoder, whose threads go on with an
abandoned batch. A file that it parses but cannot decode costs a new pipeline, and the host decodes
its batch.

On a GPU a batch is decoded on DALI's stream, then cropped and augmented by two kernels on the
caller's current stream; the pixels never visit the host. On the CPU the workers of native.py cut
the views from DALI's memory.
"""

import time
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
from fastbyol.data.decode import decode, is_complete_jpeg, jpeg_size
from fastbyol.data.metadata import without_metadata
from fastbyol.data.native import NativeLoader
from fastbyol.data.rendering import BatchPlan, Box, Worker
from fastbyol.data.sequence import StoredImage, timeout_error
from fastbyol.data.workers import PrefetchPool
from fastbyol.errors import first_line
from fastbyol.kernels import augment_params
from fastbyol.runtime.logging import logger
from fastbyol.spans import AUGMENT, span

CPU_BATCH = 64  # images that DALI decodes at a time on the CPU; smaller batches leave its threads idle more often
CPU_BATCH_PIXELS = 1 << 24  # upper limit of such a batch, 48 MB
CPU_BATCHES_IN_FLIGHT = 2  # held by DALI there: one being decoded, one waiting
_EMPTY_JPEG = np.frombuffer(simplejpeg.encode_jpeg(np.zeros((8, 8, 3), dtype=np.uint8)), dtype=np.uint8)


class Prepared(NamedTuple):
    """A usable image: bytes for DALI, or pixels (H, W, 3) that the host has decoded."""

    index: int  # in the set
    size: tuple[int, int]  # height, width
    encoded: NDArray[np.uint8] | None
    pixels: Any  # an array; for a GPU a pinned tensor


class DaliWorker(Worker):
    """Renders images that DALI has decoded."""

    def load(self, batch: BatchPlan, i: int, data: Any) -> tuple[int, NDArray[np.uint8], list[Box]]:
        """Return an image's index, its pixels, and the crop boxes of its views."""
        index, image = data
        return index, image, batch.sampler.boxes(slice(i, i + 1), (image.shape[:2],))[0].tolist()


class DaliLoader(NativeLoader):
    """Loader whose images DALI decodes; see `batch.Loader` for the contract.

    Args:
        hw_decoder_load: share of a batch's JPEGs for the hardware decoder, on GPUs that have one.
        preallocate_px: side of the largest image to preallocate decoder memory for; 0 lets it grow.
        native: arguments of `NativeLoader`.

    Raises (while iterating):
        RunError, LoaderTimeout: as `NativeLoader`.
    """

    worker_class = DaliWorker

    def __init__(self, *, hw_decoder_load: float, preallocate_px: int, **native: Any) -> None:
        super().__init__(**native, dct_scaling=False)
        self._hints: dict[str, Any] = {}
        self.decode_batch, self.batches_in_flight = self.batch_size, self.prefetch_batches
        if self.device.type == "cuda":
            self._hints = {"hw_decoder_load": hw_decoder_load}
            if preallocate_px:
                for side in ("width", "height"):
                    self._hints |= {f"preallocate_{side}_hint": preallocate_px}
        else:  # DALI's batches and the workers' (as many) hold at most `readahead_images` decoded images
            self.batches_in_flight = CPU_BATCHES_IN_FLIGHT
            self.readahead_images = max(self.readahead_images, 2 * CPU_BATCHES_IN_FLIGHT)
            self.decode_batch = min(CPU_BATCH, self.readahead_images // (2 * CPU_BATCHES_IN_FLIGHT))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start .. stop - 1. Leaving early stops all background work."""
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
        """Return a DALI pipeline for the batches of `source`."""
        options = {"batch": self.decode_batch, "in_flight": self.batches_in_flight, "threads": self.threads}
        return Decoder(source, self._decode_on_host, **options, device=self.device, hints=self._hints)

    def new_reader(self) -> Callable[[int], Prepared]:
        """Return a reader's function, which prepares an image or its substitute for DALI."""
        return self._prepare

    def _prepare(self, index: int) -> Prepared:
        used, (size, encoded, pixels) = self.load_or_substitute(index, self.fetch(index), inspect)
        return Prepared(used, size, encoded, pixels if pixels is None else self._pin(pixels))

    def _decode_on_host(self, prepared: Prepared) -> Prepared:
        """Decode an image, or its substitute, on the host."""
        if prepared.encoded is None:
            return prepared
        used, pixels = self.load_or_substitute(prepared.index, prepared.encoded.tobytes(), decode)
        return Prepared(used, (pixels.shape[0], pixels.shape[1]), None, self._pin(pixels))

    def _pin(self, pixels: NDArray[np.uint8]) -> Any:
        """Copy pixels to pinned memory if there is a GPU.

        The readers do it, not the thread that launches the step.
        """
        return pixels if self.device.type == "cpu" else torch.from_numpy(pixels).pin_memory()

    def _start_source(self, start: int, stop: int) -> PrefetchPool[Any, Any]:
        """Start the readers, and a thread that passes their images through DALI."""
        reading = self._start_reading(start, stop)
        return PrefetchPool(
            lambda: lambda decoded: decoded,
            self._decode(reading),
            threads=1,
            window=CPU_BATCHES_IN_FLIGHT,
            name="fastbyol-loader-dali",
            upstream=reading,
        )

    def _decode(self, reading: PrefetchPool[int, Prepared]) -> Iterator[tuple[list[Prepared], list[Any]]]:
        yield from self.decoder(self._group(reading)).batches()  # the pipeline is built in the thread that drives it

    def _images(self, source: PrefetchPool[Any, Any]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for batch, images in source:
            for prepared, pixels in zip(batch, images, strict=True):
                yield prepared.index, pixels

    def _group(self, reading: PrefetchPool[int, Prepared]) -> Iterator[list[Prepared]]:
        """Yield batches for DALI on the CPU, limited in images and pixels."""
        batch: list[Prepared] = []
        pixels = 0
        for prepared in reading:
            batch.append(prepared)
            pixels += prepared.size[0] * prepared.size[1]
            if len(batch) == self.decode_batch or pixels >= CPU_BATCH_PIXELS:
                yield batch
                batch, pixels = [], 0
        if batch:
            yield batch

    def _read_steps(self, start: int, stop: int) -> Iterator[list[Prepared]]:
        """Yield the images of each step, which the readers prepare ahead."""
        reading = self._start_reading(start, stop)
        try:
            for _ in range(start, stop):
                # One at a time: a step may have more images than are read ahead.
                yield [reading.take(timeout_s=self.timeout_s)[0] for _ in range(self.batch_size)]
        except TimeoutError:
            raise timeout_error(self) from None
        finally:
            reading.close()

    def _render(self, step: int, prepared: list[Prepared], images: list[Tensor]) -> Batch:
        """Render both views of a batch by kernels on the current stream."""
        from fastbyol.kernels.triton.augment import augment_views
        from fastbyol.kernels.triton.crop import crop_views

        with span(AUGMENT):
            params = self.sampler(step).params([p.size for p in prepared])
            crops = crop_views(images, params.box, params.flip, self.size)
            rows = np.ascontiguousarray(params.pack().transpose(1, 0, 2).reshape(-1, augment_params.COLUMNS))
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
        decode_on_host: decodes each image of a batch that DALI rejects; returns it with pixels.
        batch: largest number of images of a batch.
        in_flight: number of batches that DALI holds at a time.
        threads: number of DALI's threads.
        device: where the pixels are delivered.
        hints: further arguments of DALI's decoder.
    """

    def __init__(
        self,
        source: Iterator[list[Prepared]],
        decode_on_host: Callable[[Prepared], Prepared],
        *,
        batch: int,
        in_flight: int,
        threads: int,
        device: torch.device,
        hints: dict[str, Any],
    ) -> None:
        self._source, self._decode_on_host, self._device = source, decode_on_host, device
        self._in_flight: deque[list[Prepared]] = deque()  # given to DALI, not yet decoded
        self._retries: deque[list[Prepared]] = deque()  # lost with a failed pipeline, to be given to the new one
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
            # Interpolate chroma as libjpeg-turbo does, so that a view is the same on any device.
            return fn.decoders.image(
                encoded, device=device, output_type=types.RGB, jpeg_fancy_upsampling=True, **self._hints
            )

        pipe = decoding()
        pipe.build()
        return pipe

    def _pull(self) -> list[NDArray[np.uint8]]:
        """Return DALI's next input. StopIteration of the source ends DALI's run."""
        batch = self._retries.popleft() if self._retries else next(self._source)
        self._in_flight.append(batch)
        return [p.encoded for p in batch if p.encoded is not None] or [_EMPTY_JPEG]

    def batches(self) -> Iterator[tuple[list[Prepared], list[Any]]]:
        """Yield each batch with its images, uint8 (H, W, 3): GPU tensors or CPU arrays.

        Call it once: the pipeline ends with it.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        try:
            self._pipe.schedule_run()
            while True:
                try:
                    (decoded,) = self._pipe.share_outputs(stream)
                except StopIteration:
                    return
                except RuntimeError as error:  # DALI cannot decode a file; this pipeline is unusable now
                    yield self._replace_pipeline(error)
                    continue
                batch = self._in_flight.popleft()
                images = iter(self._unpack(decoded))
                yield batch, [next(images) if p.pixels is None else self._to_device(p.pixels) for p in batch]
                self._pipe.release_outputs()
                self._pipe.schedule_run()
        finally:
            # The pipeline refers to this object through its callback: without this line, its
            # threads and buffers would live until the garbage collector runs.
            self._pipe = None

    def _replace_pipeline(self, error: RuntimeError) -> tuple[list[Prepared], list[Any]]:
        """Decode the oldest batch on the host, and give the others to a new pipeline.

        The host decides which images are bad.
        """
        batch = self._in_flight.popleft()
        reason = next((line.strip() for line in str(error).splitlines() if "ailed" in line), first_line(error))
        logger.warning(f"DALI cannot decode an image; libjpeg-turbo decodes its batch instead: {reason}")
        self._retries = self._in_flight + self._retries
        self._in_flight = deque()
        self._pipe = self._build()
        self._pipe.schedule_run()
        decoded = [self._decode_on_host(prepared) for prepared in batch]
        return decoded, [self._to_device(prepared.pixels) for prepared in decoded]

    def _unpack(self, decoded: Any) -> Iterator[Any]:
        """Yield the images of DALI's output without a copy.

        An image keeps the memory of its batch alive.
        """
        for k in range(len(decoded)):
            yield torch.from_dlpack(decoded[k]) if self._device.type == "cuda" else np.asarray(decoded[k])

    def _to_device(self, pixels: Any) -> Any:
        return pixels if self._device.type == "cpu" else pixels.to(self._device, non_blocking=True)


def inspect(data: StoredImage) -> tuple[tuple[int, int], NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
    """Return size, bytes for DALI or None, pixels or None.

    Raises:
        BadImage: the image cannot be decoded.
    """
    if isinstance(data, bytes):
        size = jpeg_size(data) if is_complete_jpeg(data) else None
        if size is not None:
            return size, np.frombuffer(without_metadata(data), dtype=np.uint8), None
    pixels = decode(data)
    height, width = pixels.shape[:2]
    return (height, width), None, pixels
