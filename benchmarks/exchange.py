"""What GPUs would have to send each other: an estimate on paper, from the model's own tensors and published link rates.

    python benchmarks/exchange.py [--batch 4096] [--gpus 1 8 64 512] [--rate A100=1100]

Nothing here is measured. The pair is built on the meta device, and its parameters and BatchNorm channels are counted:

    gradients   of the online network and the predictor, float32 or bfloat16, one ring all-reduce of all of them per optimiser
                step: every GPU sends and receives 2 (n - 1) / n times their bytes
    SyncBN      both views pass through as one batch, so a BatchNorm layer of C channels makes one all-reduce of (2 views, 2
                moments, C) float64 in the online forward pass, one in the target's, and one in float32 in the online backward pass;
                the predictor has no target. Each is a collective of its own that the next layer waits for

Time on the link is bytes over the full one-way rate of the slowest link of the ring: NVLink within a node of 8 GPUs, each GPU's
InfiniBand port beyond it. A collective's latency is an assumption (--latency-us) and a column of its own. Gradients can travel
while the backward pass computes: 4 of the 8 units of a step, two views of 2 units each. What a GPU computes per second is by default the
bound of BYOL R50, 3/8 of a published supervised rate: faster computing than anybody's, so that less can hide behind it.

Writes benchmarks/results/exchange.csv, every row marked as an estimate.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results_csv
import torch
from torch import nn

from fastbyol import environment
from fastbyol.config import ModelConfig
from fastbyol.model import BYOL, build_model

RESULT = results_csv.FOLDER / "exchange.csv"
VIEWS, MOMENTS = 2, 2
FORWARD_BYTES, BACKWARD_BYTES = 8, 4  # statistics travel in float64 (kernels/batch_norm.py), their gradients in float32
GRADIENT_BYTES = {"float32": 4, "bfloat16": 2}
UNITS, BACKWARD_UNITS = 8, 4  # of a step; a view's forward pass is one unit
BOUND = 3 / 8
LATENCY_US = (20.0, 50.0)  # assumed, of one collective: within a node, between nodes
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Link:
    """A link's published rate in one direction, per GPU."""

    name: str
    gb_per_s: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """A GPU, its links, and a published rate of supervised R50 training at 224 px."""

    node: Link
    cluster: Link
    supervised_images_per_s: float
    source: str


GPUS = {
    "A100": Gpu(
        Link("NVLink 3", 600 / 2, "NVIDIA A100 data sheet: 600 GB/s, both directions together"),
        Link(
            "InfiniBand HDR", 200 / 8, "NVIDIA DGX A100 data sheet: eight ConnectX-6 ports of 200 Gb/s for eight GPUs"
        ),
        2470,
        "published for PyTorch",
    ),
    "H100": Gpu(
        Link("NVLink 4", 900 / 2, "NVIDIA H100 data sheet: 900 GB/s, both directions together"),
        Link(
            "InfiniBand NDR", 400 / 8, "NVIDIA DGX H100 data sheet: eight ConnectX-7 ports of 400 Gb/s for eight GPUs"
        ),
        7010,
        "MLPerf",
    ),
}


@dataclass(frozen=True)
class Counts:
    """What is exchanged per optimiser step, counted on a model."""

    gradient_values: int
    online_channels: int  # of all BatchNorm layers of backbone, projector and predictor
    target_channels: int  # of all BatchNorm layers of the target
    collectives: int  # of SyncBN

    @property
    def syncbn_bytes(self) -> int:
        """Payload of all SyncBN collectives: online forward and backward, target forward."""
        forward = FORWARD_BYTES * (self.online_channels + self.target_channels)
        return VIEWS * MOMENTS * (forward + BACKWARD_BYTES * self.online_channels)


def count(model: BYOL) -> Counts:
    norms = [norm_channels(part) for part in (model.online, model.predictor, model.target)]
    online, target = norms[0] + norms[1], norms[2]
    return Counts(
        gradient_values=sum(p.numel() for p in model.parameters() if p.requires_grad),
        online_channels=sum(online),
        target_channels=sum(target),
        collectives=2 * len(online) + len(target),
    )


def norm_channels(module: nn.Module) -> list[int]:
    """Channels of every BatchNorm layer."""
    return [m.num_features for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def meta_model(backbone: str, size: int) -> BYOL:
    """The pair without memory behind its tensors."""
    with torch.device("meta"):
        return build_model(ModelConfig(backbone=backbone), size, 0)


def estimate(
    counts: Counts,
    gpu: Gpu,
    *,
    gpus: int,
    batch: int,
    images_per_s: float,
    gradient_dtype: str,
    latency_us: tuple[float, float] = LATENCY_US,
) -> dict[str, Any]:
    """Bytes and times of one optimiser step, per GPU.

    Args:
        gpus: n, in one ring.
        batch: images of a step, over all GPUs.
        images_per_s: what one GPU computes.
        latency_us: of a collective within a node and beyond it.
    """
    ring = 2 * (gpus - 1) / gpus
    link, latency = (gpu.node, latency_us[0]) if gpus <= NODE else (gpu.cluster, latency_us[1])
    gradient_bytes = GRADIENT_BYTES[gradient_dtype] * counts.gradient_values
    collectives = counts.collectives if gpus > 1 else 0
    step_ms = 1e3 * batch / gpus / images_per_s
    backward_ms = step_ms * BACKWARD_UNITS / UNITS
    gradient_ms, syncbn_ms = (1e3 * ring * n / (link.gb_per_s * 1e9) for n in (gradient_bytes, counts.syncbn_bytes))
    latency_ms = 1e-3 * latency * collectives
    exposed_ms = max(0.0, gradient_ms - backward_ms) + syncbn_ms + latency_ms
    return {
        "kind": "estimate",
        "gpus": gpus,
        "images_per_gpu": batch // gpus,
        "gradient_dtype": gradient_dtype,
        "gradient_bytes": gradient_bytes if gpus > 1 else 0,
        "gradient_bytes_sent": round(ring * gradient_bytes),
        "syncbn_bytes": counts.syncbn_bytes if gpus > 1 else 0,
        "syncbn_bytes_sent": round(ring * counts.syncbn_bytes),
        "syncbn_collectives": collectives,
        "link": link.name if gpus > 1 else "",
        "link_gb_per_s_one_way": f"{link.gb_per_s:g}" if gpus > 1 else "",
        "gradient_link_ms": f"{gradient_ms:.3f}",
        "syncbn_link_ms": f"{syncbn_ms:.4f}",
        "assumed_latency_us": f"{latency:g}" if gpus > 1 else "",
        "syncbn_latency_ms": f"{latency_ms:.2f}",
        "images_per_s_per_gpu": f"{images_per_s:.0f}",
        "step_ms": f"{step_ms:.2f}",
        "backward_ms": f"{backward_ms:.2f}",
        "gradient_share_hidden": f"{min(1.0, backward_ms / gradient_ms):.3f}" if gpus > 1 else "",
        "exposed_ms": f"{exposed_ms:.2f}",
        "link_source": link.source if gpus > 1 else "",
    }


def rate(text: str) -> tuple[str, float]:
    """NAME=IMAGES_PER_S."""
    name, _, value = text.partition("=")
    if name not in GPUS:
        raise argparse.ArgumentTypeError(f"{text!r}: no such GPU, one of {', '.join(GPUS)}")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=4096, help="images of an optimiser step over all GPUs")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument(
        "--rate",
        type=rate,
        action="append",
        default=[],
        help="NAME=X: this GPU does BYOL at X images/s, not at its bound",
    )
    parser.add_argument(
        "--latency-us", type=float, nargs=2, default=LATENCY_US, help="of a collective: within a node, beyond it"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    counts, rates = count(meta_model(args.backbone, args.size)), dict(args.rate)
    facts = environment.describe()
    rows = []
    for name, gpu in GPUS.items():
        for gpus in args.gpus:
            for dtype in GRADIENT_BYTES:
                row = estimate(
                    counts,
                    gpu,
                    gpus=gpus,
                    batch=args.batch,
                    images_per_s=rates.get(name, BOUND * gpu.supervised_images_per_s),
                    gradient_dtype=dtype,
                    latency_us=tuple(args.latency_us),
                )
                row |= {"gpu": name, "backbone": args.backbone, "size_px": args.size, "batch": args.batch}
                source = f"3/8 of {gpu.supervised_images_per_s:g} ({gpu.source})" if name not in rates else "--rate"
                rows.append(row | {"rate_source": source} | {k: facts[k] for k in ("fastbyol", "torch", "timm")})
    results_csv.write(args.out, rows)


if __name__ == "__main__":
    main()
