"""Bit-identical losses before and after a refactoring: trains small runs with two source trees and
compares them.

    git worktree add /tmp/before COMMIT
    python benchmarks/compare_losses.py --before /tmp/before --after .

Runs, on the CPU: the demo's config, a run that is stopped and resumed, micro-batches with another
optimizer, a variant with masks, and two ranks. For each, the losses of metrics.jsonl and the
tensors of the last checkpoint must be equal bit by bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SMALL = [
    *("--model.backbone", "resnet18", "--model.width", "0.25", "--model.hidden_dim", "64"),
    *("--model.projection_dim", "32"),
    *("--data.image_size_px", "48", "--data.batch_size", "32", "--optim.base_lr", "2.0", "--optim.warmup_epochs", "1"),
    *("--log.log_every_steps", "1", "--log.trackers", "[]", "--data.threads", "2"),
]
EPOCHS = ["--optim.epochs", "3"]
RUNS = {  # name -> (ranks, options of each start)
    "demo": (1, [["--config", "configs/demo.yaml", "--log.log_every_steps", "1"]]),
    "plain": (1, [[*SMALL, *EPOCHS]]),
    "resumed": (1, [[*SMALL, "--optim.epochs", "2"], [*SMALL, *EPOCHS, "--resume", "auto"]]),
    "micro-batches, SGD": (1, [[*SMALL, *EPOCHS, "--step.micro_batches", "2", "--optim.name", "sgd"]]),
    "masks, clipped": (1, [[*SMALL, *EPOCHS, "--model.mask_ratio", "0.3", "--optim.clip_grad_norm", "1"]]),
    "two ranks": (2, [[*SMALL, *EPOCHS]]),
}


def train(tree: Path, root: Path, runs: Path, name: str) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Train a run with a source tree; return its losses by step and the tensors of its last
    checkpoint.
    """
    ranks, starts = RUNS[name]
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    folder = name.replace(" ", "_").replace(",", "")
    for options in starts:
        common = ["--data.root", str(root), "--runs", str(runs), "--name", folder, "--device", "cpu"]
        command = [*start, "fastbyol", "train", *options, *common]
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (runs / folder / "metrics.jsonl").read_text().splitlines()]
    newest = sorted((runs / folder / "checkpoints").glob("step_*.pt"))[-1]
    state = torch.load(newest, weights_only=True)
    tensors = {f"model.{key}": value for key, value in state["model"].items()}
    tensors |= {f"{name}.{key}": v for name, values in state["optimizer"].items() for key, v in values.items()}
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}, tensors


def compare(before: Path, after: Path, root: Path, names: list[str]) -> bool:
    """Print one line per run; return True if all are equal."""
    equal = True
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            old, new = (train(tree, root, Path(folder) / str(k), name) for k, tree in enumerate((before, after)))
        different = [step for step in old[0] if old[0][step] != new[0].get(step)]
        tensors = [key for key in old[1] if key not in new[1] or not torch.equal(old[1][key], new[1][key])]
        same = not different and not tensors and len(old[0]) == len(new[0]) and len(old[1]) == len(new[1])
        detail = (
            "" if same else f"; first different step {different[:1]}, {len(tensors)} different tensors {tensors[:2]}"
        )
        print(
            f"{name:<20} {'identical' if same else 'DIFFERENT'}: {len(old[0])} losses, {len(old[1])} tensors{detail}",
            flush=True,
        )
        equal &= same
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="source tree before the change")
    parser.add_argument("--after", type=Path, default=Path(), help="source tree after the change")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--images", type=int, default=720, help="training images; 3600 is the corpus of `make demo`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        prepare = [sys.executable, "-m", "fastbyol", "prepare", "photos", "--out", str(root)]
        prepare += ["--images", str(options.images), "--size", "80"]
        environment = os.environ | {"PYTHONPATH": str(options.before.resolve())}
        subprocess.run(prepare, env=environment, check=True, stdout=subprocess.DEVNULL)
        return 0 if compare(options.before.resolve(), options.after.resolve(), root, options.runs) else 1


if __name__ == "__main__":
    sys.exit(main())
