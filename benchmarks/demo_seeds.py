"""The demo with three seeds: is the one that ships a lucky one, and do its features carry over to dense tasks?

    python benchmarks/demo_seeds.py [--seeds 0 1 2]

Runs `fastbyol train --config configs/demo.yaml --seed S` for each seed, on one corpus, then the evaluations: kNN and linear probe on that
corpus, segmentation and detection on one of `fastbyol prepare shapes`. Writes one row per seed to benchmarks/results/demo_seeds.csv. Takes
about 8 minutes a seed on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results_csv

from fastbyol import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "demo_seeds.csv"


METRICS = {"knn": "top1", "linear": "top1", "segmentation": "miou", "detection": "map"}
DENSE = ("segmentation", "detection")


def fastbyol(*arguments: str) -> float:
    """Runs it in a process of its own; seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastbyol", *arguments], check=True, cwd=ROOT)
    return time.perf_counter() - began


def measure(seed: int, photos: Path, shapes: Path, runs: Path) -> dict[str, str]:
    run = runs / f"seed{seed}"
    settings = ["--config", "configs/demo.yaml", "--seed", str(seed), "--data.root", str(photos)]
    seconds = {"train": fastbyol("train", *settings, "--runs", str(runs), "--name", run.name)}
    row = {"seed": str(seed)}
    for protocol, metric in METRICS.items():
        options = ["--root", str(shapes), "--seed", str(seed)] if protocol in DENSE else []
        seconds[protocol] = fastbyol("eval", protocol, "--run", str(run), *options)
        result = json.loads((run / f"eval_{protocol}.json").read_text())
        for name, values in result["rows"].items():
            row[f"{protocol}_{metric}_{name.replace(' ', '_')}"] = f"{values[metric]:.4f}"
        row[f"{protocol}_images"] = f"{result['train_images']}+{result['val_images']}"
    row |= {f"{name}_s": f"{value:.1f}" for name, value in seconds.items()}
    facts = environment.describe()
    return row | {key: facts[key] for key in ("fastbyol", "cpu", "python", "torch", "torchvision", "numba")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as temporary:
        photos, shapes, runs = (Path(temporary) / name for name in ("photos", "shapes", "runs"))
        fastbyol("prepare", "photos", "--out", str(photos), "--images", "3600", "--size", "80", "--seed", "0")
        fastbyol("prepare", "shapes", "--out", str(shapes))
        rows = [measure(seed, photos, shapes, runs) for seed in seeds]
    results_csv.write(RESULT, rows)


if __name__ == "__main__":
    main()
