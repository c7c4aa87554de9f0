"""numba's on-disk cache of compiled kernels: filled before the first image, and never stale.

numba recompiles a cached function only if the function's own file has changed. Compiled functions
may therefore use functions and constants of other files only from those in `INLINED`, whose changes
this module detects.
"""

import fcntl
import inspect
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.kernels import augment_params
from fastbyol.kernels.cpu import augment, batch_norm, crop, intrinsics, lars_ema, max_pool, openmp, simd

INLINED = (augment_params, intrinsics, simd)
"""Modules whose functions and constants are compiled into the kernels of other files."""

_STEP_KERNELS = (*openmp.KERNELS, *lars_ema.KERNELS, *batch_norm.KERNELS, *max_pool.KERNELS)
_ENTRY_POINTS = (crop.random_resized_crop, crop.crop_kernel, augment.augment_kernel, *_STEP_KERNELS)
_LOG_ABOVE_S = 1.0  # loading from the cache takes less

logger = logging.getLogger("fastbyol")


def compile_cpu_kernels() -> float:
    """Compile all numba kernels, or load them from the cache on disk.

    Logs one line before a compilation and one after it, and nothing if the cache is complete.
    Processes on one machine take turns: one compiles, the others load the result.

    Returns:
        The time in seconds.
    """
    start = time.perf_counter()
    size = 32
    image = np.zeros((size, size, 3), dtype=np.uint8)
    planes = augment.new_planes(size)
    p = np.zeros(augment_params.COLUMNS, dtype=np.float32)
    area, boxes = np.ones((1, 2, 1)), np.empty((1, 2, 4), dtype=np.int32)
    with _lock():
        _remove_stale(_ENTRY_POINTS)
        if not _is_complete():
            logger.info("compiling the CPU kernels; the result is cached for the next start")
        crop.random_resized_crop(area, area, np.zeros((1, 2, 2)), np.full((1, 2), size), True, 0.75, 4 / 3, boxes)
        crop.crop_into(image, (0, 0, size, size), False, planes, crop.CropScratch(size))
        for dtype in augment.WRITTEN.values():
            augment.augment_into(planes, p, np.empty((size, size, 3), dtype=dtype), augment.AugmentScratch(size))
        for kernel in _STEP_KERNELS:
            kernel.compile()
    seconds = time.perf_counter() - start
    if seconds > _LOG_ABOVE_S:
        logger.info(f"CPU kernels ready after {seconds:.1f} s")
    return seconds


@contextmanager
def _lock() -> Iterator[None]:
    """Hold the lock of the cache folder, so that one process at a time checks and fills it."""
    folder = Path(crop.crop_kernel.stats.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "fastbyol.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_complete() -> bool:
    """Return True if the cache holds every entry point; a changed source leaves its index empty."""
    return all(_dispatcher(kernel)._cache._cache_file._load_index() for kernel in _ENTRY_POINTS)


def _remove_stale(kernels: Iterable[Any]) -> None:
    """Remove the indexes of kernels compiled before the last change of an inlined module."""
    changed = _last_change()
    for kernel in kernels:
        for index in _index_files(kernel):
            if index.stat().st_mtime < changed:
                index.unlink(missing_ok=True)


def _last_change() -> float:
    """Return the modification time of the inlined modules."""
    return max(Path(inspect.getfile(module)).stat().st_mtime for module in INLINED)


def _index_files(kernel: Any) -> list[Path]:
    """Return numba's index files of all cached functions of a kernel's module."""
    source = Path(inspect.getfile(kernel.py_func))
    folder = Path(_dispatcher(kernel).stats.cache_path)
    return list(folder.glob(f"{source.stem}.*.nbi"))


def _dispatcher(kernel: Any) -> Any:
    return kernel.dispatcher if isinstance(kernel, openmp.Kernel) else kernel
