"""What GPUs would have to send each other: an estimate on paper, from the model's own tensors and published link rates.

    python benchmarks/exchange.py [--batch 4096] [--gpus 1 8 64 512] [--rate a100-80=1100]

Nothing here is measured; fastbyol/tools/communication.py has the formulas and the sources. What a GPU computes per second is by default the bound of BYOL R50, 3/8
of a published supervised rate: faster computing than anybody's, so that less can hide behind it.

Writes benchmarks/results/exchange.csv, every row marked as an estimate.
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
    """Of the pair with that backbone."""
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
    """A row: bytes and times of one optimizer step, per GPU.

    Args:
        gpus: n, in one ring.
        batch: images of a step, over all GPUs.
        images_per_s: what one GPU computes.
        latency_us: of a collective within a node and beyond it.
    """
    step_ms = 1e3 * batch / gpus / images_per_s
    backward_ms = step_ms * BACKWARD_SHARE
    sent = estimate_exchange(
        counts, gpu, gpus=gpus, backward_ms=backward_ms, gradient_dtype=gradient_dtype, latency_us=latency_us
    )
    several = sent.link is not None
    return {
        "kind": "estimate",
        "gpus": gpus,
        "images_per_gpu": batch // gpus,
        "gradient_dtype": gradient_dtype,
        "gradient_bytes": GRADIENT_BYTES[gradient_dtype] * counts.gradient_values if several else 0,
        "gradient_bytes_sent": sent.gradient_bytes_sent,
        "syncbn_bytes": counts.syncbn_bytes if several else 0,
        "syncbn_bytes_sent": sent.syncbn_bytes_sent,
        "syncbn_collectives": counts.collectives if several else 0,
        "link": sent.link.name if several else "",
        "link_gb_per_s_one_way": f"{sent.link.gb_per_s:g}" if several else "",
        "gradient_link_ms": f"{sent.gradient_ms:.3f}",
        "syncbn_link_ms": f"{sent.syncbn_ms:.4f}",
        "assumed_latency_us": f"{latency_us[gpus > GPUS_PER_NODE]:g}" if several else "",
        "syncbn_latency_ms": f"{sent.latency_ms:.2f}",
        "images_per_s_per_gpu": f"{images_per_s:.0f}",
        "step_ms": f"{step_ms:.2f}",
        "backward_ms": f"{backward_ms:.2f}",
        "gradient_share_hidden": f"{min(1.0, backward_ms / sent.gradient_ms):.3f}" if several else "",
        "exposed_ms": f"{sent.exposed_ms:.2f}",
        "link_source": sent.link.source if several else "",
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
    parser.add_argument("--batch", type=int, default=4096, help="images of an optimizer step over all GPUs")
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=["a100-80", "h100"])
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
