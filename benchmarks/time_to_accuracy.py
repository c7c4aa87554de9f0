"""Compare wall time and accuracy of training runs on Fashion-MNIST: fastbyol against lightly's
BYOL.

    make bench-accuracy                                    # in the environment with all peers
    python benchmarks/time_to_accuracy.py --seeds 0 --epochs 2 --out /tmp/accuracy.csv

Both train the network of configs/fashion_mnist.yaml (the same timm module, heads of equal width) on
the same 10,000 PNG files, for equal epochs and batch sizes, from weights drawn from the same seed.
Each run has its own process, and contenders are interleaved. Timing starts with the first request
for a batch (start of the loader included) and ends with the last step; imports, model construction
and first-time compilation of kernels are excluded. Afterwards, the same weighted kNN classifies the
first 2,000 validation images from the features of each backbone in eval mode, float32.

Contenders:
    fastbyol    data/native.py and step.py as in `fastbyol train`: LARS, the config's schedules,
                bfloat16 if the CPU supports it
    lightly     its BYOLTransform for this image size in a DataLoader with one worker process per
                core, its heads, loss and update_momentum; SGD with momentum and cosine decay,
                target decay from 0.99 to 1 on a cosine schedule, float32, as in the example of its
                documentation

`--base_lrs` sets the learning rates per 256 images. The defaults are the best of the sweep in
LOG.md, which has equally many rates for both. Writes benchmarks/results/accuracy.csv.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import results_csv
import torch
from bench_step import LightlyBYOL
from torch import nn

from fastbyol.build import build_backbone, build_training
from fastbyol.cli import train_config
from fastbyol.config import Config
from fastbyol.data import find_images, open_split
from fastbyol.evaluation.context import EvalContext
from fastbyol.evaluation.features import extract_features
from fastbyol.evaluation.knn import knn_accuracy
from fastbyol.layers import set_num_views
from fastbyol.runtime import environment
from fastbyol.runtime.distributed import World
from fastbyol.schedules import target_decay
from fastbyol.tools.corpora import prepare_fashion_mnist

ROOT = Path(__file__).resolve().parent.parent
RESULT = results_csv.FOLDER / "accuracy.csv"
CPU = torch.device("cpu")
IMAGES, VAL_IMAGES = 10_000, 2_000
BASE_LRS = {"fastbyol": 4.0, "lightly": 0.6}
Trained = tuple[nn.Module, float]  # backbone, seconds


def run_config(root: Path, seed: int, epochs: int, base_lr: float) -> Config:
    """Return configs/fashion_mnist.yaml with the given values."""
    options = ["--config", str(ROOT / "configs" / "fashion_mnist.yaml"), "--data.root", str(root), "--seed", str(seed)]
    return train_config([*options, "--optim.epochs", str(epochs), "--optim.base_lr", str(base_lr)])


def fastbyol(config: Config) -> Trained:
    training = build_training(config, World(), CPU, find_images(config.data, "train"))
    step = training.step
    began = time.perf_counter()
    for k, batch in enumerate(training.loader.batches(0, step.total_steps)):
        step(k, batch)
    seconds = time.perf_counter() - began
    return set_num_views(training.model.online.backbone, 1), seconds


def lightly(config: Config) -> Trained:
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    from torchvision.datasets import ImageFolder

    torch.manual_seed(config.seed)
    size, batch_size = config.data.image_size_px, config.data.batch_size
    backbone, features = build_backbone(config.model, size)
    model = LightlyBYOL(backbone, features, config.model.hidden_dim, config.model.projection_dim).train()
    transform = BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))
    loader = torch.utils.data.DataLoader(
        ImageFolder(Path(config.data.root) / "train", transform),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, config.optim.base_lr * batch_size / 256, momentum=0.9)
    steps = config.optim.epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    k, began = 0, time.perf_counter()
    for _ in range(config.optim.epochs):
        for (view1, view2), _ in loader:
            decay = target_decay(k, base=config.optim.tau_base, total_steps=steps)
            loss = model.loss(view1, view2, decay)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            k += 1
    return model.backbone, time.perf_counter() - began


CONTENDERS: dict[str, Callable[[Config], Trained]] = {"fastbyol": fastbyol, "lightly": lightly}


def measure(contender: str, config: Config) -> None:
    """Train and classify in this process, and print one line of JSON."""
    backbone, seconds = CONTENDERS[contender](config)
    context = EvalContext(size=config.data.image_size_px, device=CPU, dtype=torch.float32, threads=0)
    splits = (open_split(config.data.root, split) for split in ("train", "val"))
    train, val = (extract_features(backbone, split, context, None) for split in splits)
    accuracy = knn_accuracy(train, val, k=config.knn.k, temperature=config.knn.temperature)
    print(json.dumps({"seconds": seconds, **accuracy}), flush=True)
    os._exit(0)  # do not wait for workers


def run(contender: str, root: Path, seed: int, epochs: int, base_lr: float) -> dict[str, float]:
    """Call `measure` in a new process and return its JSON."""
    command = [sys.executable, __file__, "--measure", contender, "--root", str(root), "--seeds", str(seed)]
    command += ["--epochs", str(epochs), "--base_lrs", str(base_lr), str(base_lr)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        sys.exit(f"{contender} failed with seed {seed}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print seconds and kNN accuracy of both, and the ratios of times for equal seeds."""
    by = {name: {r["seed"]: r for r in rows if r["contender"] == name} for name in CONTENDERS}
    for name, own in by.items():
        if not own:
            continue
        seconds, knn = ([float(r[key]) for r in own.values()] for key in ("seconds", "knn_top1"))
        print(f"{name:<10} {median(seconds):7.1f} s  kNN {' '.join(f'{100 * v:.1f}' for v in knn)}")
    both = [seed for seed in by["fastbyol"] if seed in by["lightly"]]
    if both:
        ratios = [float(by["lightly"][s]["seconds"]) / float(by["fastbyol"][s]["seconds"]) for s in both]
        print(f"lightly / fastbyol: {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--base_lrs", type=float, nargs=2, default=list(BASE_LRS.values()), metavar=tuple(CONTENDERS))
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--root", type=Path, help="the corpus (default: generated)")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    base_lrs = dict(zip(CONTENDERS, args.base_lrs, strict=True))
    if args.measure:
        measure(args.measure, run_config(args.root, args.seeds[0], args.epochs, base_lrs[args.measure]))
    with tempfile.TemporaryDirectory() as temporary:
        root = args.root or Path(temporary) / "fashion-mnist"
        if args.root is None:
            print(prepare_fashion_mnist(root, images=IMAGES, val_images=VAL_IMAGES))
        facts = {key: environment.describe()[key] for key in ("fastbyol", "cpu", "python", "torch", "timm")}
        facts["lightly"] = environment.installed("lightly") or ""
        rows: list[dict[str, Any]] = []
        for seed in args.seeds:
            for name in args.only:
                found = run(name, root, seed, args.epochs, base_lrs[name])
                row = {"contender": name, "seed": seed, "epochs": args.epochs, "base_lr": base_lrs[name]}
                row |= {"seconds": f"{found['seconds']:.2f}", "knn_top1": f"{found['top1']:.4f}"}
                rows.append(row | {"cores": os.cpu_count(), **facts})
                print(f"seed {seed}  {name:<10} {found['seconds']:7.1f} s  kNN top-1 {found['top1']:.1%}", flush=True)
                results_csv.write(args.out, rows)
    print_summary(rows)


if __name__ == "__main__":
    main()
