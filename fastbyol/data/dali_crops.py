"""Crops for evaluations on a GPU: DALI decodes and our kernels crop, as in dali.py."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.dali import Decoder, Prepared, inspect
from fastbyol.data.decode import decode
from fastbyol.data.images import ImageSet
from fastbyol.data.rendering import Pixels, ViewFunction
from fastbyol.data.sequence import StoredImage, load_readable
from fastbyol.data.workers import PrefetchPool, resolve_threads
from fastbyol.kernels import augment_params

_BATCHES_IN_FLIGHT = 2  # held by DALI: one being decoded, one waiting


def render_on_gpu(
    images: ImageSet,
    order: NDArray[np.int64],
    view_of: ViewFunction,
    *,
    size: int,
    batch_size: int,
    threads: int,
    bad: dict[int, str],
    dtype: torch.dtype,
    device: torch.device,
    substitute: bool = False,
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """As `crops._render_on_host`. Each batch is a tensor of its own."""
    from fastbyol.kernels.triton.augment import augment_views
    from fastbyol.kernels.triton.crop import crop_views

    def prepare(index: int, function: Callable[[StoredImage], tuple] = inspect) -> Prepared:
        """Return an image or its substitute; a black one of index -1 if there is none."""
        found = load_readable(images, index, bad, function, substitute=substitute)
        used, (shape, encoded, pixels) = found or (-1, _decoded(np.zeros((8, 8, 3), dtype=np.uint8)))
        if pixels is not None and device.type == "cuda":
            pixels = torch.from_numpy(pixels).pin_memory()
        return Prepared(used, shape, encoded, pixels)

    def decode_on_host(prepared: Prepared) -> Prepared:
        if prepared.encoded is None:
            return prepared
        return prepare(prepared.index, lambda data: _decoded(decode(data)))

    threads = resolve_threads(threads)
    readers = PrefetchPool(
        lambda: prepare, order.tolist(), threads=threads, window=2 * batch_size, name="fastbyol-eval-reader"
    )
    decoder = Decoder(
        iter(lambda: readers.take(batch_size), []),
        decode_on_host,
        batch=batch_size,
        in_flight=_BATCHES_IN_FLIGHT,
        threads=threads,
        device=device,
        hints={},
    )
    decoded, k = decoder.batches(), 0
    try:
        for prepared, pixels in decoded:
            views = [view_of(k + i, *p.size) for i, p in enumerate(prepared)]
            boxes = np.array([box for box, _ in views], dtype=np.int32)
            rows = np.stack([params for _, params in views])
            flips = rows[:, augment_params.FLIP].astype(bool)
            crops = crop_views(pixels, boxes[:, None], flips[:, None], size)
            rows = torch.from_numpy(rows)
            rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows
            yield augment_views(crops, rows, dtype), np.array([p.index for p in prepared])
            k += len(prepared)
    finally:
        decoded.close()
        readers.close()


def _decoded(pixels: Pixels) -> tuple[tuple[int, int], None, Pixels]:
    return (pixels.shape[0], pixels.shape[1]), None, pixels
