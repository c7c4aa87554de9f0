"""Do `fastbyol profile`, `bench` and `plan` say the same of one machine?

    python benchmarks/agreement.py [--sets "R18 96 px, batch 32" ...] [--rounds 3]

All in one process, in turn: for every set a profile and a bench, round by round. Rows of benchmarks/results/agreement.csv:

    parts_over_step      the profile's parts together over its own steps without marks: median of its windows
    bench_over_profile   milliseconds of whole training by bench over a step without marks by profile
    plan_over_bench      images/s that plan estimates over those that bench found. The estimate takes the rates that bench measured in that round
    plan_from_other      the same with the rates that bench measured on another set, named in `rates_from`: efficiency and loader are carried from one
                         network and size to another
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


def checkpoint_config(work: Work, root: Path) -> Config:
    """Of a set, far enough from the end of its schedules."""
    return Config(
        data=DataConfig(root=str(root), batch_size=work.batch, image_size_px=work.size),
        model=ModelConfig(backbone=work.backbone),
        optim=OptimConfig(epochs=10**4),
    )


def measure(configs: dict[str, Config], steps: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """One round: set -> what profile and bench found."""
    found = {}
    for name, config in configs.items():
        profiled = profile(config, steps=steps, out=folder, say=say)
        benched = bench(config, rounds=1, steps=steps, out=folder / f"{len(found)}.json", say=say)
        found[name] = profiled, benched
    return found


def _planned(config: Config, rates: Path) -> float:
    """Images/s."""
    return plan(config, gpus=1, gpu=None, rates=rates, images=IMAGES)["images_per_s"]


def rows_of(found: dict[str, Any], configs: dict[str, Config], folder: Path) -> list[dict[str, Any]]:
    """A row of each set."""
    rows, names = [], list(configs)
    for k, (name, (profiled, benched)) in enumerate(found.items()):
        other = (k + 1) % len(names)
        rate = benched["images_per_s"]["whole"][0]
        own, carried = (_planned(configs[name], folder / f"{source}.json") for source in (k, other))
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
    parser.add_argument("--steps", type=int, default=15, help="of each measurement")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    facts = {key: environment.describe()[key] for key in ("fastbyol", "cpu", "gpu", "torch", "timm", "numba")}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare_photos(folder / "photos", IMAGES, seed=0)
        configs = {str(work): checkpoint_config(work, folder / "photos") for work in args.sets}
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
