"""Time end-to-end training from JPEG files on all cores: fastbyol against lightly.

    make bench-train                                      # in the environment with all peers
    python benchmarks/bench_train.py --rounds 1 --seconds 5 --only fastbyol --out /tmp/train.csv

Each measurement runs in its own process, and rounds are interleaved (A B C A B C ...). All
contenders read the corpus of bench_loader.py from the page cache. The first steps (start of
workers, compilation, prefetching) are not timed. On a GPU, the queue is synchronized before and
after timing.

Contenders:
    fastbyol             data/native.py and step.py with their defaults: the loop of loop.py
                         without logging and evaluation
    lightly              BYOLTransform in a DataLoader with one worker process per core, and the
                         step in bench_step.py: float32, NCHW
    lightly 1 thread     on a CPU: the same with one thread for the step, which leaves the cores to
                         the workers
    ... step only        the same step on a cached batch, without a loader

Writes benchmarks/results/train_DEVICE.csv after every measurement. The exit code is 1 if a
contender failed. The column wait_share is the share of time in which the loop waits for a batch;
share_of_step_only is the throughput relative to the step-only throughput in the same round.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bench_loader
import bench_step
import results_csv
import torch
from bench_step import Work
from runner import Runner, run_json

from fastbyol.runtime import environment

SETS = {"cpu": ["R18 96 px, batch 32"], "cuda": ["R50 224 px, batch 256"]}
WARM_UP = {"cpu": 8, "cuda": 40}  # steps
MIN_STEPS = 5  # per measurement
STEP_ONLY = " step only"
Loop = tuple[Iterator[Any], Callable[[Any], object]]  # infinite batches, and the step


def fastbyol(work: Work, device: torch.device) -> Loop:
    """Build loader and step as in loop.py."""
    from fastbyol.config import DataConfig
    from fastbyol.data import build_loader, open_split
    from fastbyol.kernels.cpu import jit_cache

    jit_cache.compile_cpu_kernels()
    step = bench_step.fastbyol_step(work, device)
    config = DataConfig(root=str(bench_loader.CORPUS), batch_size=work.batch, image_size_px=work.size)
    loader = build_loader(config, open_split(config.root, "train"), seed=0, device=device, dtype=step.dtype)
    numbers = itertools.count()
    return loader.batches(0, 10**9), lambda batch: step(next(numbers), batch)


def lightly(work: Work, device: torch.device, threads: int | None = None) -> Loop:
    """Build the loop of lightly's example. `threads` compute the step (default: one per core)."""
    if threads is not None:
        torch.set_num_threads(threads)
    trainer = bench_step.lightly(work, device)
    loader = torch.utils.data.DataLoader(
        bench_loader.lightly_images(work.size),
        work.batch,
        shuffle=True,
        drop_last=True,
        num_workers=bench_loader.CORES,
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return batches, lambda batch: trainer.step(batch[0][0].to(device), batch[0][1].to(device))


def step_only(contender: str, work: Work, device: torch.device) -> Loop:
    step = bench_step.prepare(contender, work, device)
    return itertools.repeat(None), lambda batch: step()


CONTENDERS: dict[str, Callable[[Work, torch.device], Loop]] = {
    "fastbyol": fastbyol,
    "lightly": lightly,
    "lightly 1 thread": lambda work, device: lightly(work, device, threads=1),
    f"fastbyol{STEP_ONLY}": lambda work, device: step_only("fastbyol", work, device),
    f"lightly{STEP_ONLY}": lambda work, device: step_only("lightly", work, device),
}


def measure(contender: str, work: Work, device: torch.device, seconds: float) -> None:
    """Measure one contender in this process and print one line of JSON."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    batches, step = CONTENDERS[contender](work, device)
    for _ in range(WARM_UP[device.type]):
        step(next(batches))
    synchronize()
    steps, waited, began = 0, 0.0, time.perf_counter()
    while (now := time.perf_counter()) - began < seconds or steps < MIN_STEPS:
        batch = next(batches)
        waited += time.perf_counter() - now
        step(batch)
        steps += 1
    synchronize()
    elapsed = time.perf_counter() - began
    print(json.dumps({"steps": steps, "seconds": elapsed, "waited_s": waited}), flush=True)
    os._exit(0)  # do not wait for workers and threads


def run(contender: str, work: Work, device: torch.device, seconds: float) -> dict[str, float]:
    """Call `measure` in a new process and return its JSON."""
    command = [sys.executable, __file__, "--measure", contender, "--sets", str(work)]
    command += ["--device", device.type, "--seconds", str(seconds)]
    return run_json(command)


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the throughput relative to the step-only throughput of the same round."""
    rates = {(r["set"], r["round"], r["contender"]): float(r["images_per_s"]) for r in rows}
    for row in rows:
        rate = rates.get((row["set"], row["round"], row["contender"] + STEP_ONLY))
        row["share_of_step_only"] = f"{float(row['images_per_s']) / rate:.3f}" if rate else ""
    return rows


def print_summary(rows: list[dict[str, Any]]) -> None:
    """Print medians and ranges, and slowdowns relative to fastbyol within each round."""
    for name in dict.fromkeys(row["set"] for row in rows):
        print(name)
        rates = results_csv.by_round([row for row in rows if row["set"] == name], "images_per_s")
        for contender, own in rates.items():
            ratios = results_csv.ratios(rates.get("fastbyol", {}), own)
            ratio = f"slowdown {results_csv.spread(ratios, 2)}" if ratios else ""
            print(f"  {contender:<22} {results_csv.spread(list(own.values()), 1):>22} images/s  {ratio}")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        choices=["cpu", "cuda"],
        help="default: cuda if available",
    )
    options.add_argument("--sets", nargs="+", type=Work.parse, help=f"workloads (default: {SETS})")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=30, help="duration of a measurement")
    options.add_argument("--only", nargs="+", choices=list(CONTENDERS))
    options.add_argument("--out", type=Path, help="default: benchmarks/results/train_DEVICE.csv")
    options.add_argument("--measure", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return options


def main() -> int:
    args = parser().parse_args()
    device = bench_step.device_of(args.device)
    sets = args.sets or [Work.parse(text) for text in SETS[device.type]]
    if args.measure:
        measure(args.measure, sets[0], device, args.seconds)
    names = args.only or [name for name in CONTENDERS if device.type == "cpu" or name != "lightly 1 thread"]
    for name in (n for n in names if not bench_step.is_installed(n.split()[0])):
        print(f"{name} is not installed and is skipped: make bench-setup")
    names = [name for name in names if bench_step.is_installed(name.split()[0])]
    bench_loader.prepare_corpus()
    for path in sorted((bench_loader.CORPUS / "train").rglob("*.jpg")):
        path.read_bytes()  # fills the page cache
    facts = bench_step.machine() | {name: environment.installed(name) or "" for name in ("simplejpeg", "pillow")}
    out = args.out or results_csv.FOLDER / f"train_{device.type}.csv"
    runner = Runner(out, lambda rows: [row | facts for row in with_shares(rows)])

    def row_of(name: str, work: Work, round_: int) -> dict[str, Any]:
        result = run(name, work, device, args.seconds)
        ms = 1e3 * result["seconds"] / result["steps"]
        row = {"set": str(work), "round": round_, "contender": name, "steps": int(result["steps"])}
        row |= {"ms": f"{ms:.3f}", "images_per_s": f"{1e3 * work.batch / ms:.2f}"}
        row["wait_share"] = f"{result['waited_s'] / result['seconds']:.3f}"
        return row | {"cores": bench_loader.CORES}

    for round_ in range(args.rounds):
        for work in sets:
            for name in names:
                row = runner.measure((work, name), f"{work}: {name}", partial(row_of, name, work, round_))
                if row is not None:
                    print(f"round {round_}  {work}  {name:<22} {float(row['images_per_s']):8.1f} images/s", flush=True)
    print_summary(runner.rows)
    return runner.finish()


if __name__ == "__main__":
    sys.exit(main())
