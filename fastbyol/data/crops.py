"""Crops for evaluations: one view per image, rendered in threads one batch ahead."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.decode import BadImage
from fastbyol.data.images import ImageSet
from fastbyol.data.rendering import Box, Pixels, Renderer
from fastbyol.data.views import AUGMENTATIONS, Sampler, center_box, epoch_order
from fastbyol.data.workers import PrefetchPool, resolve_threads
from fastbyol.errors import first_line
from fastbyol.kernels import augment_params

# (position, height, width) -> crop box and parameters (augment_params.COLUMNS,) of the view
ViewFunction = Callable[[int, int, int], tuple[Box, NDArray[np.float32]]]


CENTER_FRACTION = 0.875  # 224/256 of the short side: the center crop of BYOL's evaluation


def center_crops(
    images: ImageSet, *, size: int, fraction: float, batch_size: int, threads: int, bad: dict[int, str]
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield all images in index order without augmentation: center crop, bicubic resize, normalize.

    Args:
        images: the data set.
        size: S, side of a crop in pixels.
        fraction: side of the crop as a share of the image's short side (BYOL: 224/256).
        batch_size: largest number of images of a batch.
        threads: number of threads; 0 is one per core.
        bad: receives the unreadable images, which are left out: index -> reason.

    Yields:
        images (n, 3, S, S) float32, channels_last, normalized, and their indices (n,); n <=
        batch_size, and 0 if none of a batch is readable.
    """
    identity = np.zeros(augment_params.COLUMNS, dtype=np.float32)
    yield from _render(
        images,
        np.arange(len(images)),
        lambda k, height, width: (center_box(height, width, fraction), identity),
        size=size,
        batch_size=batch_size,
        threads=threads,
        bad=bad,
    )


def random_crops(
    images: ImageSet,
    *,
    size: int,
    seed: int,
    epoch: int,
    batch_size: int,
    shard: NDArray[np.int64] | None = None,
    threads: int,
    bad: dict[int, str],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield one epoch of a classifier's training images, with augmentation "crop_flip".

    Order and crops are functions of (seed, epoch, position). The last N % batch_size images are
    dropped. The next readable image stands in for an unreadable one.

    Args, Yields:
        as `center_crops`. `shard` selects positions within every batch; None is all of them. Every
        batch has len(shard) images, 0 if none of the set is readable.
    """
    shard = np.arange(batch_size) if shard is None else shard
    sampler = Sampler(AUGMENTATIONS["crop_flip"], seed, epoch, np.arange(len(images)))
    params = sampler.params().pack()[:, 0]

    def view_of(k: int, height: int, width: int) -> tuple[Box, NDArray[np.float32]]:
        return sampler.boxes(slice(k, k + 1), [(height, width)])[0, 0].tolist(), params[k]

    positions = (np.arange(len(images) // batch_size)[:, None] * batch_size + shard).reshape(-1)
    order = epoch_order(seed, epoch, len(images))[positions]
    yield from _render(
        images,
        order,
        lambda k, height, width: view_of(int(positions[k]), height, width),
        size=size,
        batch_size=len(shard),
        threads=threads,
        bad=bad,
        substitute=True,
    )


def _render(
    images: ImageSet,
    order: NDArray[np.int64],
    view_of: ViewFunction,
    *,
    size: int,
    batch_size: int,
    threads: int,
    bad: dict[int, str],
    substitute: bool = False,
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield one view of each of the images `order`, in batches with memory of their own.

    Args:
        substitute: use the next readable image of the set instead of an unreadable one.
    """
    batches: deque[NDArray[np.float32]] = deque()  # begun, not yet yielded

    def tasks() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for start in range(0, len(order), batch_size):
            crops = np.empty((min(batch_size, len(order) - start), size, size, 3), dtype=np.float32)
            batches.append(crops)
            yield from enumerate(crops, start)

    def new_worker() -> Callable[[tuple[int, NDArray[np.float32]]], int]:
        renderer = Renderer(size)

        def load(index: int) -> Pixels | None:
            try:
                return renderer.decode(images.read(index))
            except (OSError, BadImage) as error:
                bad[index] = first_line(error)
                return None

        def render(task: tuple[int, NDArray[np.float32]]) -> int:
            """Write the view of a position; return the index of the image used, -1 if none."""
            k, out = task
            for offset in range(len(images) if substitute else 1):
                index = (int(order[k]) + offset) % len(images)
                if index not in bad and (image := load(index)) is not None:
                    box, params = view_of(k, image.shape[0], image.shape[1])
                    renderer.crop(image, box, bool(params[augment_params.FLIP]))
                    renderer.augment(params, out)
                    return index
            return -1

        return render

    # One batch in the consumer's hands, and one ahead of it.
    pool = PrefetchPool(
        new_worker, tasks(), threads=resolve_threads(threads), window=2 * batch_size, name="fastbyol-eval"
    )
    try:
        while rendered := pool.take(batch_size):
            crops, indices = batches.popleft(), np.array(rendered)
            if (indices < 0).any():
                crops, indices = crops[indices >= 0], indices[indices >= 0]
            yield torch.from_numpy(crops).permute(0, 3, 1, 2), indices
    finally:
        pool.close()
