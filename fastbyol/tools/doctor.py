"""`fastbyol doctor`: describes the machine and checks what fastbyol can use on it.

A failed check names the command that fixes it.
"""

import importlib
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

import llvmlite.binding
import numpy as np
import simplejpeg
import torch

from fastbyol.data.decode import decode
from fastbyol.data.workers import preserve_torch_threads
from fastbyol.errors import first_line
from fastbyol.kernels import lars_ema
from fastbyol.kernels.cpu import jit_cache
from fastbyol.precision import compute_dtype
from fastbyol.runtime import environment
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.logging import logger

_GRAY = 200
_JPEG_TOLERANCE = 3
_CPU_FEATURES = ("avx2", "avx512f", "avx512bf16", "amx-bf16", "neon", "sve")


def diagnose() -> int:
    """Log the environment and the result of each check.

    Returns:
        0 if everything that fastbyol requires works, else 1.
    """
    for name, value in environment.describe().items():
        logger.info(f"{name:<20} {value}")
    logger.info("")
    passed = True
    for check in _CHECKS:
        try:
            status, text = "ok", check.run()
        except _CheckFailed as error:
            status, text = ("FAIL" if check.required else "--"), str(error)
            passed = passed and not check.required
        logger.info(f"{status:<5} {check.name:<20} {text}")
    return 0 if passed else 1


class _CheckFailed(Exception):
    """A component is missing or broken. The text names the command that fixes it."""


# --- checks: each returns a description, or raises _CheckFailed ---


def _images() -> str:
    error = _gray_error(decode(_gray_jpeg()))
    if error > _JPEG_TOLERANCE:
        raise _CheckFailed(f"a gray JPEG decodes {error}/255 off: pip install --force-reinstall simplejpeg")
    return "JPEG decoding by libjpeg-turbo"


def _gray_jpeg() -> bytes:
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), _GRAY, dtype=np.uint8))


def _gray_error(pixels: np.ndarray) -> int:
    return int(np.abs(pixels.astype(int) - _GRAY).max())


def _cpu_kernels() -> str:
    return f"numba, ready in {jit_cache.compile_cpu_kernels():.2f} s"


def _precision() -> str:
    device = choose_device("auto")
    dtype = compute_dtype("auto", device)
    note = "" if dtype == torch.bfloat16 else ": this processor only emulates bfloat16"
    return f"precision=auto is {str(dtype).removeprefix('torch.')} on {device}{note}"


def _cpu_features() -> str:
    features = llvmlite.binding.get_host_cpu_features()
    names = [name for name in _CPU_FEATURES if features.get(name)]
    if not names:
        raise _CheckFailed("no AVX2, AVX-512, AMX, NEON or SVE: everything works, but slowly")
    return ", ".join(names)


def _gpu() -> str:
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "no driver or no visible GPU"
        raise _CheckFailed(f"{reason}; with a GPU: install its driver, then pip install torch (default build)")
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {free:.0f} of {total:.0f} GiB free"


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        raise _CheckFailed("nvidia-smi not found: on a machine with a GPU, install NVIDIA's driver")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise _CheckFailed(f"nvidia-smi fails ({first_line(error)}): reinstall the driver, then reboot") from None
    versions = process.stdout.splitlines()  # one per GPU
    if not versions:
        raise _CheckFailed("nvidia-smi lists no GPU: reinstall the driver, then reboot")
    return f"{versions[0]} for {len(versions)} GPU(s), torch is built for CUDA {torch.version.cuda}"


def _triton() -> str:
    version = environment.installed("triton")
    if version is None:
        raise _CheckFailed("not installed: pip install torch (part of the default build); only needed on a GPU")
    if not torch.cuda.is_available():
        return f"{version}, no GPU to run its kernels on"
    weight, target = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    lars_ema.ema_update(torch.device("cuda"))([(weight, target)], torch.tensor(0.75, device="cuda"))
    if not torch.allclose(target, torch.full_like(target, 0.25)):
        raise _CheckFailed(f"{version} computes a wrong target update: pip install --force-reinstall triton")
    return f"{version}, the target update runs on the GPU"


def _dali() -> str:
    command = environment.dali_install_command()
    if not environment.has_module("nvidia.dali"):
        stub = environment.installed("nvidia-dali")
        reason = f"nvidia-dali {stub} is only a stub" if stub else "not installed"
        raise _CheckFailed(f"{reason}: {command} (the package without a CUDA version in its name is a stub)")
    from nvidia import dali

    try:
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipeline:
            encoded = dali.fn.external_source(source=lambda: [np.frombuffer(_gray_jpeg(), dtype=np.uint8)])
            pipeline.set_outputs(dali.fn.decoders.image(encoded))
        pixels = np.asarray(pipeline.run()[0][0])
    except RuntimeError as error:
        raise _CheckFailed(f"{dali.__version__} fails ({first_line(error)}): {command}") from None
    return f"{dali.__version__}, decodes a gray JPEG on the CPU with an error of {_gray_error(pixels)}/255"


def _ffcv() -> str:
    if not environment.has_module("ffcv"):
        raise _CheckFailed(f"not installed (not needed to read .beton files): {environment.FFCV_COMMAND}")
    try:
        with preserve_torch_threads():
            importlib.import_module("ffcv.loader")
    except (ImportError, OSError) as error:
        raise _CheckFailed(f"cannot be imported ({first_line(error)}): {environment.FFCV_COMMAND}") from None
    return f"{environment.installed('ffcv')}, its loader works (data.backend=ffcv)"


class _Check(NamedTuple):
    name: str
    run: Callable[[], str]
    required: bool = False


_CHECKS = (
    _Check("images", _images, required=True),
    _Check("CPU kernels", _cpu_kernels, required=True),
    _Check("precision", _precision, required=True),
    _Check("CPU features", _cpu_features),
    _Check("GPU", _gpu),
    _Check("driver", _driver),
    _Check("Triton", _triton),
    _Check("DALI", _dali),
    _Check("FFCV", _ffcv),
)
