"""Units on torch's OpenMP threads and in the pool that stands in for them."""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fastbyol.kernels import dispatch
from fastbyol.kernels.cpu import openmp as threads
from fastbyol.kernels.cpu.simd import doubles


@threads.kernel(cache=False)
def count(unit, words):
    """One more call of this unit; and work that differs from unit to unit."""
    calls = doubles(words[0])
    for i in range(1 + unit % 7 * 1000):
        calls[unit] += 1.0 / (1 + unit % 7 * 1000) + i * 0.0


@threads.kernel(cache=False)
def total(unit, words):
    """Adds 1000 and the sum of all calls to the last place: the sum is complete if all units are done by then."""
    calls, units = doubles(words[0]), words[1]
    calls[units] += 1000.0
    for k in range(units):
        calls[units] += calls[k]


@pytest.fixture(params=["openmp", "pool"], autouse=True)
def start(request, monkeypatch):
    if request.param == "pool":
        monkeypatch.setattr(threads, "_start", threads._in_pool)
    elif threads._OPENMP is None:
        pytest.skip("torch's OpenMP has no GOMP_parallel here")
    return request.param


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(units):
    calls = np.zeros(units + 1)
    threads.run(count, units, (calls.ctypes.data, units), total)
    return calls


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("units", [1, 2, 3, 100])
def test_every_unit_is_called_once_and_then_finish(n, units, set_threads):
    set_threads(n)
    for _ in range(20):
        calls = run(units)
        assert np.allclose(calls[:units], 1, atol=1e-9)
        assert calls[units] == pytest.approx(1000 + units)


def test_no_units_are_no_call():
    assert run(0)[0] == 0


def test_finish_is_left_out():
    calls = np.zeros(4)
    threads.run(count, 3, (calls.ctypes.data, 3))
    assert np.allclose(calls, [1, 1, 1, 0])


def test_python_threads_do_not_disturb_each_other():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(50), range(40)))
    assert all(calls[-1] == pytest.approx(1050) for calls in results)


def test_openmp_makes_no_threads_beside_torch_s(start, set_threads):
    set_threads(3)
    torch.ones(1 << 20).add_(1)  # torch's are there after this
    threads._pool.cache_clear()
    before = set(os.listdir("/proc/self/task"))
    run(100_000)  # long enough for a pool's first thread to be busy when the second one is asked for
    assert len(set(os.listdir("/proc/self/task")) - before) == (0 if start == "openmp" else 2)


def test_where_the_symbol_or_the_library_is_missing_there_is_no_openmp(monkeypatch):
    def no_library(*arguments, **options):
        raise OSError("not found")

    for stand_in in (no_library, lambda *arguments, **options: object()):
        monkeypatch.setattr(ctypes, "CDLL", stand_in)
        assert threads._openmp() is None


def test_the_choice_is_said(start):
    expected = "2 of torch's OpenMP threads" if start == "openmp" else "2 of a thread pool"
    if torch.get_num_threads() == 2:
        assert expected in dispatch.describe(torch.device("cpu"), "native")
    assert ("pool" in threads.describe()) == (start == "pool")
