"""`fastbyol plan`: estimates a run on hardware that is not available yet. Nothing is measured.

    images/s     = GPUs / max(step time / images per GPU, loader time per image / CPU cores per GPU)
    step time    = roofline time of the step's operators / efficiency + exposed communication
    loader time  = decode + (crop + augment) x (view area / reference area) + rest, of one thread

If CPU cores both load images and compute, an image takes step time / images + loader time / cores.

Operators are counted on the config's own model (roofline.py). Peak rates and loader rates are
published, or measured by `fastbyol bench --out` (hardware.py). Efficiency is the roofline time of a
training step over its actual time: of published supervised ResNet-50 training at 224 px, or of the
measured step. Communication is counted on the model, over published link rates (communication.py).
"""

from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from fastbyol import batch_size
from fastbyol.config import Config
from fastbyol.data import find_images
from fastbyol.errors import InputError
from fastbyol.model import BYOL
from fastbyol.runtime.logging import logger
from fastbyol.schedules import total_steps
from fastbyol.settings.messages import nearest
from fastbyol.spans import BACKWARD
from fastbyol.tools.communication import Exchange, count_exchange, estimate_exchange
from fastbyol.tools.hardware import GPUS, Machine, Rates, measured_machine, published_machine
from fastbyol.tools.roofline import Peaks, Work, count_step, meta_model, saved_tensor_bytes

IMAGENET_IMAGES = 1_281_167
_MEMORY_SHARE = 0.9  # of a GPU's memory; the rest is for context, workspaces and fragmentation
_EXCHANGE_SHARE = 0.1  # exposed communication above this share of compute time is the limit
_GRADIENT_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # by distributed.gradient_dtype


def plan(
    config: Config,
    *,
    gpus: int,
    gpu: str | None,
    rates: Path | None = None,
    cores: int = 0,
    images: int = 0,
) -> dict[str, Any]:
    """Estimate and log a run's throughput, duration, memory, communication and bottleneck.

    Args:
        config: The run's config.
        gpus: Number of GPUs, which share data.batch_size equally.
        gpu: Key of GPUS; None to use `rates`.
        rates: File of `fastbyol bench --out`.
        cores: CPU cores per GPU that load images; 0 for as many as needed.
        images: Images of the training split; 0 counts those of data.root, or assumes ImageNet if
            there is no data.root.

    Returns:
        The estimate.

    Raises:
        InputError: An argument is invalid, or does not fit the config.
    """
    _check_arguments(config, gpus=gpus, gpu=gpu, rates=rates, cores=cores, images=images)
    machine = measured_machine(Rates.read(rates)) if gpu is None else published_machine(gpu, config.precision)
    result = _estimate(config, machine, gpus, cores) | {"device": machine.name}
    result |= _duration(config, images, result["images_per_s"])
    for line in _lines(config, result):
        logger.info(line)
    return result


def _estimate(config: Config, machine: Machine, gpus: int, cores: int) -> dict[str, Any]:
    images_per_gpu = config.data.batch_size // gpus
    model = meta_model(config)
    work = count_step(config, images_per_gpu, machine.dtype)
    parts_ms = {name: 1e3 * part.roofline_s(machine.peaks) / machine.efficiency for name, part in work.items()}
    compute_ms = sum(parts_ms.values())
    exchange = _exchange(config, model, machine, gpus, backward_ms=parts_ms[BACKWARD])
    step_ms = compute_ms + exchange.exposed_ms
    loader_ms = _loader_ms(config, machine)
    memory = _memory_bytes(config, model, machine, images_per_gpu)
    memory_limit = 0 if machine.gpu is None else machine.gpu.memory_gib * 2**30

    image_ms = step_ms / images_per_gpu
    limit = "exchange" if exchange.exposed_ms > _EXCHANGE_SHARE * compute_ms else _slower_side(work, machine.peaks)
    if machine.shared_cores:
        image_ms, limit = image_ms + loader_ms / machine.shared_cores, "cores"
    elif cores and loader_ms / cores > image_ms:
        image_ms, limit = loader_ms / cores, "loader"
    if memory_limit and sum(memory.values()) > _MEMORY_SHARE * memory_limit:
        limit = "memory"

    return {
        "images_per_s": 1e3 * gpus / image_ms,
        "gpus": gpus,
        "images_per_gpu": images_per_gpu,
        "step_ms": step_ms,
        "parts_ms": parts_ms,
        "flops": sum(part.flops for part in work.values()),
        "bytes": sum(part.bytes for part in work.values()),
        "exchange": asdict(exchange),
        "loader_ms_per_image": loader_ms,
        "cores_per_gpu": loader_ms / image_ms,
        "memory_bytes": memory,
        "memory_limit_bytes": memory_limit,
        "limit": limit,
        "sources": [*machine.sources, f"loader thread: {loader_ms:.2f} ms per image ({machine.loader_source})"],
    }


def _exchange(config: Config, model: BYOL, machine: Machine, gpus: int, backward_ms: float) -> Exchange:
    if machine.gpu is None:  # measured rates are those of one device
        return Exchange()
    return estimate_exchange(
        count_exchange(model),
        machine.gpu,
        gpus=gpus,
        backward_ms=backward_ms,
        gradient_dtype=_GRADIENT_DTYPES[config.distributed.gradient_dtype],
        sync_bn_ranks=config.distributed.sync_bn_ranks,
        micro_batches=config.step.micro_batches,
    )


def _loader_ms(config: Config, machine: Machine) -> float:
    """Milliseconds of one thread per image. Crop and augmentation scale with the area of a view."""
    area = (config.data.image_size_px / machine.loader_view_px) ** 2
    return sum(ms * (area if stage in ("crop", "augment") else 1) for stage, ms in machine.loader_ms.items())


def _memory_bytes(config: Config, model: BYOL, machine: Machine, images: int) -> dict[str, int]:
    """Memory of one device, by use."""
    device = torch.device("cpu" if machine.shared_cores else "cuda")
    return {
        "weights, target, gradients and optimizer": batch_size.fixed_bytes(model, config),
        "activations": saved_tensor_bytes(config, images, machine.dtype),
        "views": batch_size.batch_bytes(config, images, device, machine.dtype),
    }


def _slower_side(work: dict[str, Work], peaks: Peaks) -> str:
    """Return which takes more roofline time: compute-bound or memory-bound operators."""
    arithmetic = traffic = 0.0
    for part in work.values():
        for flops, size in part.operators:
            compute_s, memory_s = flops / peaks.flops_per_s, size / peaks.bytes_per_s
            if compute_s > memory_s:
                arithmetic += compute_s
            else:
                traffic += memory_s
    return "arithmetic" if arithmetic > traffic else "memory bandwidth"


def _duration(config: Config, images: int, images_per_s: float) -> dict[str, Any]:
    root, source = config.data.root, "--images"
    if not images and root is not None and Path(root).exists():
        images, source = len(find_images(config.data, "train")), f"counted in {root}"
    elif not images:
        images, source = IMAGENET_IMAGES, "ImageNet-1k, because data.root was not found"
    steps = total_steps(config.optim.epochs, Fraction(images, config.data.batch_size))
    return {"images": images, "images_source": source, "hours": steps * config.data.batch_size / images_per_s / 3600}


def _check_arguments(
    config: Config, *, gpus: int, gpu: str | None, rates: Path | None, cores: int, images: int
) -> None:
    if (gpu is None) == (rates is None):
        raise InputError("expected either --gpu (published rates) or --rates FILE (rates of `fastbyol bench --out`)")
    if gpu is not None and gpu not in GPUS:
        similar = nearest(gpu, GPUS)
        hint = f"; did you mean {similar}?" if similar else ""
        raise InputError(f"--gpu {gpu}: unknown GPU, expected one of {', '.join(GPUS)}{hint}")
    for name, value, minimum in (("gpus", gpus, 1), ("cores", cores, 0), ("images", images, 0)):
        if value < minimum:
            raise InputError(f"--{name} {value}: must be at least {minimum}")
    if rates is not None and gpus != 1:
        raise InputError(f"--gpus {gpus}: must be 1 with --rates, which hold no rates of links between GPUs")
    batch, micro_batches = config.data.batch_size, config.step.micro_batches
    if batch == "auto":
        raise InputError("data.batch_size=auto: can only be resolved on the machine; set a number")
    if batch % (gpus * micro_batches):
        raise InputError(
            f"data.batch_size={batch}: must be divisible by {gpus} GPUs x step.micro_batches={micro_batches}"
        )


# --- the estimate as text ---

_LIMITS = {
    "arithmetic": "GPU compute",
    "memory bandwidth": "GPU memory bandwidth",
    "exchange": "communication between GPUs that the backward pass does not hide",
    "loader": "CPU cores that load images: use more cores, or DALI",
    "memory": "memory, this batch does not fit: use more GPUs, step.micro_batches or step.activation_checkpointing",
    "cores": "CPU cores, which both load images and compute",
}


def _lines(config: Config, result: dict[str, Any]) -> list[str]:
    return [
        f"estimate: {config.model.backbone} (width {config.model.width:g}) at {config.data.image_size_px} px, "
        f"batch {config.data.batch_size} on {result['gpus']} x {result['device']}",
        f"  {result['images_per_s']:,.0f} images/s; {result['hours']:,.1f} hours ({result['hours'] / 24:.1f} days) "
        f"for {config.optim.epochs} epochs of {result['images']:,} images ({result['images_source']})",
        _step_line(result),
        f"  loader: {result['images_per_s'] / result['gpus']:,.0f} images/s per device, which takes "
        f"{result['cores_per_gpu']:.1f} CPU cores with data.backend=native (DALI decodes on the GPU)",
        _memory_line(result),
        *_network_lines(result["exchange"]),
        f"  limit: {_LIMITS[result['limit']]}",
        *(f"  {source}" for source in result["sources"]),
    ]


def _step_line(result: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in result["parts_ms"].items())
    return (
        f"  step: {result['step_ms']:.1f} ms for {result['images_per_gpu']} images per device: {parts}, "
        f"exposed communication {result['exchange']['exposed_ms']:.2f}; "
        f"{result['flops'] / 1e12:.2f} TFLOP, {result['bytes'] / 1e9:.1f} GB"
    )


def _memory_line(result: dict[str, Any]) -> str:
    total, limit = sum(result["memory_bytes"].values()), result["memory_limit_bytes"]
    uses = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in result["memory_bytes"].items())
    available = f"; available {limit / 2**30:.0f}" if limit else ""
    return f"  memory: {total / 2**30:.2f} GiB per device = {uses}{available}"


def _network_lines(exchange: dict[str, Any]) -> list[str]:
    if (link := exchange["link"]) is None:
        return []
    return [
        f"  network: each GPU sends {exchange['gradient_bytes_sent'] / 1e6:.1f} MB of gradients "
        f"({exchange['gradient_ms']:.2f} ms) and {exchange['syncbn_bytes_sent'] / 1e6:.2f} MB of BatchNorm statistics "
        f"({exchange['syncbn_ms']:.2f} ms and {exchange['latency_ms']:.1f} ms of assumed latency) per step over "
        f"{link['name']}, {link['gb_per_s']:g} GB/s one way ({link['source']})"
    ]
