"""Images per second of feature extraction, as `fastbyol eval` and `fastbyol embed` do it.

    python benchmarks/bench_features.py                          # on a GPU: ResNet-50, 224 px
    python benchmarks/bench_features.py --device cpu --backbone resnet18 --size 96 --images 2000

Interleaved rounds in one process, after an untimed pass each:

    crops native, crops dali      center crops on the device, without a network
    network, network compiled     forward passes over one batch that is there already
    features DECODER NETWORK      extract_features; the bound is the slower one of its two parts

DALI is left out on the CPU or where it is not installed. The corpus is that of bench_loader.py; its
images are repeated up to --images. Writes benchmarks/results/features_cpu.csv or features_cuda.csv.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_loader
import numpy as np
import results_csv
import torch

from fastbyol.build import build_model
from fastbyol.config import ModelConfig
from fastbyol.data import open_split
from fastbyol.data.crops import CENTER_FRACTION, center_crops
from fastbyol.evaluation import features
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.features import BATCH, extract_features, inference_function
from fastbyol.layers import set_num_views
from fastbyol.runtime.device import choose_device
from fastbyol.runtime.environment import describe, has_module


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options.add_argument("--backbone", default="resnet50")
    options.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    options.add_argument("--images", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path)
    return options


def main() -> None:
    options = parser().parse_args()
    device = choose_device(options.device, 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench_loader.prepare_corpus()
    images = open_split(bench_loader.CORPUS, "train")
    images = images.subset(np.arange(options.images) % len(images))
    backbone = build_model(ModelConfig(backbone=options.backbone), options.size, 0).online.backbone
    backbone = set_num_views(backbone, 1).to(device, memory_format=torch.channels_last)
    features.COMPILE_IMAGES = 1
    decoders = ["native", "dali"] if device.type == "cuda" and has_module("nvidia.dali") else ["native"]
    batch = torch.randn(BATCH, options.size, options.size, 3, device=device, dtype=dtype).permute(0, 3, 1, 2)

    def context(decoder: str, *, compiles: bool) -> EvalContext:
        shared = {"size": options.size, "device": device, "dtype": dtype, "threads": 0}
        return EvalContext(decoder=decoder, compiles=compiles, **shared)

    def crops(decoder: str) -> int:
        shared = {"size": options.size, "fraction": CENTER_FRACTION, "batch_size": BATCH, "threads": 0, "bad": {}}
        return sum(len(x) for x, _ in center_crops(images, decoder=decoder, dtype=dtype, device=device, **shared))

    def network(*, compiles: bool) -> int:
        forward = inference_function(backbone, context("native", compiles=compiles), images=1, batch_size=BATCH)
        for _ in range(-(-options.images // BATCH)):
            forward(batch)
        return -(-options.images // BATCH) * BATCH

    def extracted(decoder: str, *, compiles: bool) -> int:
        return len(extract_features(backbone, images, context(decoder, compiles=compiles), None).unit)

    contenders: dict[str, Callable[[], int]] = {f"crops {decoder}": lambda d=decoder: crops(d) for decoder in decoders}
    for name, compiles in (("", False), (" compiled", True)):
        contenders[f"network{name}"] = lambda c=compiles: network(compiles=c)
        for decoder in decoders:
            contenders[f"features {decoder}{name}"] = lambda d=decoder, c=compiles: extracted(d, compiles=c)
    facts = describe()
    machine = {key: facts.get(key, "") for key in ("fastbyol", "cpu", "gpu", "python", "torch", "nvidia-dali-cuda130")}
    work = {"backbone": options.backbone, "size_px": options.size, "images": options.images}
    rows: list[dict[str, Any]] = []
    for round_ in range(-1, options.rounds):  # round -1 compiles and fills the page cache
        for name, run in contenders.items():
            began = time.perf_counter()
            count = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rate = f"{count / (time.perf_counter() - began):.0f}"
            print(f"{round_:>3}  {name:<26} {rate:>7} images/s", flush=True)
            if round_ >= 0:
                rows.append({"round": round_, "contender": name, **work, "images_per_s": rate, **machine})
                results_csv.write(options.out or results_csv.FOLDER / f"features_{device.type}.csv", rows, quiet=True)


if __name__ == "__main__":
    main()
