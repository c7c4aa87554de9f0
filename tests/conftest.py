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
from helpers.installation import Installation, install

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
    # The key of Inductor's graph cache lacks the instruction set: AVX-512 code from the cache reads
    # out of bounds under AVX2.
    cache = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)


def _version(module: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interpreted" in item.fixturenames:
            item.add_marker("interpreter")
        # Triton chooses between compiler and interpreter at import, once per process.
        if "interpreter" in item.keywords and not triton.knobs.runtime.interpret:
            item.add_marker(
                pytest.mark.skip(reason="needs TRITON_INTERPRET=1; `make test` runs these in a separate process")
            )
        if "interpreter" in item.keywords and _version(triton) < (3, 7) and _version(np) >= (2, 4):
            item.add_marker(
                pytest.mark.skip(reason="Triton 3.6's interpreter needs numpy<2.4: it calls int() on arrays")
            )
        on_cpu = os.environ.get("FASTBYOL_TEST_DEVICE") == "cpu"  # runs the part of tests/gpu that needs no CUDA
        if "gpu" in item.keywords and not torch.cuda.is_available() and not on_cpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device available"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Escape non-UTF-8 file names in captured output, which pytest-xdist cannot serialize."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    """Compile the CPU kernels, so that no test runs a stale kernel from numba's cache."""
    jit_cache.compile_cpu_kernels()


@pytest.fixture(autouse=True)
def console_output() -> Iterator[None]:
    """Print log messages to the console, as the command line does."""
    with console_logging():
        yield


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make random numbers and output independent of earlier tests and of the machine's load."""
    torch.manual_seed(0)
    monkeypatch.setattr(cores, "_others", lambda: (0.0, 0.0))


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], ModuleType]:
    """Return a loader of fastbyol.kernels.triton modules, whose kernels run in the interpreter."""
    return lambda name: importlib.import_module(f"fastbyol.kernels.triton.{name}")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a read-only corpus of 72 training and 18 validation photographs of 64 px."""
    root = tmp_path_factory.mktemp("corpus") / "photos"
    prepare_photos(root, TRAIN_IMAGES, seed=0, size=64)
    return root


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Return fastbyol installed from its wheel; the workers of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return install(shared / "installation")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Limit torch to one thread: small networks do not scale, and other processes use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_config(photos: Path, tmp_path: Path) -> Callable[..., Config]:
    """Return a factory of small configs: ResNet-18 of width 1/8 at 32 px, 4 steps per epoch.

    Its keyword arguments override fields of the sections, or top-level fields.
    """
    images = sorted(str(path) for path in (photos / "train").rglob("*.jpg"))[: 4 * BATCH]
    (tmp_path / "images.txt").write_text("\n".join(images))

    def make(**changes: dict[str, Any]) -> Config:
        is_subset = {"root", "train_split", "fraction", "images_per_class", "file_list"} & set(changes.get("data", {}))
        data = {"root": str(photos)} | ({} if is_subset else {"file_list": str(tmp_path / "images.txt")})
        defaults: dict[str, dict[str, Any]] = {
            "data": data | {"batch_size": BATCH, "image_size_px": 32, "threads": 2},
            "model": {"backbone": "resnet18", "width": 0.125, "hidden_dim": 32, "projection_dim": 16},
            "optim": {"epochs": 4, "warmup_epochs": 1, "base_lr": 2.0},
            "log": {"log_every_steps": 1, "trackers": []},
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
    """Return a function that writes files from {relative path: content} and returns their root."""

    def write(files: dict[str, bytes]) -> Path:
        root = tmp_path / "files"
        for name, content in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        return root

    return write


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Yield a list of all log records as the console prints them ("warning: ..." for warnings)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(format_record(record))  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)
