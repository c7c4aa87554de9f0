"""Measure how many images data.dct_scaling decodes at a reduced size, and how their views change.

    python benchmarks/dct_scaling.py

Loads the same images of bench_loader.py's corpus with and without the option, and compares the
views before normalization, in units of 1/255. Writes benchmarks/results/dct_scaling.csv.
"""

import subprocess
import sys
from pathlib import Path

import results_csv
import torch

from fastbyol.config import DataConfig
from fastbyol.data import build_loader, open_split
from fastbyol.kernels.augment_params import IMAGENET_STD
from fastbyol.runtime import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "dct_scaling.csv"
CORPUS = ROOT / "data" / "photos-500px"
STEPS, BATCH = 16, 64


def compare(size: int) -> dict[str, str]:
    folder = open_split(CORPUS, "train")
    plain, scaled = (
        build_loader(
            DataConfig(root=str(CORPUS), batch_size=BATCH, image_size_px=size, dct_scaling=scaling),
            folder,
            seed=0,
            device=torch.device("cpu"),
            dtype=torch.float32,
        ).batches(0, STEPS)
        for scaling in (False, True)
    )
    std = torch.tensor(IMAGENET_STD)[:, None, None] * 255
    differences = []
    for a, b in zip(plain, scaled, strict=True):
        both = torch.stack([((x - y).abs() * std).mean((1, 2, 3)) for x, y in zip(a.views, b.views, strict=True)])
        differences.append(both.T)
    difference = torch.cat(differences)  # (images, views)
    changed = difference[(difference > 0).any(1)]
    return {
        "size_px": str(size),
        "images": str(len(difference)),
        "share_reduced": f"{len(changed) / len(difference):.3f}",
        "mean_difference_255ths": f"{changed.mean().item():.2f}" if len(changed) else "",
        "p95_difference_255ths": f"{changed.flatten().quantile(0.95).item():.2f}" if len(changed) else "",
    }


def main() -> None:
    if not CORPUS.exists():
        command = ["prepare", "photos", "--out", str(CORPUS), "--images", "5000"]
        subprocess.run([sys.executable, "-m", "fastbyol", *command], check=True)
    facts = environment.describe()
    rows = [compare(size) | {key: facts[key] for key in ("fastbyol", "cpu", "simplejpeg")} for size in (96, 128, 224)]
    results_csv.write(RESULT, rows)


if __name__ == "__main__":
    main()
