"""Crops for evaluations: one view per image, in the dtype that the network computes in.

As in training, threads render one batch ahead into a ring of two batches; for a GPU the ring is
pinned, and a stream of its own copies it. Or DALI decodes on the GPU (dali_crops.py).
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbyol.data.device import DeviceSlots
from fastbyol.data.images import Images
from fastbyol.data.rendering import Box, CropPlan, Renderer
from fastbyol.data.views import AUGMENTATIONS, Sampler, center_box, epoch_order
from fastbyol.data.workers import PrefetchPool, resolve_threads
from fastbyol.kernels import augment, augment_params

DecoderName = Literal["native", "dali"]

CPU = torch.device("cpu")
CENTER_FRACTION = 0.875  # 224/256 of the short side: the center crop of BYOL's evaluation


def center_crops(
    images: Images,
    *,
    size: int,
    fraction: float,
    batch_size: int,
    threads: int,
    bad: dict[int, str],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    decoder: DecoderName = "native",
) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield all images in index order without augmentation: center crop, bicubic resize, normalize.

    Args:
        images: the data set.
        size: S, side of a crop in pixels.
        fraction: side of the crop as a share of the image's short side (BYOL: 224/256).
        batch_size: largest number of images of a batch.
        threads: number of threads; 0 is one per core.
        bad: receives the unreadable images, which are left out: index -> reason.
        dtype: of the crops: float32, bfloat16 or float16.
        device: where they are delivered.
        decoder: of the images; "dali" needs a GPU.

    Yields:
        images (n, 3, S, S), channels_last, normalized, and their indices (n,); n <= batch_size, and
        0 if none of a batch is readable. The images are valid until the next batch is requested.
    """
    identity = np.zeros(augment_params.COLUMNS, dtype=np.float32)
    plan = CropPlan(
        images=images,
        order=np.arange(len(images)),
        view_of=lambda k, height, width: (center_box(height, width, fraction), identity),
        size=size,
        batch_size=batch_size,
        threads=threads,
        bad=bad,
        dtype=dtype,
        device=device,
    )
    yield from _render(plan, decoder)


def random_crops(
    images: Images,
    *,
    size: int,
    seed: int,
    epoch: int,
    batch_size: int,
    shard: NDArray[np.int64] | None = None,
    threads: int,
    bad: dict[int, str],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    decoder: DecoderName = "native",
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
    plan = CropPlan(
        images=images,
        order=epoch_order(seed, epoch, len(images))[positions],
        view_of=lambda k, height, width: view_of(int(positions[k]), height, width),
        size=size,
        batch_size=len(shard),
        threads=threads,
        bad=bad,
        dtype=dtype,
        device=device,
        substitute=True,
    )
    yield from _render(plan, decoder)


def _render(plan: CropPlan, decoder: DecoderName) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield the crops of a plan and their images' indices, without positions that have no image."""
    render = _render_on_host
    if decoder == "dali":
        from fastbyol.data.dali_crops import render_on_gpu as render
    for crops, indices in render(plan):
        if (indices < 0).any():
            readable = torch.from_numpy(np.flatnonzero(indices >= 0)).to(plan.device)
            crops, indices = crops[readable], indices[indices >= 0]
        yield crops, indices


def _render_on_host(plan: CropPlan) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
    """Yield the views (n, 3, S, S) of each batch, and the images' indices (n,), -1 for none."""
    is_cuda = plan.device.type == "cuda"
    shape = (min(plan.batch_size, len(plan.order)), plan.size, plan.size, 3)
    ring = [torch.empty(*shape, dtype=plan.dtype, pin_memory=is_cuda) for _ in range(2)]
    written = [augment.as_written(batch) for batch in ring]
    device_slots = DeviceSlots(plan.device) if is_cuda else None

    def tasks() -> Iterator[tuple[int, NDArray[Any]]]:
        for k in range(len(plan.order)):
            batch, i = divmod(k, plan.batch_size)
            yield k, written[batch % 2][i]

    def new_worker() -> Callable[[tuple[int, NDArray[Any]]], int]:
        renderer = Renderer(plan.size)

        def render(task: tuple[int, NDArray[Any]]) -> int:
            """Write the view of a position; return the index of the image used, -1 if none."""
            k, out = task
            found = plan.load(int(plan.order[k]), renderer.decode)
            if found is None:
                return -1
            index, image = found
            box, params = plan.view_of(k, image.shape[0], image.shape[1])
            renderer.crop(image, box, bool(params[augment_params.FLIP]))
            renderer.augment(params, out)
            return index

        return render

    # One batch in the consumer's hands, and one ahead of it: the ring.
    pool = PrefetchPool(
        new_worker, tasks(), threads=resolve_threads(plan.threads), window=2 * plan.batch_size, name="fastbyol-eval"
    )
    try:
        for k in itertools.count():
            if not (rendered := pool.take(plan.batch_size)):
                return
            crops = ring[k % 2]
            if device_slots is not None:
                (crops,) = device_slots.fill(k, [crops])
            yield crops[: len(rendered)].permute(0, 3, 1, 2), np.array(rendered)
            if device_slots is not None:
                device_slots.release(k)
    finally:
        pool.close()
