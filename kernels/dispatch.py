"""Which implementation runs on a device: chosen here once, and said aloud."""

import inspect
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastbyol.kernels import augment, crop, lars_ema

_ANNOUNCE_S = 1.0  # a start from the cache on disk takes less


def lars_update(device: torch.device) -> Callable[..., None]:
    """A `LarsEma` for tensors on `device`: Triton on a GPU, numba on the CPU.

    Raises:
        ModuleNotFoundError: a GPU without Triton, which torch's CUDA builds bring.
    """
    if device.type == "cuda":
        from fastbyol.kernels.gpu import lars_ema as on_gpu

        return on_gpu.LarsEma()
    return lars_ema.LarsEma()


def ema_update(device: torch.device) -> Callable[..., None]:
    """An `EmaUpdate` for tensors on `device`; raises as `lars_update` does."""
    if device.type == "cuda":
        from fastbyol.kernels.gpu import lars_ema as on_gpu

        return on_gpu.EmaUpdate()
    return lars_ema.EmaUpdate()


def describe(device: torch.device) -> str:
    """What runs for tensors on `device`, for people to read."""
    update = "Triton" if device.type == "cuda" else f"numba in {torch.get_num_threads()} threads"
    return f"views by numba, optimiser and target by {update}"


def compile_cpu_kernels(say: Callable[[str], None]) -> float:
    """Compiles the numba kernels, or loads them from their cache on disk, before the first image needs them.

    Args:
        say: gets a line before a compilation and after it; nothing is said when the cache holds everything.

    Returns:
        seconds spent.
    """
    began = time.perf_counter()
    size = 32
    image = np.zeros((size, size, 3), dtype=np.uint8)
    planes = augment.new_planes(size)
    p = np.zeros(augment.COLUMNS, dtype=np.float32)
    share, boxes = np.ones((1, 2, 1)), np.empty((1, 2, 4), dtype=np.int32)
    if not _cached():
        say("compiling the CPU kernels; the result is cached for the next start")
    crop.place_boxes(share, share, np.zeros((1, 2, 2)), np.full((1, 2), size), True, 0.75, 4 / 3, boxes)
    crop.crop_into(image, (0, 0, size, size), False, planes, crop.CropScratch(size))
    for dtype in (np.float32, np.uint16):
        augment.augment_into(planes, p, np.empty((size, size, 3), dtype=dtype), augment.AugmentScratch(size))
    weight, scalar = torch.zeros(1), torch.zeros(())
    hyper = lars_ema.Hyper(lr=scalar, weight_decay=0.0, momentum=0.0, trust_coefficient=None)
    lars_ema.LarsEma()([(weight, weight, weight, weight)], [0], [hyper], scalar)
    lars_ema.EmaUpdate()([(weight, weight)], scalar)
    seconds = time.perf_counter() - began
    if seconds > _ANNOUNCE_S:
        say(f"CPU kernels ready after {seconds:.1f} s")
    return seconds


def _cached() -> bool:
    """Whether numba's cache folder holds every entry point, compiled from the source as it is now."""
    for kernel in (crop.place_boxes, crop._crop, augment._augment, *lars_ema.KERNELS):
        source = Path(inspect.getfile(kernel.py_func))
        pattern = f"{source.stem}.{kernel.py_func.__name__}-*.nbi"
        indexes = Path(kernel.stats.cache_path).glob(pattern)
        if not any(index.stat().st_mtime >= source.stat().st_mtime for index in indexes):
            return False
    return True
