"""Do the demo corpus's features transfer to segmentation and detection?

    python benchmarks/dense_transfer.py [--seeds 0 1 2] [--work DIR]

Compares the BYOL runs of variants.py on the demo corpus (configs/demo.yaml with 6 epochs) with the
untrained network, on the corpus of shapes.py. Runs that DIR does not hold are trained first. Then
`fastbyol eval segmentation` and `eval detection` run with their defaults, each in its own process;
the seconds reported include its start and both networks. Writes benchmarks/results/dense.csv, one
row per seed and task.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import results_csv
import variants
from demo_seeds import fastbyol
from shapes import prepare_shapes

from fastbyol.runtime import environment

RESULT = results_csv.FOLDER / "dense.csv"
METRICS = {"segmentation": "miou", "detection": "map"}
CORPUS = "photos"


def run_of(seed: int, work: Path) -> Path:
    """Return the folder of the run; train it if it is missing."""
    run = variants.run_of(CORPUS, "BYOL", seed, work / "runs")
    if not (run / "summary.json").exists():
        root = variants.prepare(CORPUS, work / "data")
        fastbyol(
            *("train", *variants.arguments(CORPUS, "BYOL", seed, str(root), "")),
            *("--runs", str(run.parent), "--name", run.name),
        )
    return run


def measure(task: str, seed: int, run: Path, shapes: Path) -> dict[str, str]:
    """Evaluate a run; return the row of the table."""
    start = time.perf_counter()
    out = run / f"eval_{task}.json"
    fastbyol("eval", task, "--run", str(run), "--root", str(shapes), "--seed", str(seed), "--out", str(out))
    seconds = time.perf_counter() - start
    result = json.loads(out.read_text())
    row = {"protocol": task, "seed": str(seed), "metric": METRICS[task]}
    for name, values in result["rows"].items():
        row[name.replace(" ", "_")] = f"{values[METRICS[task]]:.4f}"
    row |= {"seconds": f"{seconds:.0f}", "images": f"{result['train_images']}+{result['val_images']}"}
    row["threads"] = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    facts = environment.describe()
    return row | {key: facts[key] for key in ("fastbyol", "cpu", "torch", "torchvision")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, help="folder for corpora and runs; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="fastbyol-dense-"))
    (work / "data").mkdir(parents=True, exist_ok=True)
    shapes = work / "data" / "shapes"
    if not shapes.exists():
        print(prepare_shapes(shapes), flush=True)
    rows = []
    for seed in args.seeds:
        run = run_of(seed, work)
        for task in METRICS:
            rows.append(measure(task, seed, run, shapes))
            results_csv.write(args.out, rows)


if __name__ == "__main__":
    main()
