"""numba's cache of compiled kernels: filled once, and never stale."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.common import HANG_S

from fastbyol.kernels.cpu import augment, batch_norm, crop, jit_cache, lars_ema, max_pool, openmp


@pytest.mark.slow
def test_second_start_loads_the_kernels_from_the_cache():
    """A new process must neither compile nor log that it does."""
    jit_cache.compile_cpu_kernels()
    code = (
        "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s');"
        "from fastbyol.kernels.cpu import augment, crop, jit_cache; jit_cache.compile_cpu_kernels();"
        "kernels = (crop.crop_kernel, augment.augment_kernel);"
        "print(sum(sum(k.stats.cache_misses.values()) for k in kernels))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert result.stdout.split() == ["0"]
    assert "compiling" not in result.stderr


def test_first_start_logs_that_it_compiles(monkeypatch, log_lines):
    monkeypatch.setattr(jit_cache, "_is_complete", lambda: False)
    jit_cache.compile_cpu_kernels()
    assert "compiling the CPU kernels" in log_lines[0]


def test_complete_cache_logs_nothing(monkeypatch, log_lines):
    monkeypatch.setattr(jit_cache, "_LOG_ABOVE_S", 1e9)  # a loaded machine may take long
    jit_cache.compile_cpu_kernels()
    assert log_lines == []


def test_kernels_older_than_an_inlined_module_are_removed(tmp_path):
    kernel = SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path)), py_func=crop.crop_kernel.py_func)
    names = ("crop.crop_kernel-1", "crop.crop_kernel-2", "crop.callee-1", "cropped.crop_kernel-1")
    older, newer, callee, other = (tmp_path / f"{name}.py311.nbi" for name in names)
    changed = jit_cache._last_change()
    for path in (older, newer, callee, other):
        path.touch()
        when = changed + 10 if path == newer else changed - 10
        os.utime(path, (when, when))
    jit_cache._remove_stale([kernel])
    assert [path.exists() for path in (older, newer, callee, other)] == [False, True, False, True]


COMPILED = {"njit", "openmp.kernel", "intrinsic", "_block_loop"}  # decorators


def compiled_functions(tree):
    """Yield the functions of a module that numba compiles, or that generate code for it."""
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            inner = [node for node in ast.walk(function) if isinstance(node, ast.FunctionDef)]
            decorators = {ast.unparse(d).split("(")[0] for node in inner for d in node.decorator_list}
            if decorators & COMPILED or function.name == "_work":
                yield function


@pytest.mark.parametrize("module", [augment, batch_norm, crop, lars_ema, max_pool, openmp], ids=lambda m: m.__name__)
def test_compiled_functions_inline_only_modules_that_are_checked(module):
    """numba's cache does not notice a change in any other file."""
    tree = ast.parse(Path(inspect.getfile(module)).read_text())
    imports = {}  # name in this file -> module that it is, or is from
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastbyol"):
            for name in (alias.asname or alias.name for alias in node.names):
                value = getattr(module, name)
                imports[name] = value.__name__ if inspect.ismodule(value) else node.module
    functions = list(compiled_functions(tree))
    assert functions
    checked = {m.__name__ for m in jit_cache.INLINED}
    for function in functions:
        body = [node for statement in function.body for node in ast.walk(statement)]
        used = {node.id for node in body if isinstance(node, ast.Name)}
        assert {imports[name] for name in used & imports.keys()} <= checked, function.name
