"""Where a step's memory goes, and the largest batch that fits into what there is."""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastbyol.config import Config
from fastbyol.data import ImageSet
from fastbyol.distributed import World
from fastbyol.errors import InputError
from fastbyol.layers import checkpoint_stages
from fastbyol.model import BYOL, build_model
from fastbyol.precision import autocast, compute_dtype
from fastbyol.views import VIEWS

_SHARE = 0.85  # of the free memory that a batch may need: allocators fragment, libraries have workspaces
_PROBES = 4, 8  # images of the two trial steps whose difference is the cost of an image


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step at its peak, by part."""

    weights: int
    """Online network and predictor, with their buffers."""
    target: int
    """Target network, with its buffers."""
    momentum: int
    """State of the optimiser."""
    gradients: int
    activations: int
    """What forward keeps for backward; on a GPU everything else at the peak too: temporary results, workspaces."""
    batch: int
    """Views: on a CPU the loader's whole ring, on a GPU its two batches there."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in asdict(self).items())
        return f"memory at the peak of a step, MiB: {self.total / 2**20:,.0f} = {parts}"


class SavedBytes:
    """Context: counts the storage that autograd keeps for the backward pass, each once; parameters are not counted."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._kept: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes kept so far."""
        return sum(self._kept.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, tb)

    @torch.compiler.disable  # a compiled graph's hooks run as plain code: addresses cannot be traced
    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._kept[storage.data_ptr()] = storage.nbytes()
        # Detached: an operator's own result and its graph would keep each other alive where no backward pass follows.
        return x.detach()


def by_part(
    model: BYOL, optimizer: torch.optim.Optimizer, batch: int, device: torch.device, saved: SavedBytes
) -> Memory:
    """The parts after a step. On a GPU the activations are what is left of the allocator's peak, elsewhere what was saved.

    Args:
        batch: bytes of the views.
        saved: was active during the step.
    """
    online = _bytes([*model.online.parameters(), *model.online.buffers()])
    weights = online + _bytes([*model.predictor.parameters(), *model.predictor.buffers()])
    target = 0 if model.target is None else _bytes([*model.target.parameters(), *model.target.buffers()])
    momentum = _bytes(v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    gradients = _bytes(p for p in model.parameters() if p.requires_grad)
    activations = saved.total
    if device.type == "cuda":
        rest = weights + target + momentum + gradients + batch
        activations = max(torch.cuda.max_memory_allocated(device) - rest, 0)
    return Memory(weights, target, momentum, gradients, activations, batch)


def batch_bytes(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of the views that exist at once for batches of `images`."""
    copies = 2 if device.type == "cuda" else config.data.prefetch_batches + 1
    return copies * VIEWS * images * config.data.image_size_px**2 * 3 * dtype.itemsize


def largest_batch(config: Config, device: torch.device, world: World) -> int:
    """The largest power of two of images that fits on this rank.

    Two small steps on random images give the bytes of an image; the prediction is then tried out on a GPU, where a batch too
    large is an error that can be caught, and taken as it is on a CPU, where it would be the end of the process.

    Raises:
        InputError: not even two images fit.
    """
    free = _free_bytes(device) * _SHARE / (1 if device.type == "cuda" else _ranks_here(world))
    parts = config.step.micro_batches
    model = build_model(config.model, config.data.image_size_px, config.seed)
    model = model.to(device=device, memory_format=torch.channels_last)
    checkpoint_stages(model.online.backbone, config.step.checkpoint_stages)
    if device.type == "cuda":
        _trial(model, config, _PROBES[0], device)  # libraries set their workspaces aside once, which is no image's cost
    low, high = (_trial(model, config, n, device) for n in _PROBES)
    per_image = (high - low) / (_PROBES[1] - _PROBES[0])
    fixed = max(low - _PROBES[0] * per_image, 0) + fixed_bytes(model, config)
    views = batch_bytes(config, 1, device, compute_dtype(config.precision, device))
    size = 2 * parts
    while fixed + 2 * size * (per_image / parts + views) <= free:
        size *= 2
    if fixed + size * (per_image / parts + views) > free:
        raise InputError(
            f"data.batch_size=auto: {parts * 2} images need about {(fixed + 2 * parts * views + 2 * per_image) / 2**30:.1f} "
            f"GiB, {free / 2**30:.1f} are free; choose a smaller model.backbone or data.image_size_px"
        )
    while device.type == "cuda" and size > 2 * parts and not _fits(model, config, size // parts, device):
        size //= 2
    return size


def batch_of_all_ranks(fits: int, images: ImageSet, config: Config, world: World) -> int:
    """The batch that data.batch_size=auto means where this rank can hold `fits` images; every rank must call it.

    Raises:
        InputError: the split is smaller than two images per rank and micro-batch.
    """
    size = min(world.gather(fits)) * world.size
    while size > len(images):
        size //= 2
    if size < 2 * config.step.micro_batches * world.size:
        raise InputError(f"data.batch_size=auto: {images.root} has only {len(images)} images")
    return size


def _trial(model: BYOL, config: Config, images: int, device: torch.device) -> int:
    """Bytes that a forward and backward pass of `images` images needs beside the weights."""
    dtype = compute_dtype(config.precision, device)
    size = config.data.image_size_px
    shape = (images, 3, size, size)
    views = [torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last) for _ in range(VIEWS)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with SavedBytes(model) as saved, autocast(device, dtype):
        loss = model(*views).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return saved.total if device.type != "cuda" else torch.cuda.max_memory_allocated(device) - before


def _fits(model: BYOL, config: Config, images: int, device: torch.device) -> bool:
    try:
        _trial(model, config, images, device)
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return False
    return True


def fixed_bytes(model: BYOL, config: Config) -> int:
    """Weights and target, and for each trained parameter its gradient and the optimiser's state (two for Adam)."""
    states = 2 if config.optim.name in ("adam", "adamw") else 1
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    return _bytes([*model.parameters(), *model.buffers()]) + (1 + states) * trained


def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of a CPU what the system has available, within the limit of the process's cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def _ranks_here(world: World) -> int:
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), world.size)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
