"""Kernels of the hot path, imported as `fastbyol.kernels`.

One operation per file: the formula and its source, a plain torch `*_reference`, and the public
call. cpu/ holds the numba implementations and triton/ those for GPUs. Nothing here imports the rest
of fastbyol.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def describe(device: "torch.device", backend: str) -> str:
    """Describe the kernels that run on `device` with data backend `backend`, for log lines."""
    from fastbyol.kernels.cpu import openmp

    if device.type == "cuda":
        views = "Triton" if backend == "dali" else "numba"
        return f"kernels: views by {views}, LARS and target update by Triton"
    return f"kernels: views by numba; BatchNorm, max-pool, LARS and target update by numba on {openmp.describe()}"
