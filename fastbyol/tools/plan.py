"""What a config would do on machines that are not here: `fastbyol plan`. An estimate on paper: it measures nothing.

Work and bytes are counted on the config's own model (roofline.py). The time of a step is the roofline of its operators at a device's peak rates,
divided by the efficiency that others have reached there: that of a published supervised training of a ResNet-50 at 224 px, whose forward and
backward pass are in the count too. With the rates that `fastbyol bench --out` measured on a machine it is an estimate for that machine.

What GPUs send each other per optimizer step:
    gradients   of the online network and the predictor, float32 or bfloat16, one ring all-reduce of all of them: every GPU sends and receives
                2 (n - 1) / n times their bytes. They travel while the backward pass computes
    SyncBN      both views pass through as one batch, so a BatchNorm layer of C channels makes one all-reduce of (2 views, 2
                moments, C) float64 in the online forward pass, one in the target's, and one in float32 in the online backward pass;
                the predictor has no target. Each is a collective of its own that the next layer waits for

Time on the link is bytes over the full one-way rate of the slowest link of the ring: NVLink within a node of 8 GPUs, each GPU's InfiniBand
port beyond it. The latency of a collective is an assumption.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastbyol import batch_size
from fastbyol.config import Config, DataConfig
from fastbyol.data import find_images
from fastbyol.data.views import VIEWS
from fastbyol.errors import InputError, first_line
from fastbyol.layers import batch_norms
from fastbyol.model import BYOL
from fastbyol.runtime.files import read_json
from fastbyol.settings.messages import BadSetting, nearest, require
from fastbyol.settings.types import check
from fastbyol.tools.roofline import BACKWARD, ONLINE, Peaks, Work, count_step, meta_model, saved_tensor_bytes

IMAGENET_IMAGES = 1_281_167
_MOMENTS = 2
_FORWARD_BYTES = 8  # statistics travel in float64 (kernels/batch_norm.py)
_BACKWARD_BYTES = 4  # their gradients in float32
GRADIENT_BYTES = {"float32": 4, "bfloat16": 2}
BACKWARD_SHARE = 4 / 8  # of a step, where only its whole time is known: 4 of 8 forward passes of a view
LATENCY_US = (20.0, 50.0)  # assumed, of one collective: within a node, between nodes
NODE = 8  # GPUs that NVLink joins
_REFERENCE_BATCH = 256  # of the published trainings
_MEMORY_SHARE = 0.9  # of a GPU's memory; the rest is context, workspaces and fragments


@dataclass(frozen=True)
class Link:
    """A link's published rate in one direction, per GPU."""

    name: str
    gb_per_s: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU's published peak rates, its links, and a published rate of supervised R50 training at 224 px."""

    peaks: Peaks
    """Of bfloat16 with dense matrices, and of its memory."""
    float32_flops_per_s: float
    memory_gib: float
    peaks_source: str
    node: Link
    cluster: Link
    supervised_images_per_s: float
    supervised_source: str


_NVLINK3 = Link("NVLink 3", 600 / 2, "NVIDIA A100 data sheet: 600 GB/s, both directions together")
_NVLINK4 = Link("NVLink 4", 900 / 2, "NVIDIA H100 data sheet: 900 GB/s, both directions together")
_HDR = Link("InfiniBand HDR", 200 / 8, "NVIDIA DGX A100 data sheet: eight ConnectX-6 ports of 200 Gb/s for eight GPUs")
_NDR = Link("InfiniBand NDR", 400 / 8, "NVIDIA DGX H100 data sheet: eight ConnectX-7 ports of 400 Gb/s for eight GPUs")

GPUS = {
    "a100-40": Gpu(
        Peaks(312e12, 1.555e12), 19.5e12, 40, "NVIDIA A100 data sheet", _NVLINK3, _HDR, 2470, "published for PyTorch"
    ),
    "a100-80": Gpu(
        Peaks(312e12, 2.039e12), 19.5e12, 80, "NVIDIA A100 data sheet", _NVLINK3, _HDR, 2470, "published for PyTorch"
    ),
    "h100": Gpu(Peaks(989e12, 3.35e12), 67e12, 80, "NVIDIA H100 data sheet, SXM", _NVLINK4, _NDR, 7010, "MLPerf"),
}


@dataclass(frozen=True)
class Counts:
    """What is exchanged per optimizer step, counted on a model."""

    gradient_values: int
    online_channels: int  # of all BatchNorm layers of backbone, projector and predictor
    target_channels: int  # of all BatchNorm layers of the target
    collectives: int  # of SyncBN

    @property
    def syncbn_bytes(self) -> int:
        """Payload of all SyncBN collectives: online forward and backward, target forward."""
        forward = _FORWARD_BYTES * (self.online_channels + self.target_channels)
        return VIEWS * _MOMENTS * (forward + _BACKWARD_BYTES * self.online_channels)


@dataclass(frozen=True)
class Exchange:
    """Bytes that a GPU sends per optimizer step, and milliseconds."""

    gradient_bytes_sent: int
    gradient_ms: float
    """On the link."""
    syncbn_bytes_sent: int
    syncbn_ms: float
    """On the link."""
    latency_ms: float
    """Of SyncBN's collectives."""
    exposed_ms: float
    """What the step waits for: gradients that the backward pass does not hide, and all of SyncBN."""
    link: Link | None


@dataclass(frozen=True)
class Rates:
    """What a machine does, as `fastbyol bench` measured it."""

    peaks: Peaks
    efficiency: float
    """Roofline of the measured step over its time."""
    loader_ms: dict[str, float]
    """Of one thread an image: decode, crop, augment, rest."""
    image_size_px: int
    """Of those views."""
    cores: int
    device: str
    dtype: str

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """From a file of `fastbyol bench --out`.

        Raises:
            InputError: it cannot be read, or holds no rates.
        """
        try:
            values = _section(read_json(path), "rates") if path.exists() else None
            if values is None:
                raise BadSetting("rates", "there is no such file")
            peaks, loader_ms = _section(values, "peaks"), _section(values, "loader_ms")
            plain = {f.name: check(f.type, values.get(f.name), f.name) for f in fields(cls) if f.name in _PLAIN_RATES}
            for name in ("efficiency", "image_size_px", "cores"):
                require(plain[name] > 0, name, plain[name], "must be above 0")
            require(plain["dtype"] in _DTYPES, "dtype", plain["dtype"], f"expected one of {', '.join(_DTYPES)}")
            return cls(
                peaks=Peaks(**{f.name: _number(peaks, f.name, least=1) for f in fields(Peaks)}),
                loader_ms={name: _number(loader_ms, name, least=0) for name in loader_ms},
                **plain,
            )
        except (BadSetting, InputError) as error:
            raise InputError(f"--rates {path}: holds no rates of `fastbyol bench --out`: {first_line(error)}") from None


_PLAIN_RATES = ("efficiency", "image_size_px", "cores", "device", "dtype")
_DTYPES = ("float32", "bfloat16", "float16")


def _section(values: Any, name: str) -> dict[str, Any]:
    found = values.get(name) if isinstance(values, dict) else None
    if not isinstance(found, dict):
        raise BadSetting(name, f"{name!r} is missing or no section")
    return found


def _number(values: dict[str, Any], name: str, least: float) -> float:
    value = check(float, values.get(name), name)
    require(value >= least, name, value, f"must be at least {least}")
    return value


# Where no loader was measured: images of 500x375 px by one thread of an AMD EPYC (benchmarks/results/loader.csv, medians): 1,000 a second
# decoded, 640 with both views of 224 px made.
ASSUMED_LOADER_MS = {"decode": 1.0, "crop": 0.2, "augment": 0.35, "rest": 0.01}
ASSUMED_LOADER_SIZE = 224


def count(model: BYOL) -> Counts:
    """Values and channels of a pair."""
    online = [norm.num_features for part in (model.online, model.predictor) for norm in batch_norms(part)]
    target = [] if model.target is None else [norm.num_features for norm in batch_norms(model.target)]
    return Counts(
        gradient_values=sum(p.numel() for p in model.parameters() if p.requires_grad),
        online_channels=sum(online),
        target_channels=sum(target),
        collectives=2 * len(online) + len(target),
    )


def exchange(
    counts: Counts,
    gpu: Gpu,
    *,
    gpus: int,
    backward_ms: float,
    gradient_dtype: str,
    sync_bn_ranks: int = 0,
    micro_batches: int = 1,
    latency_us: tuple[float, float] = LATENCY_US,
) -> Exchange:
    """Bytes and times of one optimizer step, per GPU.

    Args:
        gpus: n, in one ring.
        backward_ms: of the backward pass, which hides gradients.
        sync_bn_ranks: neighbors that share BatchNorm statistics; 0 is all of them.
        micro_batches: of a step: each has statistics of its own.
        latency_us: of a collective within a node and beyond it.
    """
    if gpus == 1:
        return Exchange(0, 0.0, 0, 0.0, 0.0, 0.0, None)

    def ring(size: int, ranks: int) -> tuple[int, float, float]:
        """Bytes that a GPU sends, milliseconds on the link, milliseconds of latency of one collective."""
        link, latency = (gpu.node, latency_us[0]) if ranks <= NODE else (gpu.cluster, latency_us[1])
        sent = round(2 * (ranks - 1) / ranks * size)
        return sent, 1e3 * sent / (link.gb_per_s * 1e9), 1e-3 * latency if ranks > 1 else 0.0

    gradient_bytes, gradient_ms, _ = ring(GRADIENT_BYTES[gradient_dtype] * counts.gradient_values, gpus)
    syncbn_bytes, syncbn_ms, latency_ms = ring(micro_batches * counts.syncbn_bytes, sync_bn_ranks or gpus)
    latency_ms *= micro_batches * counts.collectives
    exposed_ms = max(0.0, gradient_ms - backward_ms) + syncbn_ms + latency_ms
    link = gpu.node if gpus <= NODE else gpu.cluster
    return Exchange(gradient_bytes, gradient_ms, syncbn_bytes, syncbn_ms, latency_ms, exposed_ms, link)


def plan(
    config: Config,
    *,
    gpus: int,
    gpu: str | None,
    rates: Path | None = None,
    cores: int = 0,
    images: int = 0,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Estimates a run: images/s, days, what the loader needs, what is sent, memory, and which limit binds.

    Args:
        gpus: N, each with an equal part of data.batch_size.
        gpu: one of GPUS; None for the machine of `rates`.
        rates: file of `fastbyol bench --out`.
        cores: CPU cores beside each GPU that load images; 0 is as many as it takes.
        images: in the training split; 0 counts those in data.root, or takes ImageNet's if that is not there.

    Returns:
        the figures.

    Raises:
        InputError: an argument or the config does not fit.
    """
    if (gpu is None) == (rates is None):
        raise InputError("say either --gpu, for published rates, or --rates FILE, for those of a machine")
    if gpu is not None and gpu not in GPUS:
        near = nearest(gpu, GPUS)
        raise InputError(
            f"--gpu {gpu}: not known, one of {', '.join(GPUS)}" + (f"; did you mean {near}?" if near else "")
        )
    for name, value, least in (("gpus", gpus, 1), ("cores", cores, 0), ("images", images, 0)):
        if value < least:
            raise InputError(f"--{name} {value}: must be at least {least}")
    if rates is not None and gpus != 1:
        raise InputError(f"--gpus {gpus}: rates of one machine say nothing about what several send each other")
    batch = config.data.batch_size
    if batch == "auto":
        raise InputError("data.batch_size=auto is found on the machine; give a number to plan with")
    if batch % (gpus * config.step.micro_batches):
        raise InputError(
            f"data.batch_size={batch} cannot be split into {gpus} x step.micro_batches={config.step.micro_batches}"
        )
    machine = _published(config, GPUS[gpu]) if gpu is not None else _measured(Rates.read(rates))
    result = _estimate(config, machine, gpus, cores)
    result |= _duration(config, images, result["images_per_s"])
    result["device"] = gpu or machine.name
    for line in lines(config, result):
        say(line)
    return result


@dataclass(frozen=True)
class _Machine:
    """What the estimate takes from a GPU's data sheet or from measured rates."""

    name: str
    peaks: Peaks
    efficiency: float
    dtype: torch.dtype
    sources: list[str]
    loader_ms: dict[str, float]
    loader_size: int
    loader_source: str
    gpu: Gpu | None  # None: the machine's cores do everything
    cores: int = 0


def _published(config: Config, gpu: Gpu) -> _Machine:
    dtype = {"tf32": torch.float32, "fp32": torch.float32, "fp16": torch.float16}.get(config.precision, torch.bfloat16)
    flops = {"fp32": gpu.float32_flops_per_s, "tf32": gpu.peaks.flops_per_s / 2}  # TF32 is half of bfloat16
    peaks = Peaks(flops.get(config.precision, gpu.peaks.flops_per_s), gpu.peaks.bytes_per_s)
    efficiency = published_efficiency(gpu)
    sources = [
        f"peaks {gpu.peaks.flops_per_s / 1e12:.0f} TFLOP/s (bfloat16, dense), {gpu.peaks.bytes_per_s / 1e12:.2f} TB/s: {gpu.peaks_source}",
        f"efficiency {efficiency:.0%}: supervised ResNet-50 at 224 px, {gpu.supervised_images_per_s:,.0f} images/s ({gpu.supervised_source}), "
        "over its roofline at those peaks",
    ]
    source = "one thread of an AMD EPYC on 500x375 px, benchmarks/results/loader.csv"
    return _Machine("", peaks, efficiency, dtype, sources, ASSUMED_LOADER_MS, ASSUMED_LOADER_SIZE, source, gpu)


def published_efficiency(gpu: Gpu) -> float:
    """Roofline of a supervised step of a ResNet-50 over its published time: the online network's share of BYOL's step, an image a view."""
    work = _reference_work()
    images = VIEWS * _REFERENCE_BATCH
    roofline_s = work[ONLINE].roofline_s(gpu.peaks) + work[BACKWARD].roofline_s(gpu.peaks)
    return roofline_s / images * gpu.supervised_images_per_s


@cache
def _reference_work() -> dict[str, Work]:
    config = Config(data=DataConfig(batch_size=_REFERENCE_BATCH, image_size_px=224))
    return count_step(config, _REFERENCE_BATCH, torch.bfloat16)


def _measured(rates: Rates) -> _Machine:
    sources = [
        f"peaks {rates.peaks.flops_per_s / 1e9:,.0f} GFLOP/s, {rates.peaks.bytes_per_s / 1e9:.1f} GB/s and efficiency {rates.efficiency:.0%}: "
        "measured by `fastbyol bench`"
    ]
    on_cpu = rates.device == "cpu"
    return _Machine(
        rates.device,
        rates.peaks,
        rates.efficiency,
        getattr(torch, rates.dtype),
        sources,
        rates.loader_ms,
        rates.image_size_px,
        "measured by `fastbyol bench`",
        None,
        rates.cores if on_cpu else 0,
    )


def _estimate(config: Config, machine: _Machine, gpus: int, cores: int) -> dict[str, Any]:
    batch, model = config.data.batch_size // gpus, meta_model(config)
    counted = count_step(config, batch, machine.dtype)
    times = {name: 1e3 * work.roofline_s(machine.peaks) / machine.efficiency for name, work in counted.items()}
    compute_ms = sum(times.values())
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.distributed.gradient_dtype]
    sent = Exchange(0, 0.0, 0, 0.0, 0.0, 0.0, None)
    if machine.gpu is not None:
        sent = exchange(
            count(model),
            machine.gpu,
            gpus=gpus,
            backward_ms=times[BACKWARD],
            gradient_dtype=dtype,
            sync_bn_ranks=config.distributed.sync_bn_ranks,
            micro_batches=config.step.micro_batches,
        )
    step_ms = compute_ms + sent.exposed_ms
    area = (config.data.image_size_px / machine.loader_size) ** 2
    loader_ms = sum(ms * (area if name in ("crop", "augment") else 1) for name, ms in machine.loader_ms.items())
    if machine.cores:  # loader and step share them
        image_ms = step_ms / batch + loader_ms / machine.cores
        limit = "cores"
    else:
        image_ms, limit = step_ms / batch, "step"
        if cores and loader_ms / cores > image_ms:
            image_ms, limit = loader_ms / cores, "loader"
    device = torch.device("cpu" if machine.cores else "cuda")
    needed = {
        "weights, target, gradients and optimizer": batch_size.fixed_bytes(model, config),
        "activations": saved_tensor_bytes(config, batch, machine.dtype),
        "views": batch_size.batch_bytes(config, batch, device, machine.dtype),
    }
    fits = machine.gpu is None or sum(needed.values()) <= _MEMORY_SHARE * machine.gpu.memory_gib * 2**30
    if not fits:
        limit = "memory"
    elif limit == "step":
        limit = "exchange" if sent.exposed_ms > compute_ms / 10 else _bound(counted, machine.peaks)
    return {
        "images_per_s": 1e3 * gpus / image_ms,
        "gpus": gpus,
        "images_per_gpu": batch,
        "step_ms": step_ms,
        "parts_ms": times,
        "flops": sum(work.flops for work in counted.values()),
        "bytes": sum(work.bytes for work in counted.values()),
        "exchange": asdict(sent),
        "loader_ms_per_image": loader_ms,
        "cores_per_gpu": loader_ms / image_ms,
        "memory_bytes": needed,
        "memory_limit_bytes": 0 if machine.gpu is None else machine.gpu.memory_gib * 2**30,
        "limit": limit,
        "sources": [*machine.sources, f"loader {loader_ms:.2f} ms of a thread an image: {machine.loader_source}"],
    }


def _bound(counted: dict[str, Work], peaks: Peaks) -> str:
    """Whether most of the roofline is arithmetic or memory traffic."""
    operators = [operator for work in counted.values() for operator in work.operators]
    arithmetic = sum(f / peaks.flops_per_s for f, b in operators if f / peaks.flops_per_s > b / peaks.bytes_per_s)
    traffic = sum(b / peaks.bytes_per_s for f, b in operators if f / peaks.flops_per_s <= b / peaks.bytes_per_s)
    return "arithmetic" if arithmetic > traffic else "memory bandwidth"


def _duration(config: Config, images: int, images_per_s: float) -> dict[str, Any]:
    root, source = config.data.root, "--images"
    if not images and root is not None and Path(root).exists():
        images, source = len(find_images(config.data, "train")), f"counted in {root}"
    elif not images:
        images, source = IMAGENET_IMAGES, "ImageNet-1k, since data.root is not here"
    steps = images // config.data.batch_size * config.optim.epochs
    return {"images": images, "images_source": source, "hours": steps * config.data.batch_size / images_per_s / 3600}


def lines(config: Config, result: dict[str, Any]) -> list[str]:
    """The estimate as text."""
    sent, needed = result["exchange"], result["memory_bytes"]
    total, limit = sum(needed.values()), result["memory_limit_bytes"]
    hours = result["hours"]
    text = [
        f"estimate: {config.model.backbone} (width {config.model.width:g}) at {config.data.image_size_px} px, batch "
        f"{config.data.batch_size} on {result['gpus']} x {result['device']}",
        f"  {result['images_per_s']:,.0f} images/s; {hours:,.1f} hours ({hours / 24:.1f} days) for {config.optim.epochs} epochs of "
        f"{result['images']:,} images ({result['images_source']})",
        f"  step {result['step_ms']:.1f} ms of {result['images_per_gpu']} images a device: "
        + ", ".join(f"{name} {ms:.1f}" for name, ms in result["parts_ms"].items())
        + f", exchange that is not hidden {sent['exposed_ms']:.2f}; {result['flops'] / 1e12:.2f} TFLOP, {result['bytes'] / 1e9:.1f} GB",
        f"  loader: {result['images_per_s'] / result['gpus']:,.0f} images decoded a second for each device, {result['cores_per_gpu']:.1f} CPU "
        "cores with native (with DALI a GPU does that work)",
        f"  memory: {total / 2**30:.2f} GiB a device = "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in needed.items())
        + (f"; it has {limit / 2**30:.0f}" if limit else ""),
    ]
    if sent["link"] is not None:
        text.append(
            f"  network: each GPU sends {sent['gradient_bytes_sent'] / 1e6:.1f} MB of gradients ({sent['gradient_ms']:.2f} ms) and "
            f"{sent['syncbn_bytes_sent'] / 1e6:.2f} MB of BatchNorm statistics ({sent['syncbn_ms']:.2f} ms and {sent['latency_ms']:.1f} ms of assumed "
            f"latency) a step over {sent['link']['name']}, {sent['link']['gb_per_s']:g} GB/s one way ({sent['link']['source']})"
        )
    text.append(f"  limit: {_LIMITS[result['limit']]}")
    return text + [f"  from: {source}" for source in result["sources"]]


_LIMITS = {
    "arithmetic": "the arithmetic of the GPU",
    "memory bandwidth": "the memory bandwidth of the GPU",
    "exchange": "what the GPUs send each other and cannot hide",
    "loader": "the CPU cores that load images: more of them, or DALI",
    "memory": "memory: this batch does not fit; more GPUs, step.micro_batches or step.activation_checkpointing",
    "cores": "the CPU cores, which load and compute",
}
