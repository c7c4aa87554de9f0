"""`data.batch_size=auto`: the largest power of two that fits into memory."""

import torch

from fastbyol.config import Config
from fastbyol.data import Images
from fastbyol.data.views import VIEWS
from fastbyol.errors import InputError
from fastbyol.layers import activation_checkpointing
from fastbyol.model import BYOL
from fastbyol.precision import autocast, compute_dtype
from fastbyol.runtime.distributed import World
from fastbyol.runtime.memory import SavedTensorBytes, free_bytes, tensor_bytes

_SHARE = 0.85  # of the free memory: allocators fragment, libraries need workspaces
_PROBES = 4, 8  # images of the two trial steps; their difference is the cost of an image


def find_batch_size(config: Config, device: torch.device, world: World, model: BYOL) -> int:
    """Return the largest power of two of images that fits on this rank.

    Two small trial steps give the bytes per image. A GPU then tries the predicted batch, since
    running out of memory there is an error that can be caught. A CPU takes the prediction, since
    running out of memory would kill the process.

    Args:
        model: a pair for the trial steps; it moves to the device and changes.

    Raises:
        InputError: not even two images fit.
    """
    free = free_bytes(device) * _SHARE / (1 if device.type == "cuda" else world.local_size)
    parts = config.step.micro_batches
    model = model.to(device=device, memory_format=torch.channels_last)
    activation_checkpointing(model.online.backbone, config.step.activation_checkpointing)
    if device.type == "cuda":
        _trial(model, config, _PROBES[0], device)  # the libraries' workspaces are no image's cost
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
            f"GiB, {free / 2**30:.1f} GiB are free; choose a smaller model.backbone or data.image_size_px"
        )
    while device.type == "cuda" and size > 2 * parts and not _fits(model, config, size // parts, device):
        size //= 2
    return size


def global_batch_size(fits: int, images: Images, config: Config, world: World) -> int:
    """Return the batch size over all ranks if this rank can hold `fits` images.

    Every rank must call this.

    Raises:
        InputError: the split has fewer than two images per rank and micro-batch.
    """
    size = min(world.gather(fits)) * world.size
    while size > len(images):
        size //= 2
    if size < 2 * config.step.micro_batches * world.size:
        raise InputError(f"data.batch_size=auto: {images.root} has only {len(images)} images")
    return size


def batch_bytes(config: Config, images: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return the bytes of all views that exist at once, for batches of `images` images."""
    copies = 2 if device.type == "cuda" else config.data.prefetch_batches + 1
    return copies * VIEWS * images * config.data.image_size_px**2 * 3 * dtype.itemsize


def fixed_bytes(model: BYOL, config: Config) -> int:
    """Return the bytes that no image adds: weights, target, gradients and optimizer state (two
    tensors for Adam).
    """
    states = 2 if config.optim.name in ("adam", "adamw") else 1
    trained = tensor_bytes(p for p in model.parameters() if p.requires_grad)
    return tensor_bytes([*model.parameters(), *model.buffers()]) + (1 + states) * trained


def _trial(model: BYOL, config: Config, images: int, device: torch.device) -> int:
    """Run forward and backward on random images; return the bytes needed besides the weights."""
    dtype = compute_dtype(config.precision, device)
    size = config.data.image_size_px
    shape = (images, 3, size, size)
    views = [torch.randn(shape, device=device).to(dtype=dtype, memory_format=torch.channels_last) for _ in range(VIEWS)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with SavedTensorBytes(model) as saved, autocast(device, dtype):
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
