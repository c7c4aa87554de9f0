"""Measure what runs of known outcome show without labels: the basis of docs/quality.md's rules.

    python benchmarks/quality_runs.py --runs /tmp/quality-runs

Trains the demo's network for 6 epochs on the demo corpus, once per row, with an evaluation after
every epoch. Runs that are in the folder already are not repeated. Writes
benchmarks/results/quality.csv.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import results_csv
from variants import ROOT, prepare

from fastbyol.config import Config
from fastbyol.runtime.run_log import read_metrics
from fastbyol.tools.verdict import judge, measured

RESULT = results_csv.FOLDER / "quality.csv"
FEATURES, CLASSES = 256, 18  # of the demo's network and corpus
COMMON = "--config configs/demo.yaml --optim.epochs 6 --knn.every_epochs 1 --checkpoint.every_epochs 6 --seed 0"
RUNS = {
    "byol": ("BYOL", ""),
    "mse": ("mean squared error", "--model.loss mse"),
    "noise": ("feature noise", "--model.feature_noise 0.5 --data.augmentation none"),
    "group": ("GroupNorm", "--model.norm group"),
    "layer": ("LayerNorm", "--model.norm layer"),
    "tau0lr20": ("no moving average, learning rate 5x", "--optim.tau_base 0 --optim.base_lr 20"),
    "lr40layer": ("LayerNorm, learning rate 10x", "--model.norm layer --optim.base_lr 40"),
}
"""Name of the run -> title, settings."""


def row_of(run: Path, title: str, settings: str) -> dict[str, str]:
    """Return a run's row."""
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    metrics = read_metrics(run)
    found = measured(metrics, config, features=FEATURES)
    machine = json.loads((run / "environment.json").read_text())
    return {
        "run": title,
        "command": shlex.join(["fastbyol", "train", *shlex.split(f"{COMMON} --data.root data/photos {settings}")]),
        "spread": f"{found.spread:.3f}",
        "rank_first": f"{found.ranks[0]:.2f}",
        "rank_highest": f"{max(found.ranks):.2f}",
        "rank_last": f"{found.ranks[-1]:.2f}",
        "rank_limit": str(found.rank_limit),
        "loss": f"{found.loss:.3f}",
        "knn_top1": f"{found.knn:.4f}",
        "verdict": judge(found, config, classes=CLASSES).outcome,
        **{key: machine[key] for key in ("fastbyol", "cpu", "python", "torch", "timm")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="folder of the corpora")
    options = parser.parse_args()
    root = prepare("photos", options.data)
    rows = []
    for name, (title, settings) in RUNS.items():
        run = options.runs / name
        if not (run / "summary.json").exists():
            words = shlex.split(f"{COMMON} {settings}")
            command = [sys.executable, "-m", "fastbyol", "train", *words, "--data.root", str(root)]
            subprocess.run([*command, "--runs", str(options.runs), "--name", name], check=True, cwd=ROOT)
        rows.append(row_of(run, title, settings))
    results_csv.write(RESULT, rows)


if __name__ == "__main__":
    main()
