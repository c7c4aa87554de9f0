"""`fastbyol doctor`: what this machine is, what works on it, and the one command that mends what does not."""

import importlib
import shutil
import subprocess
from collections.abc import Callable

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


_GRAY = 200


class _Missing(Exception):
    """Something does not work; the text names the command that mends it."""


def _gray_jpeg() -> bytes:
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), _GRAY, dtype=np.uint8))


def _images() -> str:
    worst = int(np.abs(decode(_gray_jpeg()).astype(int) - _GRAY).max())
    if worst > 3:
        raise _Missing(f"a gray JPEG came back {worst}/255 off: pip install --force-reinstall simplejpeg")
    return "JPEG decode by libjpeg-turbo"


def _cpu_kernels() -> str:
    return f"numba, ready in {jit_cache.compile_cpu_kernels():.2f} s"


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


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        raise _Missing("nvidia-smi is not here: on a machine with a GPU install NVIDIA's driver")
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        raise _Missing(f"nvidia-smi fails ({first_line(error)}): install the driver again, then reboot") from None
    if not found:
        raise _Missing("nvidia-smi lists no GPU: install the driver again, then reboot")
    return f"{found[0]} for {len(found)} GPU(s), torch is built for CUDA {torch.version.cuda}"


def _triton() -> str:
    version = environment.installed("triton")
    if version is None:
        raise _Missing("not installed: pip install torch (the default build brings it); needed on a GPU only")
    if not torch.cuda.is_available():
        return f"{version}, no GPU to run its kernels on"
    weight, target = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    lars_ema.ema_update(torch.device("cuda"))([(weight, target)], torch.tensor(0.75, device="cuda"))
    if not torch.allclose(target, torch.full_like(target, 0.25)):
        raise _Missing(f"{version} computes a wrong target update here: pip install --force-reinstall triton")
    return f"{version}, the target update runs on the GPU"


def _dali() -> str:
    if not environment.has_module("nvidia.dali"):
        stub = environment.installed("nvidia-dali")
        note = f"{stub} is the stub of that name, not DALI" if stub else "not installed"
        raise _Missing(f"{note}: {environment.dali_install_command()} (the name without a CUDA version is a stub)")
    from nvidia import dali

    try:
        pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipe:
            encoded = dali.fn.external_source(source=lambda: [np.frombuffer(_gray_jpeg(), dtype=np.uint8)])
            pipe.set_outputs(dali.fn.decoders.image(encoded))
        worst = int(np.abs(np.asarray(pipe.run()[0][0]).astype(int) - _GRAY).max())
    except RuntimeError as error:
        raise _Missing(
            f"{dali.__version__} fails ({first_line(error)}): {environment.dali_install_command()}"
        ) from None
    return f"{dali.__version__}, decodes on the CPU, a gray JPEG within {worst}/255"


def _ffcv() -> str:
    if not environment.has_module("ffcv"):
        raise _Missing(f"not installed (.beton files are read without it too): {environment.FFCV_COMMAND}")
    try:
        with preserve_torch_threads():
            importlib.import_module("ffcv.loader")
    except (ImportError, OSError) as error:
        raise _Missing(f"cannot be loaded ({first_line(error)}): {environment.FFCV_COMMAND}") from None
    return f"{environment.installed('ffcv')}, its loader can be used (data.backend=ffcv)"


def _cpu_features() -> str:
    features = llvmlite.binding.get_host_cpu_features()
    names = [name for name in ("avx2", "avx512f", "avx512bf16", "amx-bf16", "neon", "sve") if features.get(name)]
    if not names:
        raise _Missing("none of AVX2, AVX-512, AMX, NEON, SVE: everything works, slowly")
    return ", ".join(names)


def _apex() -> str:
    if not environment.has_module("amp_C") or not environment.has_module("apex.multi_tensor_apply"):
        raise _Missing(
            "NVIDIA's apex is not built (a baseline of the benchmarks, nothing else; PyPI's apex is another project): APEX_CPP_EXT=1 "
            "APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex"
        )
    return "NVIDIA's, with multi_tensor_apply"


_CHECKS: tuple[tuple[bool, str, Callable[[], str]], ...] = (
    (True, "images", _images),
    (True, "CPU kernels", _cpu_kernels),
    (True, "precision", _precision),
    (False, "CPU features", _cpu_features),
    (False, "GPU", _gpu),
    (False, "driver", _driver),
    (False, "Triton", _triton),
    (False, "DALI", _dali),
    (False, "FFCV", _ffcv),
    (False, "apex", _apex),
)
