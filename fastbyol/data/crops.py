"""Crops for evaluations: one view per image, rendered in threads one batch ahead."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.decode import BadImage
from fastbyol.data.images import ImageSet
from fastbyol.data.rendering import Box, Renderer
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
        batch_size.
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
    images: ImageSet, *, size: int, seed: int, epoch: int, batch_size: int, threads: int, bad: dict[int, str]
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield one epoch of a classifier's training images, with augmentation "crop_flip".

    Order and crops are functions of (seed, epoch, position). The last N % batch_size images are
    dropped.

    Args, Yields:
        as `center_crops`.
    """
    sampler = Sampler(AUGMENTATIONS["crop_flip"], seed, epoch, np.arange(len(images)))
    params = sampler.params().pack()[:, 0]

    def view_of(k: int, height: int, width: int) -> tuple[Box, NDArray[np.float32]]:
        return sampler.boxes(slice(k, k + 1), [(height, width)])[0, 0].tolist(), params[k]

    order = epoch_order(seed, epoch, len(images))
    order = order[: len(order) // batch_size * batch_size]
    yield from _render(images, order, view_of, size=size, batch_size=batch_size, threads=threads, bad=bad)


def _render(
    images: ImageSet,
    order: NDArray[np.int64],
    view_of: ViewFunction,
    *,
    size: int,
    batch_size: int,
    threads: int,
    bad: dict[int, str],
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield one view of each of the images `order`, in batches with memory of their own."""
    batches: deque[tuple[NDArray[np.int64], NDArray[np.float32]]] = deque()  # begun, not yet yielded

    def tasks() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            crops = np.empty((len(indices), size, size, 3), dtype=np.float32)
            batches.append((indices, crops))
            yield from enumerate(crops, start)

    def new_worker() -> Callable[[tuple[int, NDArray[np.float32]]], bool]:
        renderer = Renderer(size)

        def render(task: tuple[int, NDArray[np.float32]]) -> bool:
            k, out = task
            index = int(order[k])
            try:
                image = renderer.decode(images.read(index))
            except (OSError, BadImage) as error:
                bad[index] = first_line(error)
                return False
            box, params = view_of(k, image.shape[0], image.shape[1])
            renderer.crop(image, box, bool(params[augment_params.FLIP]))
            renderer.augment(params, out)
            return True

        return render

    # One batch in the consumer's hands, and one ahead of it.
    pool = PrefetchPool(
        new_worker, tasks(), threads=resolve_threads(threads), window=2 * batch_size, name="fastbyol-eval"
    )
    try:
        while rendered := pool.take(batch_size):
            indices, crops = batches.popleft()
            good = np.array(rendered)
            if not good.all():
                indices, crops = indices[good], crops[good]
            if len(indices):
                yield torch.from_numpy(crops).permute(0, 3, 1, 2), indices
    finally:
        pool.close()
