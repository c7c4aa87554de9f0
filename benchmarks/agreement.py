"""Compare the results of `fastbyol profile`, `bench` and `plan` on one machine.

    python benchmarks/agreement.py [--sets "R18 96 px, batch 32" ...] [--rounds 3]

Each round profiles and benchmarks every workload, in one process. Columns of
benchmarks/results/agreement.csv:

    parts_over_step      profile: sum of all spans / time of an uninstrumented step, median of its
                         windows
    bench_over_profile   time per step of bench's end-to-end training / profile's uninstrumented
                         step
    plan_over_bench      images/s estimated by plan / measured by bench; plan uses the rates of
                         bench in that round
    plan_from_other      the same, with the rates of another workload (`rates_from`): tests how
                         efficiency and loader throughput transfer to another network and image size
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results_csv
from bench_step import Work

from fastbyol.config import Config, DataConfig, ModelConfig, OptimConfig
from fastbyol.runtime import environment
from fastbyol.tools.bench import bench
from fastbyol.tools.corpora import prepare_photos
from fastbyol.tools.plan import plan
from fastbyol.tools.profiling import profile

RESULT = results_csv.FOLDER / "agreement.csv"
SETS = ["R18 96 px, batch 32", "R18 128 px, batch 32", "R50 96 px, batch 16"]
IMAGES = 512


def workload_config(work: Work, root: Path) -> Config:
    """Return the config of a workload, with schedules that do not end during the measurement."""
    return Config(
        data=DataConfig(root=str(root), batch_size=work.batch, image_size_px=work.size),
        model=ModelConfig(backbone=work.backbone),
        optim=OptimConfig(epochs=10**4),
    )


def measure(configs: dict[str, Config], steps: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one round and return {workload: (result of profile, result of bench)}."""
    found = {}
    for name, config in configs.items():
        profiled = profile(config, steps=steps, out=folder)
        benched = bench(config, rounds=1, steps=steps, out=folder / f"{len(found)}.json")
        found[name] = profiled, benched
    return found


def _planned_rate(config: Config, rates: Path) -> float:
    """Return plan's estimate in images/s."""
    return plan(config, gpus=1, gpu=None, rates=rates, images=IMAGES)["images_per_s"]


def rows_of(found: dict[str, Any], configs: dict[str, Config], folder: Path) -> list[dict[str, Any]]:
    """Return one row per workload."""
    rows, names = [], list(configs)
    for k, (name, (profiled, benched)) in enumerate(found.items()):
        other = (k + 1) % len(names)
        rate = benched["images_per_s"]["whole"][0]
        own, carried = (_planned_rate(configs[name], folder / f"{source}.json") for source in (k, other))
        step_ms = profiled["step_ms"]["p50"]
        whole_ms = 1e3 * configs[name].data.batch_size / rate
        rows.append(
            {
                "set": name,
                "profile_step_ms": f"{step_ms:.2f}",
                "parts_over_step": f"{profiled['parts_over_step']['p50']:.4f}",
                "bench_whole_ms": f"{whole_ms:.2f}",
                "bench_over_profile": f"{whole_ms / step_ms:.4f}",
                "step_over_bound": f"{benched['step_over_bound'][0]:.3f}",
                "bench_images_per_s": f"{rate:.1f}",
                "plan_images_per_s": f"{own:.1f}",
                "plan_over_bench": f"{own / rate:.4f}",
                "rates_from": names[other],
                "plan_from_other": f"{carried / rate:.4f}",
                "mfu": f"{profiled['roofline']['mfu']:.4f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", type=Work.parse, default=[Work.parse(text) for text in SETS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15, help="steps per measurement")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    facts = {key: environment.describe()[key] for key in ("fastbyol", "cpu", "gpu", "torch", "timm", "numba")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_photos(folder / "photos", IMAGES, seed=0)
        configs = {str(work): workload_config(work, folder / "photos") for work in args.sets}
        for k in range(args.rounds):
            found = measure(configs, args.steps, folder, lambda text: None)
            rows += [{"round": k, **row, **facts} for row in rows_of(found, configs, folder)]
            for row in rows[-len(configs) :]:
                print(json.dumps(row), flush=True)
            results_csv.write(args.out, rows)
    for column in ("parts_over_step", "bench_over_profile", "plan_over_bench", "plan_from_other"):
        for name in configs:
            values = [float(row[column]) for row in rows if row["set"] == name]
            print(f"{column:<20}{name:<24}{results_csv.spread(values, 3)}")


if __name__ == "__main__":
    main()
