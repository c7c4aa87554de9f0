"""Where the package is found and where it keeps its caches, wherever it is started."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbyol

ROOT = Path(fastbyol.__file__).resolve().parent.parent


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("start", [["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m"]])
def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path, start):
    """As in the folder above a clone."""
    (tmp_path / "fastbyol").mkdir()
    done = python(*start, "fastbyol", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fastbyol {fastbyol.__version__}\n"), done.stderr
    code = "import fastbyol, fastbyol.kernels, fastbyol.data; print(fastbyol.__path__, fastbyol.kernels.__path__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == f"{[str(ROOT / 'fastbyol')]} {[str(ROOT / 'fastbyol' / 'kernels')]}\n"


def test_another_checkout_is_used_whole_and_named(tmp_path):
    for name in ("fastbyol", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-m", "fastbyol", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fastbyol {fastbyol.__version__}\n")
    assert done.stderr == (
        f"fastbyol: note: this runs {tmp_path / 'fastbyol'}, of the current folder, not the installed {ROOT / 'fastbyol'}\n"
    )
    code = "import fastbyol.kernels.crop, fastbyol.cli; print(fastbyol.kernels.crop.__file__, fastbyol.cli.__file__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'fastbyol/kernels/crop.py'} {tmp_path / 'fastbyol/cli.py'}\n"


def test_kernels_lies_beside_the_package_and_is_part_of_it():
    assert (ROOT / "fastbyol" / "kernels").resolve() == ROOT / "kernels"
