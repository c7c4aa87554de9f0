"""FFCV's loader as a backend for .beton files, with one custom operation inside its compiled code.

The operation decodes an image once, into memory of its thread, and writes both views straight into
the batch by the kernels crop.py and augment.py, with the parameters that every backend draws. FFCV
provides the memory map, a thread that makes batches ahead, and numba's threads within a batch.

FFCV itself calls libjpeg-turbo with the fast inverse DCT, which changes a view's values by up to
9/255 on photographs, and ignores the library's return code. The operation calls the same library
with the exact DCT and checks the return code. JPEGs with EXIF or XMP, which `fastbyol pack` does
not write, may have an orientation and are decoded as in the native backend.

To read the file through its memory map, FFCV marks numba's type of one-dimensional bytes as
read-only for the whole process, which breaks other compiled code. Here the memory map gets a type
of its own.

Also added here: batches in our order from any step on, stopping FFCV's thread when the loop is left
early, and raising an error of that thread in the consumer.
"""

import time
from collections.abc import Callable, Iterator
from ctypes import c_int, c_ulong, c_void_p
from dataclasses import replace
from queue import Empty
from typing import Any

import numpy as np
import torch
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import lib, memcpy
from ffcv.loader import Loader, OrderOption
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.state import State
from numba import njit, types
from numba.core.config import NUMBA_NUM_THREADS
from numpy.typing import NDArray

from fastbyol.data.batch import Batch
from fastbyol.data.beton import BetonFile
from fastbyol.data.device import DeviceSlots, deliver
from fastbyol.data.metadata import APP1, segments
from fastbyol.data.rendering import Renderer
from fastbyol.data.sequence import DeterministicLoader, timeout_error
from fastbyol.data.views import VIEWS, Sampler
from fastbyol.data.workers import resolve_threads
from fastbyol.errors import InputError
from fastbyol.kernels import augment, augment_params, crop
from fastbyol.kernels.cpu.augment import augment_kernel
from fastbyol.kernels.cpu.crop import crop_kernel
from fastbyol.kernels.cpu.intrinsics import LANES

_STORED = types.Array(types.uint8, 1, "C", readonly=True)
_NUMBERS = types.uint64[::1]
_STATE = types.Tuple([_STORED, _NUMBERS, _NUMBERS])  # the file, offsets of its allocations, their sizes


def _compile_reader(manager: OSCacheManager) -> Callable:
    def read(start, state):  # noqa: ANN001, ANN202
        return state[0][start : start + state[2][np.searchsorted(state[1], start)]]

    return Compiler.compile(read, _STORED(types.uint64, _STATE))


OSCacheManager.state_type = property(lambda manager: _STATE)
OSCacheManager.compile_reader = _compile_reader

# TurboJPEG functions of the library that FFCV is linked with; numba calls them by address.
_new_decoder, _decompress, _end_decoder = lib.tjInitDecompress, lib.tjDecompress2, lib.tjDestroy
_new_decoder.argtypes, _new_decoder.restype = [], c_void_p
_decompress.argtypes = [c_void_p, c_void_p, c_ulong, c_void_p, c_int, c_int, c_int, c_int, c_int]
_end_decoder.argtypes = [c_void_p]
_RGB = 0  # TJPF_RGB


class FfcvLoader(DeterministicLoader):
    """Loader based on FFCV; see `batch.Loader` for the contract.

    Args:
        threads: number of FFCV's threads within a batch; 0 is one per core.
        prefetch_batches: number of batches made ahead.
        sequence: arguments of `DeterministicLoader`; the images are a BetonFile.

    Raises:
        InputError: numba has fewer threads.

    Raises (while iterating):
        RunError: more images are undecodable than `max_bad_fraction` allows.
        LoaderTimeout: no batch arrived within `timeout_s`.
    """

    images: BetonFile

    def __init__(self, *, threads: int, prefetch_batches: int, **sequence: Any) -> None:
        super().__init__(**sequence)
        if resolve_threads(threads) > NUMBA_NUM_THREADS:
            raise InputError(
                f"data.threads={threads}: FFCV's loader can use at most {NUMBA_NUM_THREADS} threads here, one per core "
                "(NUMBA_NUM_THREADS); lower it, or set it to 0"
            )
        pipelines: dict[str, Any] = dict.fromkeys(self.images.fields)
        pipelines[self.images.fields[0]] = [_TwoViews(self)]
        self._ffcv = Loader(
            str(self.images.root),
            batch_size=self.batch_size,
            num_workers=resolve_threads(threads),
            order=OrderOption.SEQUENTIAL,
            pipelines=pipelines,
            batches_ahead=prefetch_batches,
            os_cache=True,
        )

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start .. stop - 1. Leaving early stops FFCV's thread."""
        device_slots = DeviceSlots(self.device) if self.device.type == "cuda" else None
        first = start
        while first < stop:
            end = min(stop, (first // len(self) + 1) * len(self))  # FFCV takes the order of at most one epoch
            epoch = _Epoch(self, self._ffcv, first, end)
            try:
                for step in range(first, end):
                    before = time.perf_counter()
                    views, labels, indices = epoch.next_batch()
                    self.wait_s += time.perf_counter() - before
                    yield from deliver(step, views, labels, indices, device_slots, dim=1)
            finally:
                epoch.stop()
            first = end


class _TwoViews(SimpleRGBImageDecoder):
    """FFCV operation: image field -> both views, float32 or 16-bit floats, and an error code."""

    def __init__(self, loader: FfcvLoader) -> None:
        super().__init__()
        self._size = loader.size
        self._dtype = np.dtype(np.float32 if loader.dtype == torch.float32 else np.int16)  # FFCV's torch has no uint16
        self._written = np.dtype(augment.WRITTEN[loader.dtype])

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        shape = (VIEWS, self._size, self._size, 3)
        memory = (
            AllocationQuery(shape, self._dtype),
            AllocationQuery((VIEWS, augment_params.COLUMNS), np.dtype(np.float32)),  # parameters, filled in by _Epoch
            # Error code: 0 if the image is upright and libjpeg-turbo reported nothing.
            AllocationQuery((1,), np.dtype(np.int32)),
        )
        return replace(previous_state, jit_mode=True, shape=shape, dtype=self._dtype), memory

    def generate_code(self) -> Callable:
        size, written = self._size, self._written
        jpeg, threads = IMAGE_MODES["jpg"], Compiler.num_threads
        most_pixels = int((self.metadata["width"].astype(np.int64) * self.metadata["height"]).max())
        c, a = crop.CropScratch(size), augment.AugmentScratch(size)
        row_bytes = len(c.row_for(int(self.metadata["width"].max())))
        pairs, taps, lines, resized_shape = len(c.fixed), len(a.taps), len(a.line), c.resized.shape
        padded_shape, offsets_length, edges = a.padded.shape, len(a.offsets), (len(c.edge), len(a.edge))
        scale, offset = a.scale, a.offset
        read, in_parallel, crop_view, augment_view = (
            self.memory_read,
            Compiler.get_iterator(),
            crop_kernel,
            augment_kernel,
        )
        copy = Compiler.compile(memcpy)
        beyond = size + LANES

        def both_views(batch_indices, memory, metadata, storage_state):  # noqa: ANN001, ANN202 (compiled by FFCV)
            out, parameters, errors = memory
            for thread in in_parallel(threads):
                decoder = _new_decoder()
                pixels = np.empty(3 * most_pixels, dtype=np.uint8)
                planes = _aligned(3 * size * size, beyond).reshape(3, size, size)
                first, weight = np.zeros((2, size), np.int64), np.zeros((2, size, 4), np.float32)
                start, fixed = np.zeros(2 * pairs, np.int64), np.zeros((pairs, 2, 2, 8), np.int16)
                row = np.zeros(row_bytes, np.uint8)
                resized = _aligned(resized_shape[0] * resized_shape[1], 0).reshape(resized_shape)
                row_offsets, factors = np.zeros(4, np.int64), np.zeros(4, np.float32)
                edge, last = _aligned(edges[0], 0), np.zeros(edges[1], np.float32)
                mean, blur, line = np.zeros(3, np.float32), np.zeros(taps, np.float32), np.zeros(lines, np.float32)
                padded = _aligned(padded_shape[0] * padded_shape[1] * padded_shape[2], 0).reshape(padded_shape)
                offsets, gain, shift = np.zeros(offsets_length, np.int64), scale.copy(), offset.copy()
                for i in range(thread, len(batch_indices), threads):
                    field = metadata[batch_indices[i]]
                    stored = read(field["data_ptr"], storage_state)
                    height, width = np.int64(field["height"]), np.int64(field["width"])
                    image = pixels[: 3 * height * width].reshape(height, width, 3)
                    if field["mode"] == jpeg and _may_be_rotated(stored):
                        errors[i, 0] = 1
                    elif field["mode"] == jpeg:
                        errors[i, 0] = _decompress(
                            decoder, stored.ctypes.data, stored.size, image.ctypes.data, width, 0, height, _RGB, 0
                        )
                    else:
                        errors[i, 0] = 0
                        copy(stored, image)
                    for v in range(VIEWS):
                        p = parameters[i, v]
                        top, left = np.int64(p[augment_params.BOX]), np.int64(p[augment_params.BOX + 1])
                        box_h, box_w = np.int64(p[augment_params.BOX + 2]), np.int64(p[augment_params.BOX + 3])
                        flip = p[augment_params.FLIP] != 0
                        crop_view(
                            image, top, left, box_h, box_w, flip, first, weight, start, fixed, row, resized, row_offsets,
                            factors, edge, planes,
                        )  # fmt: skip
                        view = out[i, v].view(written)
                        augment_view(planes, p, mean, blur, padded, line, last, gain, shift, offsets, view)
                _end_decoder(decoder)
            return out[: len(batch_indices)]

        both_views.is_parallel = True  # type: ignore[attr-defined]
        return both_views


@njit(nogil=True, cache=True)
def _aligned(count, beyond):  # noqa: ANN001, ANN202
    """Return float32 zeros (count,) aligned to a cache line, like `aligned_zeros`."""
    memory = np.zeros(count + beyond + 16, np.float32)
    skip = -memory.ctypes.data % 64 // 4
    return memory[skip : skip + count]


_segments = njit(nogil=True, cache=True)(segments)


@njit(nogil=True, cache=True)
def _may_be_rotated(jpeg):  # noqa: ANN001, ANN202
    """Return True if a JPEG has EXIF or XMP: an APP1 segment before its first scan."""
    return APP1 in _segments(jpeg)[0]


class _Epoch(EpochIterator):
    """FFCV's thread for the steps start .. stop - 1 of one epoch."""

    def __init__(self, loader: FfcvLoader, ffcv: Loader, start: int, stop: int) -> None:
        self._owner, self._start, self._error, self._timed_out = loader, start, None, False
        self._renderer = Renderer(loader.size)
        indices = np.concatenate([loader.indices(step) for step in range(start, stop)])
        super().__init__(ffcv, loader.images.samples[indices].astype(np.uint64))

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # FFCV's consumer would wait forever; ours raises it
            self._error = error
            self.output_queue.put(None)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        """Make one batch by FFCV's compiled code; render the images on which it failed."""
        loader, step = self._owner, self._start + b_ix
        indices = loader.indices(step)
        sampler = loader.sampler(step)
        out, parameters, errors = next(m for m in self.memory_allocations["operation"].values() if isinstance(m, tuple))
        parameters[batch_slot][:] = sampler.params(loader.images.shapes[indices]).pack()
        super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        for i in np.flatnonzero(errors[batch_slot][:, 0]):
            indices[i] = self._render(int(indices[i]), int(i), sampler, parameters[batch_slot][i], out[batch_slot][i])
        views = torch.from_numpy(out[batch_slot]).view(loader.dtype)  # pinned by FFCV where there is a GPU
        labels = torch.from_numpy(loader.images.labels[indices]), torch.from_numpy(indices)
        return views, *(t if loader.device.type == "cpu" else t.pin_memory() for t in labels)

    def _render(self, index: int, i: int, sampler: Sampler, params: NDArray[np.float32], out: NDArray) -> int:
        """Render an image, or its substitute, like the native backend; return the index used."""
        loader, renderer = self._owner, self._renderer
        used, image = loader.load_or_substitute(index, loader.fetch(index), renderer.decode)
        boxes = sampler.boxes(slice(i, i + 1), [image.shape[:2]])[0].tolist()
        for v, box in enumerate(boxes):
            renderer.crop(image, box, bool(params[v, augment_params.FLIP]))
            renderer.augment(params[v], out[v].view(augment.WRITTEN[loader.dtype]))
        return used

    def next_batch(self) -> Any:
        """Return views, labels and indices of the next batch.

        Raises:
            LoaderTimeout: no batch arrived within `timeout_s`.
        """
        try:
            result = self.output_queue.get(timeout=self._owner.timeout_s)
        except Empty:
            self._timed_out = True
            raise timeout_error(self._owner) from None
        if result is None:
            assert self._error is not None
            raise self._error
        return result[1]

    def stop(self) -> None:
        """Stop the thread, which may be waiting for its full queue; abandon it after a timeout."""
        self.close()
        while self.is_alive() and not self._timed_out:
            try:
                self.output_queue.get(timeout=0.01)
            except Empty:
                continue
