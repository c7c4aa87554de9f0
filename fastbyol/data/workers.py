"""Threads for work on many images."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
_IN_HAND = 8  # tasks begun or waiting per thread: more would only hold memory


def cpu_threads(threads: int) -> int:
    """The number of threads that a setting means: 0 is one per core that this process may use."""
    return threads or len(os.sched_getaffinity(0))


@contextmanager
def torchs_threads_kept() -> Iterator[None]:
    """Around what sets torch's number of threads without being asked: FFCV does it when it is imported and in its loader."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_order(function: Callable[[T], R], tasks: Iterable[T], threads: int = 0) -> Iterator[R]:
    """function(task) for all tasks, in order, on `threads` threads; leaving early drops the tasks not yet begun."""
    count = cpu_threads(threads)
    pool = ThreadPoolExecutor(count, thread_name_prefix="fastbyol-worker")
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            pending.append(pool.submit(function, task))
            if len(pending) >= _IN_HAND * count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
