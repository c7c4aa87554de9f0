"""Time, peak memory and results of all evaluation protocols, with two source trees.

    git worktree add /tmp/before COMMIT
    python benchmarks/compare_evaluations.py --before /tmp/before --root data/cifar10 --run RUN

Runs each protocol as a command of its own, in the order before, after, before, after. The dense
protocols run on the set of benchmarks/shapes.py. Writes benchmarks/results/evaluation_trees.csv
after every measurement; rows of protocols that are not chosen are kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_csv
from shapes import prepare_shapes

from fastbyol.runtime import environment

RESULT = Path(__file__).parent / "results" / "evaluation_trees.csv"
PROTOCOLS = {
    "knn": ["knn"],
    "linear": ["linear"],
    "fewshot": ["fewshot"],
    "robustness, without baselines": ["robustness", "--baselines", "false"],
    "linear, augmented, 1 epoch": ["linear", "--features", "augmented", "--epochs", "1"],
    "finetune, 1 epoch": ["finetune", "--epochs", "1"],
}
DENSE = {"segmentation": ["segmentation"], "detection": ["detection"]}
SHAPES = {"images": 300, "seed": 0, "size": 96}


def measure(tree: Path, words: list[str], out: Path) -> tuple[float, float, dict[str, Any]]:
    """Run `fastbyol eval WORDS`; return seconds, peak memory in GB, and the result."""
    environment_ = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "fastbyol", "eval", *words, "--out", str(out), "--device", "cpu"]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=tree, env=environment_, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    return seconds, usage.ru_maxrss * 1024 / 1e9, json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="source tree before the change")
    parser.add_argument("--after", type=Path, default=Path(), help="source tree after the change")
    parser.add_argument("--root", type=Path, required=True, help="labeled images: train and val")
    parser.add_argument("--run", type=Path, required=True, help="run or checkpoint to evaluate")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--protocols", nargs="+", choices=[*PROTOCOLS, *DENSE], default=[*PROTOCOLS, *DENSE])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    names, facts = options.protocols, environment.describe()
    rows: list[dict[str, Any]] = []
    if options.out.exists():  # of other protocols
        rows += [row for row in results_csv.read(options.out.stem, options.out.parent) if row["protocol"] not in names]
    with tempfile.TemporaryDirectory() as folder:
        shapes = Path(folder) / "shapes"
        prepare_shapes(shapes, **SHAPES)
        for name in names:
            root = options.root if name in PROTOCOLS else shapes
            words = [*(PROTOCOLS | DENSE)[name], "--run", str(options.run.resolve()), "--root", str(root.resolve())]
            for turn in range(options.rounds):
                for which, tree in (("before", options.before.resolve()), ("after", options.after.resolve())):
                    out = Path(folder) / f"{which}.json"
                    out.unlink(missing_ok=True)
                    seconds, peak_gb, result = measure(tree, words, out)
                    values = {"round": turn, "protocol": name, "tree": which, "seconds": f"{seconds:.1f}"}
                    values |= {"peak_gb": f"{peak_gb:.2f}"}
                    values |= {"images": result["train_images"] + result["val_images"]}
                    values["rows"] = "; ".join(f"{title}: {_metric(row)}" for title, row in result["rows"].items())
                    commit = result["environment"]["fastbyol"]
                    rows.append(values | {"fastbyol": commit} | {key: facts[key] for key in ("cpu", "python", "torch")})
                    print(rows[-1], flush=True)
                    results_csv.write(options.out, rows, quiet=True)


def _metric(row: dict[str, Any]) -> str:
    """Return a row's first number, as its name and value."""
    key, value = next((k, v) for k, v in row.items() if isinstance(v, float))
    return f"{key} {value:.4f}"


if __name__ == "__main__":
    main()
