"""FFCV's loader as the reader and decoder of .beton files, with one operation of ours inside its compiled code.

The operation decodes an image once, into memory of its thread, and writes both views straight into the batch: crop.py's and
augment.py's kernels, with the parameters that every backend draws. FFCV brings the memory map, its thread that makes batches
ahead, and numba's threads within a batch.

FFCV's own call of libjpeg-turbo asks for the fast inverse DCT, which moves a view's values by up to 9/255 on photographs, and
ignores what the library reports. The operation calls the same library for the exact one, and looks at what it returns.
A JPEG with EXIF or XMP, which files of `fastbyol pack` do not hold, is decoded as the native backend does it: it may need a turn.

To read the file through its memory map, FFCV marks numba's one type of one-dimensional bytes as read-only for the whole process,
which breaks what others have compiled with it. It gets a type of its own here.

What else FFCV leaves out is added here: batches in our order from any step on, an end to its thread when the loop is left early,
and an error in that thread handed to the consumer.
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
from fastbyol.data.decode import APP1, DecodeBuffer, decode, segments
from fastbyol.data.native import DeviceSlots, Scratch, deliver, timeout_error
from fastbyol.data.sequence import DeterministicLoader
from fastbyol.data.views import VIEWS
from fastbyol.data.workers import resolve_threads
from fastbyol.errors import InputError
from fastbyol.kernels import augment, crop
from fastbyol.kernels.cpu.augment import augment_kernel
from fastbyol.kernels.cpu.crop import crop_kernel
from fastbyol.kernels.cpu.intrinsics import LANES

_STORED = types.Array(types.uint8, 1, "C", readonly=True)
_NUMBERS = types.uint64[::1]
_STATE = types.Tuple([_STORED, _NUMBERS, _NUMBERS])  # the file, where its parts begin, how long they are


def _compile_reader(manager: OSCacheManager) -> Callable:
    def read(start, state):  # noqa: ANN001, ANN202
        return state[0][start : start + state[2][np.searchsorted(state[1], start)]]

    return Compiler.compile(read, _STORED(types.uint64, _STATE))


OSCacheManager.state_type = property(lambda manager: _STATE)
OSCacheManager.compile_reader = _compile_reader

# TurboJPEG's functions in the library that FFCV is linked with; numba calls them by address.
_new_decoder, _decompress, _end_decoder = lib.tjInitDecompress, lib.tjDecompress2, lib.tjDestroy
_new_decoder.argtypes, _new_decoder.restype = [], c_void_p
_decompress.argtypes = [c_void_p, c_void_p, c_ulong, c_void_p, c_int, c_int, c_int, c_int, c_int]
_end_decoder.argtypes = [c_void_p]
_RGB = 0  # TJPF_RGB


class FfcvLoader(DeterministicLoader):
    """FFCV -> batches; see `batch.Loader` for the contract.

    Args:
        threads: of FFCV within a batch; 0 is one per core.
        prefetch_batches: batches made ahead.
        sequence: as for `DeterministicLoader`; the images are a BetonFile.

    Raises:
        InputError: more threads than numba has.

    Raises (while iterating):
        RunError: more images cannot be decoded than `max_bad_fraction` allows.
        HungLoader: no batch came within `timeout_s`.
    """

    images: BetonFile

    def __init__(self, *, threads: int, prefetch_batches: int, **sequence: Any) -> None:
        super().__init__(**sequence)
        if resolve_threads(threads) > NUMBA_NUM_THREADS:
            raise InputError(
                f"data.threads={threads}: FFCV's loader can use {NUMBA_NUM_THREADS} threads at most here, one per core "
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
        """Yields the batches of steps start .. stop - 1; leaving the loop early stops FFCV's thread."""
        on_device = DeviceSlots(self.device) if self.device.type == "cuda" else None
        first = start
        while first < stop:
            end = min(stop, (first // len(self) + 1) * len(self))  # FFCV is given an epoch's order at most
            epoch = _Epoch(self, self._ffcv, first, end)
            try:
                for step in range(first, end):
                    before = time.perf_counter()
                    views, labels, indices = epoch.next_batch()
                    self.wait_s += time.perf_counter() - before
                    yield from deliver(step, views, labels, indices, on_device, dim=1)
            finally:
                epoch.stop()
            first = end


class _TwoViews(SimpleRGBImageDecoder):
    """FFCV's image field -> both views of each image, float32 or the bits of a 16-bit float, and whether it could be decoded."""

    def __init__(self, loader: FfcvLoader) -> None:
        super().__init__()
        self._size = loader.size
        self._dtype = np.dtype(np.float32 if loader.dtype == torch.float32 else np.int16)  # FFCV's torch has no uint16
        self._written = np.dtype(augment.WRITTEN[loader.dtype])

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        shape = (VIEWS, self._size, self._size, 3)
        memory = (
            AllocationQuery(shape, self._dtype),
            AllocationQuery((VIEWS, augment.COLUMNS), np.dtype(np.float32)),  # parameters, filled in by _Epoch
            # 0 where the image is upright and libjpeg-turbo had nothing to say.
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
            out, parameters, faults = memory
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
                    if field["mode"] == jpeg and _may_need_a_turn(stored):
                        faults[i, 0] = 1
                    elif field["mode"] == jpeg:
                        faults[i, 0] = _decompress(
                            decoder, stored.ctypes.data, stored.size, image.ctypes.data, width, 0, height, _RGB, 0
                        )
                    else:
                        faults[i, 0] = 0
                        copy(stored, image)
                    for v in range(VIEWS):
                        p = parameters[i, v]
                        top, left = np.int64(p[augment.BOX]), np.int64(p[augment.BOX + 1])
                        box_h, box_w = np.int64(p[augment.BOX + 2]), np.int64(p[augment.BOX + 3])
                        flip = p[augment.FLIP] != 0
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
    """float32 zeros (count,) that begin a cache line, as `aligned_zeros` makes them."""
    memory = np.zeros(count + beyond + 16, np.float32)
    skip = -memory.ctypes.data % 64 // 4
    return memory[skip : skip + count]


_segments = njit(nogil=True, cache=True)(segments)


@njit(nogil=True, cache=True)
def _may_need_a_turn(jpeg):  # noqa: ANN001, ANN202
    """Whether a JPEG holds EXIF or XMP: an APP1 segment in front of its first scan."""
    return APP1 in _segments(jpeg)[0]


class _Epoch(EpochIterator):
    """FFCV's thread for the steps start .. stop - 1 of one epoch."""

    def __init__(self, ours: FfcvLoader, ffcv: Loader, start: int, stop: int) -> None:
        self._ours, self._start, self._error, self._hung = ours, start, None, False
        self._scratch, self._buffer = Scratch(ours.size), DecodeBuffer()
        places = np.concatenate([ours.indices(step) for step in range(start, stop)])
        super().__init__(ffcv, ours.images.samples[places].astype(np.uint64))

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # FFCV's consumer would wait for ever; ours raises it
            self._error = error
            self.output_queue.put(None)

    def run_pipeline(self, b_ix: int, batch_indices: Any, batch_slot: int, cuda_event: Any) -> Any:
        """One batch: parameters into the slot, FFCV's compiled code, then what it could not decode."""
        ours, step = self._ours, self._start + b_ix
        indices = ours.indices(step)
        sampler = ours.sampler(step)
        out, parameters, faults = next(m for m in self.memory_allocations["operation"].values() if isinstance(m, tuple))
        parameters[batch_slot][:] = sampler.params(ours.images.shapes[indices]).pack()
        super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        for i in np.flatnonzero(faults[batch_slot][:, 0]):
            indices[i] = self._again(int(indices[i]), int(i), sampler, parameters[batch_slot][i], out[batch_slot][i])
        views = torch.from_numpy(out[batch_slot]).view(ours.dtype)  # pinned by FFCV where there is a GPU
        labels = torch.from_numpy(ours.images.labels[indices]), torch.from_numpy(indices)
        return views, *(t if ours.device.type == "cpu" else t.pin_memory() for t in labels)

    def _again(self, index: int, i: int, sampler: Any, rows: NDArray[np.float32], out: NDArray) -> int:
        """An image that libjpeg-turbo alone does not get right, decoded as the native backend does it, or the one that takes its place."""
        ours = self._ours
        found, image = ours.load_or_substitute(index, ours.fetch(index), lambda data: decode(data, self._buffer))
        boxes = sampler.boxes(slice(i, i + 1), [image.shape[:2]])[0].tolist()
        for v, box in enumerate(boxes):
            self._scratch.render(image, box, rows[v], out[v].view(augment.WRITTEN[ours.dtype]))
        return found

    def next_batch(self) -> Any:
        """FFCV's next batch.

        Raises:
            HungLoader: it does not come within `timeout_s`.
        """
        try:
            result = self.output_queue.get(timeout=self._ours.timeout_s)
        except Empty:
            self._hung = True
            raise timeout_error(self._ours) from None
        if result is None:
            assert self._error is not None
            raise self._error
        return result[1]

    def stop(self) -> None:
        """Ends the thread, which otherwise goes on waiting for a place in its queue, unless it hangs: then it dies with the process."""
        self.close()
        while self.is_alive() and not self._hung:
            try:
                self.output_queue.get(timeout=0.01)
            except Empty:
                continue
