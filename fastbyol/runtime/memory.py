"""Memory of a training step by part, and the free memory of a device."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of a training step at its peak."""

    weights: int
    """Online network and predictor, with buffers."""
    target: int
    """Target network, with buffers."""
    momentum: int
    """Optimizer state."""
    gradients: int
    activations: int
    """Tensors saved for the backward pass. On a GPU also temporary results and workspaces."""
    batch: int
    """Views: the loader's whole ring on a CPU, two batches on a GPU."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in asdict(self).items())
        return f"peak memory of a step, MiB: {self.total / 2**20:,.0f} = {parts}"


class SavedTensorBytes:
    """Context manager that counts the storages autograd saves for the backward pass, each once.

    Parameters are not counted. Works on the meta device too, where storages have no address.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = {p.untyped_storage()._cdata for p in model.parameters()}
        self._saved: dict[int, int] = {}  # storage -> bytes
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(self._saved.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, tb)

    @torch.compiler.disable  # the compiler cannot trace addresses; a compiled graph runs its hooks eagerly
    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._known:
            self._saved[storage._cdata] = storage.nbytes()
        # Detach: otherwise a saved result keeps its graph alive, and the graph keeps the result, if
        # no backward pass follows.
        return x.detach()


def measure_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: int, device: torch.device, saved: SavedTensorBytes
) -> MemoryBreakdown:
    """Return the memory of the step that has just run.

    On a GPU, activations are the allocator's peak minus all other parts. On a CPU they are the
    saved tensors.

    Args:
        model: a `BYOL` pair.
        batch: bytes of the views.
        saved: was active during the step.
    """
    online = tensor_bytes([*model.online.parameters(), *model.online.buffers()])
    weights = online + tensor_bytes([*model.predictor.parameters(), *model.predictor.buffers()])
    target = 0 if model.target is None else tensor_bytes([*model.target.parameters(), *model.target.buffers()])
    momentum = tensor_bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    gradients = tensor_bytes(p for p in model.parameters() if p.requires_grad)
    activations = saved.total
    if device.type == "cuda":
        rest = weights + target + momentum + gradients + batch
        activations = max(torch.cuda.max_memory_allocated(device) - rest, 0)
    return MemoryBreakdown(weights, target, momentum, gradients, activations, batch)


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or of the system within the limit of the cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = cgroup_free_bytes(Path("/sys/fs/cgroup"))
    return free if limit is None else min(free, limit)


def cgroup_free_bytes(group: Path) -> int | None:
    """Return what a cgroup's limit leaves free; None without a limit.

    Cached files count as free: the kernel drops them when memory is needed.
    """
    limit = group / "memory.max"
    if not limit.exists() or (text := limit.read_text().strip()) == "max":
        return None
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cached = int(stat["inactive_file"]) + int(stat["active_file"])
    return int(text) - int((group / "memory.current").read_text()) + cached


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Return the total size of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
