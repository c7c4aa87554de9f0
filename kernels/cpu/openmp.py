"""Run compiled kernels on torch's own OpenMP threads.

A kernel is a function of a task index and a table of int64 arguments (addresses, sizes). `run`
calls it for every task. Threads draw tasks from a shared counter (dynamic scheduling), so results
must not depend on which thread runs which task: partial sums are kept per task, the work is split
by sizes alone, and the last thread to finish adds the partial sums in a fixed order (the
`epilogue`). The results are then bit-identical for any number of threads.

Why torch's threads: after a torch operation its OpenMP workers spin for a while and wait for the
next one. A separate pool would compete with them for the cores and pay for waking its threads on
every call. `GOMP_parallel`, the entry point that gcc's OpenMP code uses to start a parallel region,
accepts the address of any C function. It is looked up through torch's library, which resolves to
the OpenMP runtime that torch itself uses (LLVM's and Intel's runtimes export it too). Where it is
missing, as in macOS builds, a thread pool is used instead; `describe` reports which.
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
# Layout of a job, an int64 array: two shared counters, the job's description, then the kernel's
# arguments.
_STARTED, _FINISHED, _TASKS, _KERNEL, _EPILOGUE, _ARGS = range(6)


class Kernel:
    """A function f(task, args), compiled on first use and cached on disk.

    The function must not raise: an exception cannot leave it. Callers validate everything
    beforehand.

    Args:
        function: f(task: int, args: pointer to int64) -> None.
        options: numba's options, e.g. fastmath. The code is cached unless they disable it.
        signature: numba signature, if it differs from the above.
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
        """Address of the compiled function."""
        return self.compiled.address

    def compile(self) -> None:
        """Compile the function, or load it from the cache, unless already done."""
        _ = self.address

    @functools.cached_property
    def dispatcher(self) -> Any:
        """An uncompiled numba dispatcher of the same function, to inspect their common cache."""
        return njit(cache=True)(self.py_func)


def kernel(**options: Any) -> Callable[[Callable[..., None]], Kernel]:
    """Return a decorator that makes a `Kernel`, which runs without the GIL."""
    return lambda function: Kernel(function, options)


@intrinsic
def _fetch_add(typing_context, job, index):
    """Atomically increment an element of the job (acquire-release) and return its old value."""

    def generate(context, builder, signature, arguments):
        counter = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(_I64, 1), "acq_rel")

    return types.int64(job, types.int64), generate


@intrinsic
def _call(typing_context, address, task, job, index):
    """Call the kernel at an address with a task and the arguments at `index` of the job."""

    def generate(context, builder, signature, arguments):
        address, task, job, index = arguments
        function = ir.FunctionType(ir.VoidType(), [_I64, _I64.as_pointer()])
        builder.call(builder.inttoptr(address, function.as_pointer()), [task, builder.gep(job, [index])])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, job, types.int64), generate


def _work(job):
    """Body of the parallel region: run tasks until none is left."""
    tasks = job[_TASKS]
    task = _fetch_add(job, _STARTED)
    while task < tasks:
        _call(job[_KERNEL], task, job, _ARGS)
        if _fetch_add(job, _FINISHED) == tasks - 1 and job[_EPILOGUE] != 0:
            _call(job[_EPILOGUE], 0, job, _ARGS)
        task = _fetch_add(job, _STARTED)


_WORKER = Kernel(_work, {}, types.void(types.CPointer(types.int64)))
KERNELS = (_WORKER,)


@functools.cache
def _worker() -> Callable[[Any], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_WORKER.address)  # releases the GIL


Launch = Callable[[Any, int], None]  # (job, number of threads)


def _find_openmp() -> Launch | None:
    """Return a function that runs a job on torch's OpenMP threads; None if they are unavailable."""
    folder = Path(torch.__file__).parent / "lib"
    path = next((p for p in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib") if p.exists()), None)
    if path is None:
        return None
    try:
        # RTLD_NOLOAD: the library that this process has already loaded, never a second copy with
        # its own runtime.
        library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def launch(job: Any, threads: int) -> None:
        parallel(_WORKER.address, job, threads, 0)

    return launch


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-kernel")


def _launch_in_pool(job: Any, threads: int) -> None:
    """Run a job on this thread and a thread pool."""
    others = [_pool(threads - 1).submit(_worker(), job) for _ in range(threads - 1)]
    _worker()(job)
    for other in others:
        other.result()


_OPENMP = _find_openmp()
_launch: Launch = _launch_in_pool if _OPENMP is None else _OPENMP


def describe() -> str:
    """Describe the threads that run the kernels, for log lines."""
    where = "torch's OpenMP threads" if _launch is _OPENMP else "a thread pool (torch's OpenMP has no GOMP_parallel)"
    return f"{torch.get_num_threads()} of {where}"


def run(kernel: Kernel, tasks: int, args: Sequence[int], epilogue: Kernel | None = None) -> None:
    """Call kernel(task, args) for all tasks on as many threads as torch uses, and wait for them.

    Args:
        kernel: Called without the GIL.
        tasks: Number of tasks.
        args: int64 values passed to the kernel. The memory they point to must outlive the call.
        epilogue: Called as epilogue(0, args) by one thread after all tasks.
    """
    if tasks == 0:
        return
    header = (0, 0, tasks, kernel.address, 0 if epilogue is None else epilogue.address)
    job = (ctypes.c_int64 * (_ARGS + len(args)))(*header, *args)
    # All of torch's threads, even for few tasks: gcc's runtime ends the threads that a smaller
    # region leaves out, and the next torch operation would have to start new ones.
    threads = torch.get_num_threads()
    if threads == 1 or tasks == 1:
        _worker()(job)
    else:
        _launch(job, threads)
