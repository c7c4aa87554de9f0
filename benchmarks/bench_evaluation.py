"""Evaluation at ImageNet's size on synthetic features: peak memory and time.

    python benchmarks/bench_evaluation.py [--images 1281167] [--queries 10000]

Draws features of 1000 overlapping classes, stores them as `fastbyol eval` does, and measures

- the kNN of all queries, compared with a full sort of all similarities for 64 of them;
- steps of the cached linear probe, five classifiers at the paper's batch of 1024.

Peak memory is that of the process (VmHWM) minus what it had before the features were made, beside
the formula that `fastbyol eval` checks. Writes benchmarks/results/evaluation.csv.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import results_csv
import torch

from fastbyol.evaluation.features import Features, block_images
from fastbyol.evaluation.knn import knn_accuracy, knn_bytes, nearest
from fastbyol.evaluation.linear import CACHED_BASE_LRS, Standardization, probe_bytes, train_probes
from fastbyol.evaluation.options import LinearEval
from fastbyol.runtime import environment
from fastbyol.runtime.distributed import World

RESULT = Path(__file__).parent / "results" / "evaluation.csv"
CLASSES, K, TEMPERATURE, BATCH = 1000, 20, 0.07, 1024
_EXACT_QUERIES = 64


def synthetic(images: int, dim: int, seed: int) -> Features:
    """Return features of noisy classes, made and stored block by block."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (images,), generator=generator)
    unit, length = torch.empty(images, dim, dtype=torch.float16), torch.empty(images)
    size = block_images(images)
    for start in range(0, images, size):
        rows = slice(start, min(start + size, images))
        part = labels[rows]
        x = 0.2 * centers[part] + torch.randn(len(part), dim, generator=generator)
        length[rows] = x.norm(dim=1)
        unit[rows] = x / length[rows, None]
    blocks = [min(size, images - start) for start in range(0, images, size)]
    return Features(unit, length, torch.arange(images), blocks, labels, CLASSES, {})


def memory(key: str) -> float:
    """Return a value of /proc/self/status in GB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e9


def exact_share(bank: Features, queries: Features) -> float:
    """Return the share of neighbors that are those of a full sort of all similarities."""
    some = torch.arange(_EXACT_QUERIES)
    part = Features(queries.unit[some], queries.length[some], some, [len(some)], queries.all_labels[some], CLASSES, {})
    similarity = torch.cat([part.unit.float() @ block.float().T for block in bank.unit.split(10_000)], 1)
    expected = torch.sort(similarity, dim=1, descending=True, stable=True).indices[:, :K]
    return (nearest(bank, part, K)[1] == expected).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20, help="steps of the linear probe")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    images, queries, dim = arguments.images, arguments.queries, arguments.features
    before, began = memory("VmRSS"), time.perf_counter()
    bank, val = synthetic(images, dim, seed=0), synthetic(queries, dim, seed=1)
    print(f"features made in {time.perf_counter() - began:.0f} s", flush=True)
    facts = environment.describe()
    shared = {"images": images, "queries": queries, "features": dim}
    rows: list[dict[str, Any]] = []

    def measured(what: str, seconds: float, formula: int, detail: str) -> None:
        values = {"what": what, **shared, "seconds": f"{seconds:.1f}", "peak_gb": f"{memory('VmHWM') - before:.2f}"}
        values |= {"formula_gb": f"{formula / 1e9:.2f}", "detail": detail}
        rows.append(values | {key: facts[key] for key in ("fastbyol", "cpu", "python", "torch")})
        print(rows[-1], flush=True)

    began = time.perf_counter()
    accuracy = knn_accuracy(bank, val, k=K, temperature=TEMPERATURE)
    seconds = time.perf_counter() - began
    formula = knn_bytes(images, queries, dim, K, World())
    measured("knn", seconds, formula, f"top-1 {accuracy['top1']:.4f}")

    began = time.perf_counter()
    standardize = Standardization.of(bank)
    formula = probe_bytes(images, queries, dim, CLASSES, LinearEval(run="x"), World())
    measured("mean and standard deviation", time.perf_counter() - began, formula, "")
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(0))[: arguments.steps * BATCH].sort().values
    began = time.perf_counter()
    train_probes(bank, standardize, chosen, base_lrs=CACHED_BASE_LRS, epochs=1, batch_size=BATCH, seed=0)
    measured("linear probe", time.perf_counter() - began, formula, f"{arguments.steps} steps of {BATCH} images")

    # Last, since the full sort needs more memory than what is measured.
    share = exact_share(bank, val)
    rows[0]["detail"] += f"; {share:.2%} of the neighbors of {_EXACT_QUERIES} queries equal a full sort's"
    results_csv.write(arguments.out, rows)


if __name__ == "__main__":
    main()
