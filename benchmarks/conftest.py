"""Turns what pytest-benchmark measures into result files: one CSV per benchmark and device, one row per measurement."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
import results_csv
import torch

from fastbyol import environment

ROUNDS = 5
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=ROUNDS, help="how often every contender has its turn")
    parser.addoption("--devices", nargs="+", default=DEVICES, choices=["cpu", "cuda"])
    parser.addoption("--results", type=Path, default=results_csv.FOLDER, help="folder of the result files")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The rounds go outermost, so that the contenders take turns (A B C A B C ...)."""
    if "turn" in metafunc.fixturenames:
        metafunc.parametrize("turn", range(metafunc.config.getoption("rounds")), ids=lambda k: f"round{k}")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", metafunc.config.getoption("devices"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.callspec.params["turn"])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Writes NAME_DEVICE.csv; `share_of_copy` is the bandwidth over that of the copy in the same round."""
    facts = environment.describe()
    machine = {key: facts[key] for key in ("fastbyol", "cpu", "gpu", "python", "torch")}
    machine |= {name: environment.installed(name) or "" for name in ("triton", "numba", "lightly", "kornia")}
    by_file: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for bench in (b for b in benchmarks if b.stats.data):  # a skipped contender has none
        info = bench.extra_info
        row = {
            "round": info["round"],
            "set": info["set"],
            "contender": info["contender"],
            "ms": f"{1e3 * median(bench.stats.data) / info['calls']:.4f}",
            "n": len(bench.stats.data) * info["calls"],
            "bytes": info["bytes"],
        }
        by_file.setdefault((Path(bench.fullname.split("::")[0]).stem, info["device"]), []).append(row)
    for (stem, device), rows in by_file.items():
        copies = {(r["round"], r["set"]): r["bytes"] / float(r["ms"]) for r in rows if r["contender"] == "copy"}
        for row in rows:
            rate = row["bytes"] / float(row["ms"])
            row["gb_per_s"] = f"{rate / 1e6:.1f}"
            row["share_of_copy"] = f"{rate / copies[row['round'], row['set']]:.3f}"
        path = config.getoption("--results") / f"{stem.removeprefix('bench_')}_{device}.csv"
        results_csv.write(path, [row | machine for row in rows])
