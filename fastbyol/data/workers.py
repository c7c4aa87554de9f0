"""Threads for work on many images."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from fastbyol.runtime import cores

T = TypeVar("T")
R = TypeVar("R")
_IN_HAND = 8  # tasks begun or waiting per thread: more would only hold memory


def resolve_threads(threads: int) -> int:
    """The number of threads that a setting means: 0 is one per core that this process may use.

    Raises:
        ValueError: it is negative.
    """
    if threads < 0:
        raise ValueError(f"threads={threads}: must be 0 (one per core) or more")
    return threads or cores.available()


@contextmanager
def preserve_torch_threads() -> Iterator[None]:
    """Around what sets torch's number of threads without being asked: FFCV does it when it is imported and in its loader."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PrefetchPool(Generic[T, R]):
    """function(task) for all tasks, in order, made by threads that stay at most `window` tasks ahead of who takes the results.

    The threads are daemons: one that hangs, in a read from a disk that is gone, does not keep the process from ending.
    """

    def __init__(self, function: Callable[[T], R], tasks: Iterable[T], *, threads: int, window: int, name: str) -> None:
        self._function, self._tasks, self._window = function, iter(tasks), window
        self._done: dict[int, tuple[bool, Any]] = {}  # number of a task -> whether it went well, result or exception
        self._begun = self._taken = 0
        self._end: int | None = None  # number of tasks, once it is known
        self._closed = self._hung = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{k}", daemon=True) for k in range(threads)]
        for thread in self._threads:
            thread.start()

    def take(self, timeout_s: float | None = None) -> R:
        """The next result.

        Raises:
            StopIteration: there are no more.
            TimeoutError: it does not come within `timeout_s`.
            BaseException: what its task raised.
        """
        with self._changed:
            k = self._taken
            if not self._changed.wait_for(lambda: k in self._done or self._end == k, timeout_s):
                self._hung = True
                raise TimeoutError
            if k not in self._done:
                raise StopIteration
            well, value = self._done.pop(k)
            self._taken += 1
            self._changed.notify_all()
        if not well:
            raise value
        return value

    def close(self) -> None:
        """Drops the tasks not yet begun and waits for the others, unless they hang."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            if not self._hung:
                thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._begun < self._taken + self._window)
                if self._closed or self._end is not None:
                    return
                try:
                    task = next(self._tasks)
                except StopIteration:
                    self._end = self._begun
                    self._changed.notify_all()
                    return
                k, self._begun = self._begun, self._begun + 1
            try:
                result = True, self._function(task)
            except BaseException as error:  # whoever takes it raises it
                result = False, error
            with self._changed:
                self._done[k] = result
                self._changed.notify_all()


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], threads: int = 0) -> Iterator[R]:
    """function(task) for all tasks, in order, on `threads` threads; leaving early drops the tasks not yet begun."""
    count = resolve_threads(threads)
    ahead = PrefetchPool(function, tasks, threads=count, window=_IN_HAND * count, name="fastbyol-worker")
    try:
        while True:
            try:
                result = ahead.take()
            except StopIteration:
                return
            yield result
    finally:
        ahead.close()
