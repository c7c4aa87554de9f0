"""Choice of the device, and process-wide state: switches for training, and random numbers."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastbyol.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that config.device names: with several GPUs, the one of this process's
    local rank. It becomes the current device, on which Triton launches its kernels.

    Raises:
        InputError: cuda was requested but there is no GPU, or fewer GPUs than processes on this
            machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: torch finds no GPU; `fastbyol doctor` says why, device=cpu runs on the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: torch finds {torch.cuda.device_count()}; lower torchrun's --nproc-per-node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def tune_device(device: torch.device) -> None:
    """Set process-wide switches for training: cuDNN's autotuning, and malloc on a CPU."""
    torch.backends.cudnn.benchmark = True  # all batches have the same shape
    if device.type == "cpu":
        _keep_freed_memory()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Context manager: seed torch's generators of the CPU and of `device`; restore them on exit."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next step.

    By default it returns large blocks to the system, and the next step takes a page fault for every
    4 KB of its activations: 30,000 per step of R18 at 96 px and batch 32, 6 % of its time
    (benchmarks/LOG.md). Other allocators have no such switch.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
