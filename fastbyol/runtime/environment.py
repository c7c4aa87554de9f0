"""Hardware and installed versions, for reports, result files and `fastbyol doctor`."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from fastbyol import __version__
from fastbyol.runtime import cores

PACKAGES = [
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "numba",
    "simplejpeg",
    "triton",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "ffcv",
]


def describe() -> dict[str, str]:
    """Return name -> description of the machine and its software, in the order of display."""
    facts = {
        "fastbyol": f"{__version__} {commit()}".strip(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "cpu": f"{_cpu_name()}, {cores.available()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "gpu": ", ".join(torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())) or "none",
    }
    return facts | {name: version for name in PACKAGES if (version := installed(name)) is not None}


# FFCV has no wheels. It compiles against OpenCV and libjpeg-turbo.
FFCV_COMMAND = "apt-get install libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install ffcv"

# The extra "onnx" of pyproject.toml. fastbyol is not on PyPI, so its extras cannot be installed by
# name.
ONNX_PACKAGES = {"onnx": "1.17", "onnxscript": "0.5.3", "onnxruntime": "1.20"}


def onnx_command(names: Iterable[str]) -> str:
    """Return the command that installs some of ONNX_PACKAGES."""
    return "pip install " + " ".join(f"'{name}>={ONNX_PACKAGES[name]}'" for name in names)


def dali_install_command() -> str:
    """Return the command that installs DALI for torch's CUDA version."""
    # the package without a version in its name is a stub
    return f"pip install nvidia-dali-cuda{(torch.version.cuda or '13.0').split('.')[0]}0"


def has_module(name: str) -> bool:
    """Return True if a dotted module exists. Only its parents are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """Return the short commit hash of the source tree, with '+' if it has changes; '' if unknown.

    FASTBYOL_COMMIT overrides it, for a copy without its git repository.
    """
    if override := os.environ.get("FASTBYOL_COMMIT"):
        return override
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not a repository
        return ""


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
