import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
from helpers.common import BATCH, TRAIN_IMAGES

from fastbyol.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    KnnConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    StepConfig,
)
from fastbyol.kernels.cpu import jit_cache
from fastbyol.runtime import cores
from fastbyol.runtime.logging import console_logging, format_record, logger
from fastbyol.tools.corpora import prepare_photos

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # Inductor's graph cache has no instruction set in its key: code cached for AVX-512 reads out of bounds when AVX2 runs it.
    cache = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interpreted" in item.fixturenames:
            item.add_marker("interpreter")
        # Triton decides when it is imported whether kernels are compiled or interpreted: one process does one of the two.
        if "interpreter" in item.keywords and not triton.knobs.runtime.interpret:
            item.add_marker(
                pytest.mark.skip(reason="needs TRITON_INTERPRET=1; `make test` runs these in a second process")
            )
        if "interpreter" in item.keywords and _version(triton) < (3, 7) and _version(np) >= (2, 4):
            item.add_marker(
                pytest.mark.skip(reason="Triton 3.6's interpreter needs numpy<2.4: it takes int() of arrays")
            )
        rehearsed = os.environ.get("FASTBYOL_TEST_DEVICE") == "cpu"  # of tests/gpu, what needs no CUDA
        if "gpu" in item.keywords and not torch.cuda.is_available() and not rehearsed:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Escape file names that are not UTF-8 in captured output: pytest-xdist cannot send them."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def compiled_from_the_sources() -> None:
    """No test runs a kernel that numba cached before the last change of intrinsics.py or simd.py."""
    jit_cache.compile_cpu_kernels()


@pytest.fixture(autouse=True)
def logs_to_the_console() -> Iterator[None]:
    """Messages are printed as under the command line."""
    with console_logging():
        yield


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test draws and prints does not depend on the tests that ran before it in its process, nor on the load of the machine."""
    torch.manual_seed(0)
    monkeypatch.setattr(cores, "_others", lambda: (0.0, 0.0))


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], ModuleType]:
    """Gives a module of fastbyol.kernels.triton whose kernels run on CPU tensors, in Triton's interpreter."""
    return lambda name: importlib.import_module(f"fastbyol.kernels.triton.{name}")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 72 training and 18 validation photographs, 64 px; not to be changed."""
    root = tmp_path_factory.mktemp("corpus") / "photos"
    prepare_photos(root, TRAIN_IMAGES, seed=0, size=64)
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks gain nothing from more, and lose much where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(photos: Path, tmp_path: Path) -> Callable[..., Config]:
    """Builds a config small enough for a test: R18 of width 1/8 at 32 px; keyword arguments replace sections' fields."""

    def make(**changes: dict[str, Any]) -> Config:
        defaults: dict[str, dict[str, Any]] = {
            "data": {"root": str(photos), "batch_size": BATCH, "image_size_px": 32, "threads": 2},
            "model": {"backbone": "resnet18", "width": 0.125, "hidden_dim": 32, "projection_dim": 16},
            "optim": {"epochs": 4, "warmup_epochs": 1, "base_lr": 2.0},
            "log": {"log_every_steps": 1, "tensorboard": False},
            "checkpoint": {},
            "knn": {"every_epochs": 2},
            "step": {},
        }
        kinds = {
            "data": DataConfig,
            "model": ModelConfig,
            "optim": OptimConfig,
            "log": LogConfig,
            "checkpoint": CheckpointConfig,
            "knn": KnnConfig,
            "step": StepConfig,
        }
        top = {key: value for key, value in changes.items() if key not in defaults}
        sections = {key: kinds[key](**(values | changes.get(key, {}))) for key, values in defaults.items()}
        return Config(**{"name": "run", "runs": str(tmp_path / "runs")} | top | sections)

    return make


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Writes files given by relative path and content; returns their root."""

    def write(files: dict[str, bytes]) -> Path:
        root = tmp_path / "files"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    return write


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Every record of fastbyol's logger, as the console prints it: "warning: ..." for a warning."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(format_record(record))  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
