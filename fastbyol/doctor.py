"""`fastbyol doctor`: what this machine is, what works on it, and the one command that mends what does not."""

import importlib
import importlib.util
from collections.abc import Callable

import torch

from fastbyol import environment
from fastbyol.kernels import dispatch
from fastbyol.precision import compute_dtype
from fastbyol.step import choose_device


def diagnose(say: Callable[[str], None]) -> int:
    """Prints facts and checks; returns 0 if everything that fastbyol needs works, else 1."""
    for name, value in environment.describe().items():
        say(f"{name:<20} {value}")
    say("")
    failures = 0
    for required, name, check in _CHECKS:
        try:
            verdict, text = "ok", check()
        except _Missing as missing:
            verdict, text = ("FAIL" if required else "--"), str(missing)
            failures += required
        say(f"{verdict:<5} {name:<20} {text}")
    return 1 if failures else 0


class _Missing(Exception):
    """Something does not work; the text names the command that mends it."""


def _images() -> str:
    import numpy as np
    import simplejpeg

    from fastbyol.data.decode import decode

    image = np.full((8, 8, 3), 200, dtype=np.uint8)
    worst = int(np.abs(decode(simplejpeg.encode_jpeg(image)).astype(int) - 200).max())
    if worst > 3:
        raise _Missing(f"a gray JPEG came back {worst}/255 off: pip install --force-reinstall simplejpeg")
    return "JPEG decode by libjpeg-turbo"


def _cpu_kernels() -> str:
    return f"numba, ready in {dispatch.compile_cpu_kernels(lambda text: None):.2f} s"


def _precision() -> str:
    device = choose_device("auto")
    dtype = compute_dtype("auto", device)
    note = "" if dtype == torch.bfloat16 else ": this processor only emulates bfloat16"
    return f"precision=auto is {str(dtype).removeprefix('torch.')} on {device}{note}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "no driver or no GPU is visible"
        raise _Missing(f"{reason}; with a GPU: install its driver, then pip install torch (default build)")
    free, total = torch.cuda.mem_get_info()
    return (
        f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    )


def _has_module(name: str) -> bool:
    """Whether a dotted module exists; nothing but its parents is imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def _dali() -> str:
    if not _has_module("nvidia.dali"):
        cuda = (torch.version.cuda or "13.0").split(".")[0]
        raise _Missing(
            f"not installed: pip install nvidia-dali-cuda{cuda}0 (the name without a CUDA version is a stub)"
        )
    return importlib.import_module("nvidia.dali").__version__


def _apex() -> str:
    if not _has_module("amp_C") or not _has_module("apex.multi_tensor_apply"):
        raise _Missing("NVIDIA's apex is not built (only a baseline of the benchmarks; PyPI's apex is another project)")
    return "NVIDIA's, with multi_tensor_apply"


_CHECKS: tuple[tuple[bool, str, Callable[[], str]], ...] = (
    (True, "images", _images),
    (True, "CPU kernels", _cpu_kernels),
    (True, "precision", _precision),
    (False, "GPU", _gpu),
    (False, "DALI", _dali),
    (False, "apex", _apex),
)
