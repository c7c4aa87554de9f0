"""Rates of machines: published rates of GPUs and links, or rates measured by `fastbyol bench`."""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastbyol.config import Config, DataConfig
from fastbyol.data.views import VIEWS
from fastbyol.errors import InputError, first_line
from fastbyol.runtime.files import read_json
from fastbyol.settings.messages import BadSetting, require
from fastbyol.settings.types import check
from fastbyol.spans import BACKWARD, ONLINE
from fastbyol.tools.roofline import Peaks, Work, count_step

# --- published rates ---

GPUS_PER_NODE = 8  # that NVLink connects


@dataclass(frozen=True)
class Link:
    """A link's published rate per GPU, in one direction."""

    name: str
    gb_per_s: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """Published rates of a GPU and its links.

    Attributes:
        peaks: Dense bfloat16 matrix products, and memory bandwidth.
        node: The link to GPUs of the same node.
        cluster: The link to other nodes.
        supervised_images_per_s: Supervised ResNet-50 training at 224 px.
    """

    peaks: Peaks
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
_A100_SHEET, _H100_SHEET = "NVIDIA A100 data sheet", "NVIDIA H100 data sheet, SXM"

GPUS = {
    "a100-40": Gpu(Peaks(312e12, 1.555e12), 19.5e12, 40, _A100_SHEET, _NVLINK3, _HDR, 2470, "published for PyTorch"),
    "a100-80": Gpu(Peaks(312e12, 2.039e12), 19.5e12, 80, _A100_SHEET, _NVLINK3, _HDR, 2470, "published for PyTorch"),
    "h100": Gpu(Peaks(989e12, 3.35e12), 67e12, 80, _H100_SHEET, _NVLINK4, _NDR, 7010, "MLPerf"),
}

# Loader rates assumed next to a published GPU: one thread of an AMD EPYC, 500x375 px images, 224 px
# views (medians of benchmarks/results/loader.csv: 1,000 images/s decoded, 640 images/s with both
# views).
_LOADER_MS = {"decode": 1.0, "crop": 0.2, "augment": 0.35, "rest": 0.01}
_LOADER_VIEW_PX = 224
_LOADER_SOURCE = "one thread of an AMD EPYC on 500x375 px, benchmarks/results/loader.csv"


# --- rates measured by `fastbyol bench` ---

_DTYPES = ("float32", "bfloat16", "float16")
_POSITIVE = ("efficiency", "image_size_px", "cores")


@dataclass(frozen=True)
class Rates:
    """Rates of a machine, as `fastbyol bench --out` wrote them.

    Attributes:
        efficiency: Roofline time of the measured step over its measured time.
        loader_ms: Milliseconds of one thread per image: decode, crop, augment, rest.
        image_size_px: Side of the views that the loader made.
    """

    peaks: Peaks
    efficiency: float
    loader_ms: dict[str, float]
    image_size_px: int
    cores: int
    device: str
    dtype: str

    @classmethod
    def read(cls, path: Path) -> "Rates":
        """Read the file of `fastbyol bench --out`.

        Raises:
            InputError: The file cannot be read, or holds no rates.
        """
        try:
            if not path.exists():
                raise BadSetting("rates", "file not found")
            return cls._parse(_section(read_json(path), "rates"))
        except (BadSetting, InputError) as error:
            raise InputError(f"--rates {path}: holds no rates of `fastbyol bench --out`: {first_line(error)}") from None

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> "Rates":
        peaks, loader_ms = _section(values, "peaks"), _section(values, "loader_ms")
        plain = {f.name: check(f.type, values.get(f.name), f.name) for f in fields(cls) if f.type in (int, float, str)}
        for name in _POSITIVE:
            require(plain[name] > 0, name, plain[name], "must be above 0")
        require(plain["dtype"] in _DTYPES, "dtype", plain["dtype"], f"expected one of {', '.join(_DTYPES)}")
        return cls(
            peaks=Peaks(**{f.name: _number(peaks, f.name, minimum=1) for f in fields(Peaks)}),
            loader_ms={name: _number(loader_ms, name, minimum=0) for name in loader_ms},
            **plain,
        )


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise BadSetting(name, f"section {name!r} is missing or not an object")
    return section


def _number(values: dict[str, Any], name: str, minimum: float) -> float:
    value = check(float, values.get(name), name)
    require(value >= minimum, name, value, f"must be at least {minimum}")
    return value


# --- machines ---


@dataclass(frozen=True)
class Machine:
    """A machine as an estimate sees it.

    Attributes:
        efficiency: Roofline time over actual time of a training step.
        dtype: Dtype of activations.
        loader_ms: Milliseconds of one thread per image: decode, crop, augment, rest.
        loader_view_px: Side of the views that the loader rates belong to.
        gpu: The published GPU; None for measured rates.
        shared_cores: Cores that both load images and compute; 0 if a GPU computes.
        sources: Where peaks and efficiency come from.
    """

    name: str
    peaks: Peaks
    efficiency: float
    dtype: torch.dtype
    loader_ms: dict[str, float]
    loader_view_px: int
    loader_source: str
    gpu: Gpu | None
    shared_cores: int
    sources: tuple[str, ...]


def published_machine(name: str, precision: str) -> Machine:
    """Return one of GPUS with its peak rates in a precision, and assumed loader rates."""
    gpu = GPUS[name]
    flops_per_s = {"fp32": gpu.float32_flops_per_s, "tf32": gpu.peaks.flops_per_s / 2}  # bfloat16 is twice TF32
    dtypes = {"tf32": torch.float32, "fp32": torch.float32, "fp16": torch.float16}
    efficiency = published_efficiency(gpu)
    return Machine(
        name=name,
        peaks=Peaks(flops_per_s.get(precision, gpu.peaks.flops_per_s), gpu.peaks.bytes_per_s),
        efficiency=efficiency,
        dtype=dtypes.get(precision, torch.bfloat16),
        loader_ms=_LOADER_MS,
        loader_view_px=_LOADER_VIEW_PX,
        loader_source=_LOADER_SOURCE,
        gpu=gpu,
        shared_cores=0,
        sources=(
            f"peaks: {gpu.peaks.flops_per_s / 1e12:.0f} TFLOP/s (bfloat16, dense), "
            f"{gpu.peaks.bytes_per_s / 1e12:.2f} TB/s ({gpu.peaks_source})",
            f"efficiency: {efficiency:.0%} of the roofline, as in supervised ResNet-50 training at 224 px with "
            f"{gpu.supervised_images_per_s:,.0f} images/s ({gpu.supervised_source})",
        ),
    )


def measured_machine(rates: Rates) -> Machine:
    """Return the machine on which `fastbyol bench` measured these rates."""
    return Machine(
        name=rates.device,
        peaks=rates.peaks,
        efficiency=rates.efficiency,
        dtype=getattr(torch, rates.dtype),
        loader_ms=rates.loader_ms,
        loader_view_px=rates.image_size_px,
        loader_source="measured by `fastbyol bench`",
        gpu=None,
        shared_cores=rates.cores if rates.device == "cpu" else 0,
        sources=(
            f"peaks: {rates.peaks.flops_per_s / 1e9:,.0f} GFLOP/s, {rates.peaks.bytes_per_s / 1e9:.1f} GB/s; "
            f"efficiency: {rates.efficiency:.0%} (measured by `fastbyol bench`)",
        ),
    )


_REFERENCE_BATCH = 256


def published_efficiency(gpu: Gpu) -> float:
    """Return the roofline time of supervised ResNet-50 training over its published time.

    A supervised step of 2 B images is the online network's forward and backward pass of BYOL with
    B images, which have two views each.
    """
    work = _resnet50_work()
    roofline_s = work[ONLINE].roofline_s(gpu.peaks) + work[BACKWARD].roofline_s(gpu.peaks)
    return roofline_s / (VIEWS * _REFERENCE_BATCH) * gpu.supervised_images_per_s


@cache
def _resnet50_work() -> dict[str, Work]:
    config = Config(data=DataConfig(batch_size=_REFERENCE_BATCH, image_size_px=224))
    return count_step(config, _REFERENCE_BATCH, torch.bfloat16)
