"""Estimate the communication between GPUs from the model's tensors and published link rates.

    python benchmarks/exchange.py [--batch 4096] [--gpus 1 8 64 512] [--rate a100-80=1100]

Nothing is measured. fastbyol/tools/communication.py contains the formulas and sources. The default
compute rate of a GPU is the bound of BYOL with a ResNet-50, 3/8 of a published supervised rate. No
implementation computes faster, so the estimated overlap with communication is a lower bound.

Writes benchmarks/results/exchange.csv; every row is marked as an estimate.
"""

import argparse
from pathlib import Path
from typing import Any

import results_csv

from fastbyol.config import Config, DataConfig, ModelConfig
from fastbyol.runtime import environment
from fastbyol.tools.bench import BOUND
from fastbyol.tools.communication import (
    BACKWARD_SHARE,
    GRADIENT_BYTES,
    LATENCY_US,
    Counts,
    count_exchange,
    estimate_exchange,
)
from fastbyol.tools.hardware import GPUS, GPUS_PER_NODE, Gpu
from fastbyol.tools.roofline import meta_model

RESULT = results_csv.FOLDER / "exchange.csv"


def counts_of(backbone: str, size: int) -> Counts:
    """Count the tensors of the online and target network with a backbone."""
    return count_exchange(meta_model(Config(data=DataConfig(image_size_px=size), model=ModelConfig(backbone=backbone))))


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
    """Return a row: bytes and times of one optimizer step, per GPU.

    Args:
        counts: Sizes of the model's tensors.
        gpu: Type of GPU and its links.
        gpus: Number of GPUs in one ring.
        batch: Images per step, over all GPUs.
        images_per_s: Compute rate of one GPU.
        gradient_dtype: Key of GRADIENT_BYTES.
        latency_us: Latency of a collective within a node and between nodes.
    """
    step_ms = 1e3 * batch / gpus / images_per_s
    backward_ms = step_ms * BACKWARD_SHARE
    sent = estimate_exchange(
        counts, gpu, gpus=gpus, backward_ms=backward_ms, gradient_dtype=gradient_dtype, latency_us=latency_us
    )
    communicates = sent.link is not None
    return {
        "kind": "estimate",
        "gpus": gpus,
        "images_per_gpu": batch // gpus,
        "gradient_dtype": gradient_dtype,
        "gradient_bytes": GRADIENT_BYTES[gradient_dtype] * counts.gradient_values if communicates else 0,
        "gradient_bytes_sent": sent.gradient_bytes_sent,
        "syncbn_bytes": counts.syncbn_bytes if communicates else 0,
        "syncbn_bytes_sent": sent.syncbn_bytes_sent,
        "syncbn_collectives": counts.collectives if communicates else 0,
        "link": sent.link.name if communicates else "",
        "link_gb_per_s_one_way": f"{sent.link.gb_per_s:g}" if communicates else "",
        "gradient_link_ms": f"{sent.gradient_ms:.3f}",
        "syncbn_link_ms": f"{sent.syncbn_ms:.4f}",
        "assumed_latency_us": f"{latency_us[gpus > GPUS_PER_NODE]:g}" if communicates else "",
        "syncbn_latency_ms": f"{sent.latency_ms:.2f}",
        "images_per_s_per_gpu": f"{images_per_s:.0f}",
        "step_ms": f"{step_ms:.2f}",
        "backward_ms": f"{backward_ms:.2f}",
        "gradient_share_hidden": f"{min(1.0, backward_ms / sent.gradient_ms):.3f}" if communicates else "",
        "exposed_ms": f"{sent.exposed_ms:.2f}",
        "link_source": sent.link.source if communicates else "",
    }


def rate(text: str) -> tuple[str, float]:
    """Parse NAME=IMAGES_PER_S."""
    name, _, value = text.partition("=")
    if name not in GPUS:
        raise argparse.ArgumentTypeError(f"{text!r}: unknown GPU; expected one of {', '.join(GPUS)}")
    return name, float(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=4096, help="images per optimizer step over all GPUs")
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=["a100-80", "h100"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument(
        "--rate",
        type=rate,
        action="append",
        default=[],
        help="NAME=X: BYOL runs at X images/s on this GPU (default: its bound)",
    )
    parser.add_argument(
        "--latency-us",
        type=float,
        nargs=2,
        default=LATENCY_US,
        help="latency of a collective within a node and between nodes",
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    counts, rates = counts_of(args.backbone, args.size), dict(args.rate)
    facts = environment.describe()
    rows = []
    for name in args.gpu:
        gpu = GPUS[name]
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
                source = (
                    f"3/8 of {gpu.supervised_images_per_s:g} ({gpu.supervised_source})"
                    if name not in rates
                    else "--rate"
                )
                rows.append(row | {"rate_source": source} | {k: facts[k] for k in ("fastbyol", "torch", "timm")})
    results_csv.write(args.out, rows)


if __name__ == "__main__":
    main()
