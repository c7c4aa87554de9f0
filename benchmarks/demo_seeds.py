"""Run the demo with three seeds, to measure how much its results depend on the seed.

    python benchmarks/demo_seeds.py [--seeds 0 1 2]

For each seed, runs `fastbyol train --config configs/demo.yaml --seed S` and both evaluations on the
same corpus. Writes one row per seed to benchmarks/results/demo_seeds.csv. A seed takes about 3
minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results_csv

from fastbyol.runtime import environment

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "demo_seeds.csv"


def fastbyol(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "fastbyol", *arguments], check=True, cwd=ROOT)


def measure(seed: int, root: Path, runs: Path) -> dict[str, str]:
    run = runs / f"seed{seed}"
    began = time.perf_counter()
    settings = ["--config", "configs/demo.yaml", "--seed", str(seed), "--data.root", str(root)]
    fastbyol("train", *settings, "--runs", str(runs), "--name", run.name)
    row = {"seed": str(seed)}
    for protocol in ("knn", "linear"):
        out = run / f"eval_{protocol}.json"
        fastbyol("eval", protocol, "--run", str(run), "--out", str(out))
        result = json.loads(out.read_text())
        for name, values in result["rows"].items():
            row[f"{protocol}_top1_{name.replace(' ', '_')}"] = f"{values['top1']:.4f}"
    row["total_s"] = f"{time.perf_counter() - began:.1f}"
    summary = json.loads((run / "summary.json").read_text())
    row |= {"train_s": f"{summary['seconds']:.1f}", "images_per_s": f"{summary['images_per_s']:.0f}"}
    row |= {"train_images": str(result["train_images"]), "val_images": str(result["val_images"])}
    facts = environment.describe()
    return row | {key: facts[key] for key in ("fastbyol", "cpu", "python", "torch", "numba")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "photos"
        fastbyol("prepare", "photos", "--out", str(root), "--images", "3600", "--size", "80", "--seed", "0")
        rows = [measure(seed, root, Path(temporary) / "runs") for seed in seeds]
    results_csv.write(RESULT, rows)


if __name__ == "__main__":
    main()
