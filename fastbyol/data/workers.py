"""The thread engine of the package: an ordered, bounded, parallel map.

All parallel work on images runs on `PrefetchPool`: reading and rendering in the loaders, the crops
of evaluations, and `map_in_order` for everything else. Pools are chained by passing the results of
one as the tasks of the next.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Self, TypeVar

import torch

from fastbyol.runtime import cores

T = TypeVar("T")
R = TypeVar("R")
_TASKS_PER_THREAD = 8  # tasks that map_in_order keeps begun or finished per thread


def resolve_threads(threads: int) -> int:
    """Return the number of threads of a setting: 0 is one per core available to this process.

    Raises:
        ValueError: `threads` is negative.
    """
    if threads < 0:
        raise ValueError(f"threads={threads}: must be 0 (one per core) or more")
    return threads or cores.available()


@contextmanager
def preserve_torch_threads() -> Iterator[None]:
    """Restore torch's number of threads on exit. FFCV changes it on import and in its loader."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PrefetchPool(Generic[T, R]):
    """Applies a function to tasks in threads and returns the results in the order of the tasks.

    The threads run ahead of the consumer by at most `window` tasks. They are daemons: one that
    hangs, for example in a read from a dead disk, does not keep the process alive.

    One thread at a time takes the next task, so `tasks` may be any iterator, and it may block. Only
    one thread at a time may call `take`. An exception in a task is raised by the call of `take`
    that would have returned its result.

    Args:
        new_worker: called once in each thread; returns the function for that thread, which may own
            scratch memory.
        tasks: finite or endless.
        threads: number of threads.
        window: largest number of tasks that are begun and not yet released. `take` releases the
            results of the previous `take`.
        name: prefix of the threads' names.
        refill: threads stopped by a full window resume when `refill` tasks fit into it, which saves
            wake-ups.
        upstream: the pool that `tasks` reads from; closed together with this one.
    """

    def __init__(
        self,
        new_worker: Callable[[], Callable[[T], R]],
        tasks: Iterable[T],
        *,
        threads: int,
        window: int,
        name: str,
        refill: int = 1,
        upstream: "PrefetchPool[Any, Any] | None" = None,
    ) -> None:
        self._new_worker, self._tasks = new_worker, iter(tasks)
        self._window, self._refill, self._upstream = window, refill, upstream
        # Tasks are numbered from 0. Always: released <= taken <= begun <= released + window.
        self._begun = self._taken = self._released = 0
        self._end = sys.maxsize  # number of tasks, once known
        self._results: dict[int, R | None] = {}  # finished, not yet taken
        self._errors: dict[int, BaseException] = {}
        self._missing = 0  # results that the consumer waits for, of the tasks before `_wanted`
        self._wanted = 0
        self._closed = self._timed_out = False
        self._claim_lock = threading.Lock()  # held by the thread that takes the next task
        self._lock = threading.Lock()  # guards the state above
        self._window_open = threading.Condition(self._lock)
        self._results_ready = threading.Condition(self._lock)
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{k}", daemon=True) for k in range(threads)]
        for thread in self._threads:
            thread.start()

    def take(self, count: int = 1, timeout_s: float | None = None) -> list[R]:
        """Return the next `count` results; fewer at the end of the tasks or after `close`.

        Raises:
            TimeoutError: the results are not ready after `timeout_s`. `close` then does not wait
                for the threads.
            BaseException: the exception of the first failed task among them.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            first = self._released = self._taken
            if self._window - (self._begun - first) >= self._refill:
                self._window_open.notify()
            while True:
                last = min(first + count, self._end)
                self._missing = len(set(range(first, last)).difference(self._results))
                if self._closed or not self._missing:
                    break
                self._wanted = last
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    self._timed_out = True
                    raise TimeoutError
                self._results_ready.wait(remaining)
            if self._closed:
                return []
            self._wanted, self._taken = 0, last
            results: list[Any] = list(map(self._results.pop, range(first, last)))
            if self._errors:
                for k in range(first, last):
                    if k in self._errors:
                        raise self._errors.pop(k)
        return results

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> R:
        results = self.take()
        if not results:
            raise StopIteration
        return results[0]

    def close(self) -> None:
        """Drop the tasks not yet begun, and wait for the others unless a `take` has timed out."""
        self._stop()
        if not self._timed_out:
            self._join()

    def _stop(self) -> None:
        with self._lock:
            self._closed = True
            self._window_open.notify_all()
            self._results_ready.notify_all()
        if self._upstream is not None:
            self._upstream._stop()

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._upstream is not None:
            self._upstream._join()

    def _run(self) -> None:
        work = None
        while (claimed := self._claim()) is not None:
            number, task = claimed
            result, error = None, None
            try:
                work = work or self._new_worker()
                result = work(task)
            except StopIteration as raised:  # raised by `take`, it would end the consumer's loop silently (PEP 479)
                error = RuntimeError(f"a task raised {raised!r}")
            except BaseException as raised:  # `take` raises it
                error = raised
            self._finish(number, result, error)
            del claimed, task, result, error  # not kept alive while this thread waits

    def _claim(self) -> tuple[int, T] | None:
        """Wait for room; return the next task with its number, None at the end or if closed."""
        with self._claim_lock:
            with self._lock:
                while self._begun >= self._released + self._window and not self._closed:
                    self._window_open.wait()
                if self._closed or self._begun >= self._end:
                    return None
                number = self._begun
            try:
                task = next(self._tasks)
            except BaseException as error:  # an error of the iterator counts as its last result
                if not isinstance(error, StopIteration):
                    self._finish(number, None, error)
                    number += 1
                with self._lock:
                    self._begun = self._end = number
                    self._results_ready.notify()
                return None
            self._begun = number + 1
            return number, task

    def _finish(self, number: int, result: R | None, error: BaseException | None) -> None:
        with self._lock:
            if error is not None:
                self._errors[number] = error
            self._results[number] = result
            if number < self._wanted:
                self._missing -= 1
                if not self._missing:
                    self._results_ready.notify()


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], threads: int = 0) -> Iterator[R]:
    """Yield function(task) for all tasks, in order, computed in threads (0: one per core).

    Leaving the loop early drops the tasks not yet begun.
    """
    count = resolve_threads(threads)
    pool = PrefetchPool(
        lambda: function, tasks, threads=count, window=_TASKS_PER_THREAD * count, name="fastbyol-worker"
    )
    try:
        yield from pool
    finally:
        pool.close()
