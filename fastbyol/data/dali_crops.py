"""Crops for evaluations on a GPU: DALI decodes and our kernels crop, as in dali.py."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.dali import Decoder, Prepared, inspect
from fastbyol.data.decode import decode
from fastbyol.data.rendering import CropPlan, Pixels
from fastbyol.data.sequence import StoredImage
from fastbyol.data.workers import PrefetchPool, resolve_threads
from fastbyol.kernels import augment_params

_BATCHES_IN_FLIGHT = 2  # held by DALI: one being decoded, one waiting
_PIXELS = 1 << 26  # of the images that DALI decodes at a time, 201 MB; 256 photographs of a phone have 3 * 2^30
_READAHEAD = 64  # prepared images; those that the host decodes are in pinned memory


def render_on_gpu(plan: CropPlan) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """As `crops._render_on_host`. Each batch is a tensor of its own.

    DALI decodes a batch in parts if its images are large.
    """
    from fastbyol.kernels.triton.augment import augment_views
    from fastbyol.kernels.triton.crop import crop_views

    is_cuda = plan.device.type == "cuda"

    def prepare(index: int, function: Callable[[StoredImage], tuple] = inspect) -> Prepared:
        """Return an image or its substitute; a black one of index -1 if there is none."""
        found = plan.load(index, function)
        used, (shape, encoded, pixels) = found or (-1, _decoded(np.zeros((8, 8, 3), dtype=np.uint8)))
        if pixels is not None and is_cuda:
            pixels = torch.from_numpy(pixels).pin_memory()
        return Prepared(used, shape, encoded, pixels)

    def decode_on_host(prepared: Prepared) -> Prepared:
        if prepared.encoded is None:
            return prepared
        return prepare(prepared.index, lambda data: _decoded(decode(data)))

    threads = resolve_threads(plan.threads)
    readers = PrefetchPool(
        lambda: prepare, plan.order.tolist(), threads=threads, window=_READAHEAD, name="fastbyol-eval-reader"
    )

    def parts() -> Iterator[list[Prepared]]:
        """Yield the images of each batch in parts of about _PIXELS."""
        part: list[Prepared] = []
        pixels = 0
        for k, prepared in enumerate(readers, start=1):
            part.append(prepared)
            pixels += prepared.size[0] * prepared.size[1]
            if k % plan.batch_size == 0 or pixels >= _PIXELS:
                yield part
                part, pixels = [], 0
        if part:
            yield part

    def crop(first: int, prepared: list[Prepared], pixels: list[Tensor]) -> Tensor:
        """Return the views of the images from position `first` on."""
        boxes, rows = zip(*(plan.view_of(first + i, *p.size) for i, p in enumerate(prepared)), strict=True)
        params = np.stack(rows)
        flips = params[:, None, augment_params.FLIP].astype(bool)
        crops = crop_views(pixels, np.array(boxes, dtype=np.int32)[:, None], flips, plan.size)
        table = torch.from_numpy(params)
        return augment_views(
            crops, table.pin_memory().to(plan.device, non_blocking=True) if is_cuda else table, plan.dtype
        )

    views: list[Tensor] = []
    indices: list[int] = []
    done = 0
    try:
        decoder = Decoder(
            parts(),
            decode_on_host,
            batch=plan.batch_size,
            in_flight=_BATCHES_IN_FLIGHT,
            threads=threads,
            device=plan.device,
            hints={},
        )
        for prepared, pixels in decoder.batches():
            views.append(crop(done, prepared, pixels))
            indices += [p.index for p in prepared]
            done += len(prepared)
            if done % plan.batch_size == 0 or done == len(plan.order):
                yield torch.cat(views) if len(views) > 1 else views[0], np.array(indices)
                views, indices = [], []
    finally:
        readers.close()


def _decoded(pixels: Pixels) -> tuple[tuple[int, int], None, Pixels]:
    return (pixels.shape[0], pixels.shape[1]), None, pixels
