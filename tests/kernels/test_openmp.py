"""Tasks on torch's OpenMP threads and on the fallback thread pool."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastbyol import kernels
from fastbyol.kernels.cpu import openmp
from fastbyol.kernels.cpu.simd import float64_array


@openmp.kernel(cache=False)
def count(task, args):
    """Count one call of this task; the amount of work differs between tasks."""
    calls = float64_array(args[0])
    for i in range(1 + task % 7 * 1000):
        calls[task] += 1.0 / (1 + task % 7 * 1000) + i * 0.0


@openmp.kernel(cache=False)
def total(task, args):
    """Add 1000 and the sum of all calls to the last element; complete only after all tasks."""
    calls, tasks = float64_array(args[0]), args[1]
    calls[tasks] += 1000.0
    for k in range(tasks):
        calls[tasks] += calls[k]


@pytest.fixture(params=["openmp", "pool"], autouse=True)
def launch(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(openmp, "_launch", openmp._launch_in_pool)
    elif openmp._OPENMP is None:
        pytest.skip("torch's OpenMP has no GOMP_parallel here")
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(tasks):
    calls = np.zeros(tasks + 1)
    openmp.run(count, tasks, (calls.ctypes.data, tasks), total)
    return calls


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("tasks", [1, 2, 3, 100])
def test_every_task_runs_once_before_the_epilogue(n, tasks, set_threads):
    set_threads(n)
    for _ in range(20):
        calls = run(tasks)
        assert np.allclose(calls[:tasks], 1, atol=1e-9)
        assert calls[tasks] == pytest.approx(1000 + tasks)


def test_zero_tasks_call_nothing():
    assert run(0)[0] == 0


def test_epilogue_is_optional():
    calls = np.zeros(4)
    openmp.run(count, 3, (calls.ctypes.data, 3))
    assert np.allclose(calls, [1, 1, 1, 0])


def test_concurrent_calls_from_python_threads():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(50), range(40)))
    assert all(calls[-1] == pytest.approx(1050) for calls in results)


def test_openmp_starts_no_threads_of_its_own(launch, set_threads):
    set_threads(3)
    torch.ones(1 << 20).add_(1)  # starts torch's threads
    openmp._pool.cache_clear()
    before = set(os.listdir("/proc/self/task"))
    run(100_000)  # long enough to keep the pool's first thread busy when the second one is requested
    assert len(set(os.listdir("/proc/self/task")) - before) == (0 if launch == "openmp" else 2)


def test_missing_symbol_or_library_disables_openmp(monkeypatch):
    def no_library(*arguments, **options):
        raise OSError("not found")

    for stand_in in (no_library, lambda *arguments, **options: object()):
        monkeypatch.setattr(ctypes, "CDLL", stand_in)
        assert openmp._find_openmp() is None


def test_describe_names_the_threads(launch):
    expected = "2 of torch's OpenMP threads" if launch == "openmp" else "2 of a thread pool"
    if torch.get_num_threads() == 2:
        assert expected in kernels.describe(torch.device("cpu"), "native")
    assert ("pool" in openmp.describe()) == (launch == "pool")
