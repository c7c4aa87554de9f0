"""Measure the accuracy of every variant in docs/variants.md on two corpora, with three seeds.

    python benchmarks/variants.py [--corpora photos fashion-mnist] [--seeds 0 1 2] [--only LayerNorm
    ...]

Each row of benchmarks/results/variants.csv contains its command; `fastbyol eval knn` and `eval
linear` follow it. Existing rows are kept, so an interrupted run continues; `--fresh` measures all
again. Accuracy does not depend on the load of the machine. The column `seconds` does, and is not a
benchmark.
"""

import argparse
import csv
import itertools
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_csv
import torch

from fastbyol import cli
from fastbyol.build import build_model
from fastbyol.config import Config
from fastbyol.evaluation.features import open_splits
from fastbyol.evaluation.finetune import finetune
from fastbyol.evaluation.options import KnnEval, LinearEval
from fastbyol.evaluation.run import TASKS, UNTRAINED_ROW, eval_context
from fastbyol.layers import set_num_views
from fastbyol.runtime import environment
from fastbyol.weights.files import save_backbone
from fastbyol.weights.load import load_backbone

ROOT = Path(__file__).resolve().parent.parent
RESULT = results_csv.FOLDER / "variants.csv"

CORPORA = {
    "photos": (["configs/demo.yaml"], ["photos", "--images", "3600", "--size", "80", "--seed", "0"], 6),
    "fashion-mnist": (
        ["configs/fashion_mnist.yaml"],
        ["fashion-mnist", "--images", "10000", "--val_images", "2000"],
        2,
    ),
}  # config, arguments of `prepare`, epochs

SUPERVISED = "supervised weights only"
START = "supervised start, linear heads, MSE, Adam 1e-4, batch 32"
VARIANTS: dict[str, str] = {
    "BYOL": "",
    "per-rank BatchNorm, 2 ranks": "--distributed.sync_bn_ranks 1",
    "LayerNorm": "--model.norm layer",
    "GroupNorm": "--model.norm group",
    "GroupNorm, weight standardization": "--model.norm group --model.weight_standardization true",
    "Euclidean distance": "--model.loss euclidean",
    "mean squared error": "--model.loss mse",
    "hinge loss": "--model.loss hinge",
    "feature noise": "--model.feature_noise 0.5 --data.augmentation none",
    "linear heads": "--model.heads linear",
    "SimSiam (no EMA target)": "--model.target online",
    "contrastive term, beta 0.5": "--model.contrastive_weight 0.5",
    "InfoNCE, beta 1": "--model.contrastive_weight 1",
    "masked patches, 30 %": "--model.mask_ratio 0.3 --model.mask_patch_px 7",
    START: "--init {weights} --model.heads linear --model.loss mse --optim.name adam --optim.base_lr 8e-4 "
    "--optim.schedule constant --optim.warmup_epochs 0 --optim.weight_decay 0 --data.batch_size 32 --probe.enabled true",
}

UNTRAINED = {"untrained network": "BYOL"} | {
    f"untrained network, {name}": name for name in ("LayerNorm", "GroupNorm", "GroupNorm, weight standardization")
}  # title -> variant that starts from it


def prepare(corpus: str, data: Path) -> Path:
    """Return the folder of a corpus, which is generated if missing."""
    root = data / corpus
    if not root.exists():
        kind, *rest = CORPORA[corpus][1]
        _run(["prepare", kind, "--out", str(root), *rest])
    return root


def arguments(corpus: str, variant: str, seed: int, root: str, weights: str) -> list[str]:
    """Return the arguments of `fastbyol train`."""
    (config,), _, epochs = CORPORA[corpus]
    common = f"--config {config} --data.root {root} --optim.epochs {epochs} --knn.every_epochs 0 --seed {seed}"
    return shlex.split(f"{common} {VARIANTS[variant].format(weights=weights)}")


def measure(corpus: str, variant: str, seed: int, root: Path, runs: Path, weights: Path) -> dict[str, str]:
    """Train and evaluate a variant, and return its row."""
    run = run_of(corpus, variant, seed, runs)
    given = [
        "train",
        *arguments(corpus, variant, seed, str(root), str(weights)),
        "--runs",
        str(runs),
        "--name",
        run.name,
    ]
    began = time.perf_counter()
    shown = shlex.join(["fastbyol", "train", *arguments(corpus, variant, seed, f"data/{corpus}", "other.safetensors")])
    if "2 ranks" in variant:
        ranks = ["torchrun", "--nproc-per-node", "2", "-m"]
        subprocess.run(
            [str(Path(sys.executable).with_name("torchrun")), *ranks[1:], "fastbyol", *given], check=True, cwd=ROOT
        )
        shown = shlex.join(ranks) + " " + shown
    else:
        _run(given)
    row = {"command": shown, "seconds": f"{time.perf_counter() - began:.0f}"}
    for protocol in ("knn", "linear"):
        result = _evaluated(protocol, run, "--baselines", "false")
        row[f"{protocol}_top1"] = f"{result['rows']['BYOL']['top1']:.4f}"
    return row


def _evaluated(protocol: str, run: Path, *options: str) -> dict[str, Any]:
    out = run / f"eval_{protocol}.json"
    _run(["eval", protocol, "--run", str(run), "--out", str(out), *options])
    return json.loads(out.read_text())


def untrained(corpus: str, title: str, seed: int, runs: Path) -> dict[str, str]:
    """Return the row of the untrained network that both evaluations report for a variant's run."""
    run = run_of(corpus, UNTRAINED[title], seed, runs)
    row = {"command": f"fastbyol eval knn --run RUN (RUN of row {UNTRAINED[title]!r})", "seconds": "0"}
    for protocol in ("knn", "linear"):
        result = _evaluated(protocol, run)
        row[f"{protocol}_top1"] = f"{result['rows'][UNTRAINED_ROW]['top1']:.4f}"
    return row


def byol_config(corpus: str, root: Path, seed: int) -> Config:
    return cli.train_config(arguments(corpus, "BYOL", seed, str(root), ""))


def supervised_weights(corpus: str, root: Path, out: Path, seed: int, epochs: int) -> None:
    """Train the corpus's network on its labels from random weights, and save it for --init."""
    config = byol_config(corpus, root, seed)
    options = KnnEval(run="x", device="cpu")
    frame, splits = eval_context(config, options), open_splits(options, config)
    backbone = _backbone(config)
    torch.manual_seed(seed)
    network = finetune(backbone, splits.train, frame, base_lr=0.1, epochs=epochs, batch_size=64, seed=seed)
    save_backbone(out, network[0], config.model, frame.size, key="weights")


def evaluate_weights(corpus: str, root: Path, weights: Path, seed: int) -> dict[str, str]:
    """Return the row of the supervised weights before BYOL training."""
    config = byol_config(corpus, root, seed)
    backbone = _backbone(config)
    load_backbone(str(weights), backbone, config.model.backbone)
    row = {"command": "initial weights of the next row, without BYOL training", "seconds": "0"}
    for protocol, kind in (("knn", KnnEval), ("linear", LinearEval)):
        options = kind(run="x", device="cpu")
        data, frame = open_splits(options, config), eval_context(config, options)
        found = TASKS[protocol].measure(backbone, data, options, frame)
        row[f"{protocol}_top1"] = f"{found['top1']:.4f}"
    return row


def _backbone(config: Config) -> torch.nn.Module:
    """Build a backbone with random weights, for batches of one view."""
    backbone = build_model(config.model, config.data.image_size_px, config.seed).online.backbone
    return set_num_views(backbone, 1).to(memory_format=torch.channels_last)


def run_of(corpus: str, variant: str, seed: int, runs: Path) -> Path:
    """Return the folder of a row's run."""
    return runs / f"{corpus}-{list(VARIANTS).index(variant)}-{seed}"


def _run(given: list[str]) -> None:
    if code := cli.main(given):
        sys.exit(f"fastbyol {shlex.join(given)}: exit code {code}")


def default_rows() -> list[str]:
    """Return the names of all rows in the order of the result file."""
    starts = {variant: title for title, variant in UNTRAINED.items()}
    variants = [variant for variant in VARIANTS if variant != START]
    pairs = ((name, starts[name]) if name in starts else (name,) for name in variants)
    return [*itertools.chain.from_iterable(pairs), SUPERVISED, START]


def measure_row(corpus: str, name: str, seed: int, roots: dict[str, Path], work: Path) -> dict[str, str]:
    """Measure a variant, an untrained network or the supervised weights."""
    if name in UNTRAINED:
        return untrained(corpus, name, seed, work / "runs")
    other = next(key for key in CORPORA if key != corpus)
    weights = work / f"{other}-as-{corpus}-{seed}.safetensors"
    if name in (SUPERVISED, START) and not weights.exists():
        # The other corpus's images, with this corpus's network and image size.
        supervised_weights(corpus, roots[other], weights, seed, epochs=CORPORA[other][2])
    if name == SUPERVISED:
        return evaluate_weights(corpus, roots[corpus], weights, seed)
    return measure(corpus, name, seed, roots[corpus], work / "runs", weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", nargs="+", choices=list(CORPORA), default=list(CORPORA))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *UNTRAINED, SUPERVISED])
    parser.add_argument("--work", type=Path, help="folder for corpora and runs (default: temporary)")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--fresh", action="store_true", help="measure existing rows again")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fastbyol-variants-"))
    (work / "data").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    if args.out.exists() and not args.fresh:
        with open(args.out, newline="") as file:
            rows = list(csv.DictReader(file))
    done = {(row["corpus"], row["variant"], int(row["seed"])) for row in rows}
    facts = {key: environment.describe()[key] for key in ("fastbyol", "cpu", "python", "torch", "timm")}
    roots = {corpus: prepare(corpus, work / "data") for corpus in CORPORA}
    for seed in args.seeds:
        for corpus in args.corpora:
            for name in args.only or default_rows():
                if (corpus, name, seed) in done:
                    continue
                row = measure_row(corpus, name, seed, roots, work)
                rows.append({"corpus": corpus, "variant": name, "seed": seed, **row, **facts})
                results_csv.write(args.out, rows)
                print(f"{corpus}  {name}  seed {seed}: kNN {row['knn_top1']}, linear {row['linear_top1']}", flush=True)


if __name__ == "__main__":
    main()
