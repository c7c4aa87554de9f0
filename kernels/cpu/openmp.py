"""Compiled kernels on torch's own OpenMP threads.

A kernel is a function of a unit's number and a table of int64 words (addresses, sizes); `run` calls it for every unit. Threads
take the next unit when they are done with one, from a counter that they share, so a kernel's result must not depend on
which thread has which unit: partial sums are kept per unit, units are cut by sizes alone, and the last thread to be done
adds the sums in a fixed order (`finish`). Then the bits are the same for any number of threads.

Why torch's threads: after an operation of torch its OpenMP workers spin for a while, waiting for the next one. Threads of a pool
of our own have to share the cores with them, and a call pays for waking them up. `GOMP_parallel`, by which compiled
OpenMP code of gcc starts a parallel region, takes the address of any C function. It is looked up through torch's library, which
finds the OpenMP runtime that torch itself uses (LLVM's and Intel's export it too). Where there is none, as in macOS builds,
a pool of threads is used instead; `describe` says which.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

_I64 = ir.IntType(64)
_SIGNATURE = types.void(types.int64, types.CPointer(types.int64))
_TAKEN, _DONE, _UNITS, _KERNEL, _FINISH, _WORDS = range(6)  # places in a job; the kernel's words begin at the last


class Kernel:
    """A function f(unit, words) that is compiled when it is first needed, and cached on disk.

    Nothing may go wrong inside of it: an exception could not leave it. Callers check everything before.

    Args:
        function: f(unit: int, words: pointer to int64), without a result.
        options: numba's, e.g. fastmath; cached unless they say otherwise.
        signature: another one than that.
    """

    def __init__(
        self, function: Callable[..., None], options: dict[str, Any], signature: types.Type = _SIGNATURE
    ) -> None:
        self.py_func = function
        self._options, self._signature = options, signature

    @functools.cached_property
    def compiled(self) -> Any:
        """numba's C callback."""
        return cfunc(self._signature, **{"cache": True} | self._options)(self.py_func)

    @functools.cached_property
    def address(self) -> int:
        """Of the compiled function."""
        return self.compiled.address

    def compile(self) -> None:
        """Compiles the function, or loads it from the cache, unless that has been done."""
        _ = self.address

    @functools.cached_property
    def dispatcher(self) -> Any:
        """numba's usual wrapper of the same function, to ask about the cache that both have; compiles nothing."""
        return njit(cache=True)(self.py_func)


def kernel(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator that makes a `Kernel`; numba releases the GIL for all of them."""
    return lambda function: Kernel(function, options)


@intrinsic
def _next(typing_context, job, place):
    """Adds one to a word of the job and returns what it was before; orders the memory accesses of the threads around it."""

    def generate(context, builder, signature, arguments):
        counter = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(_I64, 1), "acq_rel")

    return types.int64(job, types.int64), generate


@intrinsic
def _call(typing_context, address, unit, job, place):
    """Calls the kernel at an address with a unit and the words that begin at a place of the job."""

    def generate(context, builder, signature, arguments):
        address, unit, job, place = arguments
        function = ir.FunctionType(ir.VoidType(), [_I64, _I64.as_pointer()])
        builder.call(builder.inttoptr(address, function.as_pointer()), [unit, builder.gep(job, [place])])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, job, types.int64), generate


def _work(job):
    """What every thread of a parallel region does."""
    units = job[_UNITS]
    unit = _next(job, _TAKEN)
    while unit < units:
        _call(job[_KERNEL], unit, job, _WORDS)
        if _next(job, _DONE) == units - 1 and job[_FINISH] != 0:
            _call(job[_FINISH], 0, job, _WORDS)
        unit = _next(job, _TAKEN)


_WORKER = Kernel(_work, {}, types.void(types.CPointer(types.int64)))
KERNELS = (_WORKER,)


@functools.cache
def _worker_call() -> Callable[[Any], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_WORKER.address)  # releases the GIL


Start = Callable[[Any, int], None]


def _openmp() -> Start | None:
    """Starts a job on torch's OpenMP threads; None where torch's library or the symbol is not there."""
    folder = Path(torch.__file__).parent / "lib"
    path = next((p for p in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib") if p.exists()), None)
    if path is None:
        return None
    try:
        # The library as this process has loaded it already: never a second copy with a runtime of its own.
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def start(job: Any, threads: int) -> None:
        parallel(_WORKER.address, job, threads, 0)

    return start


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-kernel")


def _in_pool(job: Any, threads: int) -> None:
    """Starts a job in this thread and a pool."""
    others = [_pool(threads - 1).submit(_worker_call(), job) for _ in range(threads - 1)]
    _worker_call()(job)
    for other in others:
        other.result()


_OPENMP = _openmp()
_start: Start = _in_pool if _OPENMP is None else _OPENMP  # chosen once


def describe() -> str:
    """Which threads run the kernels, for people to read."""
    where = "torch's OpenMP threads" if _start is _OPENMP else "a thread pool (torch's OpenMP has no GOMP_parallel)"
    return f"{torch.get_num_threads()} of {where}"


def run(kernel: Kernel, units: int, words: Sequence[int], finish: Kernel | None = None) -> None:
    """Calls kernel(unit, words) for units 0 .. units - 1, in as many threads as torch uses; returns when all are done.

    Args:
        kernel: called without the GIL. What the words point to has to live until this returns.
        words: int64, handed to the kernel as they are.
        finish: called as finish(0, words) by one thread, when all units are done.
    """
    if units == 0:
        return
    head = (0, 0, units, kernel.address, 0 if finish is None else finish.address)
    job = (ctypes.c_int64 * (_WORDS + len(words)))(*head, *words)
    # All of torch's threads, also for few units: gcc's runtime ends the threads that a smaller region leaves out, and the next
    # operation of torch would have to make new ones.
    threads = torch.get_num_threads()
    if threads == 1 or units == 1:
        _worker_call()(job)
    else:
        _start(job, threads)
