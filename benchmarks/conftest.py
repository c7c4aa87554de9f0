"""Write pytest-benchmark's measurements to result files: one CSV per benchmark and device."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import results_csv
import torch

from fastbyol.runtime import environment

ROUNDS = 5
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, default=ROUNDS, help="measurements of every contender")
    parser.addoption("--devices", nargs="+", default=DEVICES, choices=["cpu", "cuda"])
    parser.addoption("--results", type=Path, default=results_csv.FOLDER, help="folder for the result files")
    parser.addoption("--views", type=int, help="views in bench_augment.py (default: 32, on a GPU 512)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize rounds and devices."""
    if "turn" in metafunc.fixturenames:
        metafunc.parametrize("turn", range(metafunc.config.getoption("rounds")), ids=lambda k: f"round{k}")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", metafunc.config.getoption("devices"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Interleave the contenders (A B C A B C ...), so that drift of the machine affects all equally.
    items.sort(key=lambda item: item.callspec.params["turn"])
    if "cuda" in config.getoption("devices") and not torch.cuda.is_available() and not config.option.collectonly:
        raise pytest.UsageError("--devices cuda: torch sees no CUDA device here")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Write all rows after every measurement, so that a killed run loses at most one."""
    yield
    measured = item.funcargs["benchmark"].stats
    if measured is not None:  # not with --benchmark-disable
        _record(item.config, item.path.stem, measured.extra_info, measured.stats.data)


_ROWS = pytest.StashKey[dict[tuple[str, str], list[dict[str, Any]]]]()


@cache
def _machine() -> dict[str, str]:
    facts = environment.describe()
    names = ("triton", "numba", "lightly", "kornia")
    return {key: facts[key] for key in ("fastbyol", "cpu", "gpu", "python", "torch")} | {
        name: environment.installed(name) or "" for name in names
    }


def _record(config: pytest.Config, stem: str, info: dict[str, Any], seconds: list[float]) -> None:
    """Add a row and write NAME_DEVICE.csv.

    The column share_of_copy is the bandwidth relative to the copy in the same round.
    """
    ms = 1e3 * median(seconds) / info["calls"]
    row = {key: info[key] for key in ("round", "set", "contender")}
    row |= {"ms": f"{ms:.4f}", "n": len(seconds) * info["calls"], "bytes": info["bytes"]}
    row["gb_per_s"] = f"{info['bytes'] / ms / 1e6:.1f}"
    rows = config.stash[_ROWS].setdefault((stem, info["device"]), [])
    rows.append(row | {"share_of_copy": ""} | _machine())
    copies = {(r["round"], r["set"]): r["bytes"] / float(r["ms"]) for r in rows if r["contender"] == "copy"}
    for r in rows:
        if (copy := copies.get((r["round"], r["set"]))) is not None:
            r["share_of_copy"] = f"{r['bytes'] / float(r['ms']) / copy:.3f}"
    path = config.getoption("--results") / f"{stem.removeprefix('bench_')}_{info['device']}.csv"
    results_csv.write(path, rows, quiet=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for stem, device in config.stash[_ROWS]:
        path = config.getoption("--results") / f"{stem.removeprefix('bench_')}_{device}.csv"
        terminalreporter.write_line(f"wrote {path}")
