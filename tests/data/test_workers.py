"""The thread engine: order, bounds, errors and shutdown."""

import threading
import time

import pytest
from helpers.common import HANG_S

from fastbyol.data.workers import PrefetchPool, map_in_order


def pool_of(function, tasks, *, threads=2, window=8, **options):
    return PrefetchPool(lambda: function, tasks, threads=threads, window=window, name="pool", **options)


def wait_until(condition):
    deadline = time.monotonic() + HANG_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith(("pool", "fastbyol-worker"))])


def test_results_come_in_order_whatever_the_tasks_take():
    release = [threading.Event() for _ in range(6)]
    done = []

    def work(k):
        release[k].wait(HANG_S)
        done.append(k)
        return 10 * k

    pool = pool_of(work, range(6), threads=6, window=6)
    for event in reversed(release):
        event.set()
        wait_until(lambda event=event: len(done) >= 6 - release.index(event))
    assert pool.take(4) == [0, 10, 20, 30]
    assert pool.take(4) == [40, 50]
    assert pool.take(4) == []
    assert done != sorted(done)
    pool.close()


@pytest.mark.parametrize("refill", [1, 3])
def test_threads_run_ahead_by_the_window_of_unreleased_tasks(refill):
    begun = []
    pool = pool_of(lambda k: begun.append(k) or k, range(100), window=6, refill=refill)
    wait_until(lambda: len(begun) == 6)
    assert pool.take(2) == [0, 1]  # held by the consumer, not yet released
    time.sleep(0.05)
    assert len(begun) == 6
    assert pool.take(2) == [2, 3]  # releases the first two
    if refill == 3:
        time.sleep(0.05)
        assert len(begun) == 6
    else:
        wait_until(lambda: len(begun) == 8)
    assert pool.take(1) == [4]
    wait_until(lambda: len(begun) == 10)
    time.sleep(0.05)
    assert len(begun) == 10
    pool.close()


def test_an_error_is_raised_where_its_result_would_be():
    def work(k):
        if k in (3, 5):
            raise ValueError(f"task {k}")
        return k

    pool = pool_of(work, range(8), threads=3)
    assert pool.take(3) == [0, 1, 2]
    with pytest.raises(ValueError, match="task 3"):
        pool.take(3)
    pool.close()
    results = map_in_order(work, range(8), threads=3)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="task 3"):
        next(results)


def test_a_task_that_raises_stop_iteration_does_not_end_the_results_silently():
    empty = iter(())
    with pytest.raises(RuntimeError, match="a task raised StopIteration"):
        list(map_in_order(lambda task: next(empty) if task == 3 else task, range(6), threads=2))


def test_an_error_of_the_tasks_iterator_comes_after_the_results_before_it():
    def tasks():
        yield from range(3)
        raise KeyError("no more tasks")

    results = map_in_order(lambda k: k, tasks(), threads=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="no more tasks"):
        next(results)


def test_an_error_of_a_workers_construction_reaches_the_consumer():
    def new_worker():
        raise MemoryError("no scratch memory")

    pool = PrefetchPool(new_worker, range(3), threads=2, window=4, name="pool")
    with pytest.raises(MemoryError, match="no scratch memory"):
        pool.take()
    pool.close()


def test_each_thread_has_one_worker():
    made = []

    def new_worker():
        owner = threading.get_ident()
        made.append(owner)
        return lambda k: owner == threading.get_ident()

    pool = PrefetchPool(new_worker, range(50), threads=3, window=10, name="pool")
    assert all(result for _ in range(50) for result in pool.take())
    pool.close()
    assert len(made) == len(set(made)) <= 3


def test_leaving_early_drops_the_tasks_not_begun():
    begun = []
    results = map_in_order(lambda k: begun.append(k) or k, range(10**9), threads=2)
    assert next(results) == 0
    results.close()
    assert len(begun) <= 8 * 2 + 2
    assert not [t for t in threading.enumerate() if t.name.startswith("fastbyol-worker")]


def test_close_waits_for_tasks_in_progress_but_not_after_a_timeout():
    go, finished = threading.Event(), []

    def work(k):
        go.wait(HANG_S)
        finished.append(k)

    pool = pool_of(work, range(4), threads=1, window=1)
    threading.Timer(0.1, go.set).start()
    time.sleep(0.02)
    pool.close()
    assert finished == [0]
    go.clear()
    pool = pool_of(work, range(4), threads=1, window=1)
    with pytest.raises(TimeoutError):
        pool.take(timeout_s=0.05)
    pool.close()
    assert finished == [0]
    go.set()


def test_a_chain_of_pools_closes_while_its_threads_wait_for_each_other():
    """The second pool's threads wait for the first, whose threads wait for room; or all wait for a
    slow source.
    """
    source = pool_of(lambda k: k, range(10**9), threads=3, window=4)
    pool = pool_of(lambda k: -k, source, threads=3, window=5, upstream=source)
    assert [pool.take()[0] for _ in range(20)] == [-k for k in range(20)]
    pool.close()
    never = threading.Event()
    source = pool_of(lambda k: never.wait(0.3), range(4), threads=1)
    pool = pool_of(lambda k: k, source, threads=3, upstream=source)
    pool.close()
    assert pool.take() == []


def test_threads_do_not_keep_the_process_alive():
    pool = pool_of(lambda k: k, range(2))
    assert all(thread.daemon for thread in pool._threads)
    pool.close()
