"""Which implementation runs on a device: chosen here once, and said aloud."""

import fcntl
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbyol.kernels import augment, batch_norm, crop, lars_ema, max_pool
from fastbyol.kernels.cpu import intrinsics as unchecked
from fastbyol.kernels.cpu import openmp as threads
from fastbyol.kernels.cpu import simd as vectors

_ANNOUNCE_S = 1.0  # a start from the cache on disk takes less
_IN_THREADS = (*threads.KERNELS, *lars_ema.KERNELS, *batch_norm.KERNELS, *max_pool.KERNELS)
_ENTRY_POINTS = (crop.random_resized_crop, crop._crop, augment._augment, *_IN_THREADS)
_INLINED = tuple(Path(inspect.getfile(module)) for module in (unchecked, vectors))  # compiled into other files' kernels


def lars_update(device: torch.device) -> Callable[..., None]:
    """A `LarsEma` for tensors on `device`: Triton on a GPU, numba on the CPU.

    Raises:
        ModuleNotFoundError: a GPU without Triton, which torch's CUDA builds bring.
    """
    if device.type == "cuda":
        from fastbyol.kernels.triton import lars_ema as on_gpu

        return on_gpu.LarsEma()
    return lars_ema.LarsEma()


def ema_update(device: torch.device) -> Callable[..., None]:
    """An `EmaUpdate` for tensors on `device`; raises as `lars_update` does."""
    if device.type == "cuda":
        from fastbyol.kernels.triton import lars_ema as on_gpu

        return on_gpu.EmaUpdate()
    return lars_ema.EmaUpdate()


def describe(device: torch.device, backend: str) -> str:
    """What runs for tensors on `device` and images from `backend` of data/, for people to read."""
    if device.type == "cuda":
        views = "Triton" if backend == "dali" else "numba"
        return f"kernels: views by {views}, LARS and target update by Triton"
    return f"kernels: views by numba; BatchNorm, max-pool, LARS and target update by numba on {threads.describe()}"


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
    with _one_process_at_a_time():
        _drop_stale(_ENTRY_POINTS)
        if not _cached():
            say("compiling the CPU kernels; the result is cached for the next start")
        crop.random_resized_crop(share, share, np.zeros((1, 2, 2)), np.full((1, 2), size), True, 0.75, 4 / 3, boxes)
        crop.crop_into(image, (0, 0, size, size), False, planes, crop.CropScratch(size))
        for dtype in augment.WRITTEN.values():
            augment.augment_into(planes, p, np.empty((size, size, 3), dtype=dtype), augment.AugmentScratch(size))
        for kernel in _IN_THREADS:
            kernel.compile()
    seconds = time.perf_counter() - began
    if seconds > _ANNOUNCE_S:
        say(f"CPU kernels ready after {seconds:.1f} s")
    return seconds


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """Of several ranks on a machine one compiles and the others find the result; none looks while another cleans up."""
    folder = Path(crop._crop.stats.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "fastbyol.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cached() -> bool:
    """Whether numba's cache folder holds every entry point, compiled from the sources as they are now: its index is empty if not."""
    return all(_dispatcher(kernel)._cache._cache_file._load_index() for kernel in _ENTRY_POINTS)


def _dispatcher(kernel: Any) -> Any:
    return kernel.dispatcher if isinstance(kernel, threads.Kernel) else kernel


def _drop_stale(kernels: Iterable[Any]) -> None:
    """Drops what was compiled with other inlined functions: numba looks at the time of a kernel's own file alone."""
    for kernel in kernels:
        for index in _indexes(kernel):
            if index.stat().st_mtime < _inlined():
                index.unlink(missing_ok=True)


def _inlined() -> float:
    """When the functions that other files' kernels are compiled with were last changed."""
    return max(path.stat().st_mtime for path in _INLINED)


def _source(kernel: Any) -> Path:
    return Path(inspect.getfile(kernel.py_func))


def _indexes(kernel: Any) -> list[Path]:
    """The index files of a kernel in numba's cache folder."""
    return list(
        Path(_dispatcher(kernel).stats.cache_path).glob(f"{_source(kernel).stem}.{kernel.py_func.__name__}-*.nbi")
    )
