"""Import of the package from any working directory, and cache folders."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fastbyol
from fastbyol.runtime import caches

ROOT = Path(fastbyol.__file__).resolve().parent.parent


def python(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("start", [["-m"], ["-m", "torch.distributed.run", "--nproc-per-node", "1", "-m"]])
def test_folder_named_fastbyol_does_not_hide_the_package(tmp_path, start):
    """The parent folder of a clone is such a working directory."""
    (tmp_path / "fastbyol").mkdir()
    done = python(*start, "fastbyol", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fastbyol {fastbyol.__version__}\n"), done.stderr
    code = "import fastbyol, fastbyol.kernels, fastbyol.data; print(fastbyol.__path__, fastbyol.kernels.__path__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == f"{[str(ROOT / 'fastbyol')]} {[str(ROOT / 'fastbyol' / 'kernels')]}\n"


def test_checkout_in_the_current_folder_is_used_and_reported(tmp_path):
    for name in ("fastbyol", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    done = python("-m", "fastbyol", "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"fastbyol {fastbyol.__version__}\n")
    assert done.stderr == (
        f"fastbyol: note: this runs {tmp_path / 'fastbyol'}, not the installed {ROOT / 'fastbyol'}\n"
    )
    code = "import fastbyol.kernels.crop, fastbyol.cli; print(fastbyol.kernels.crop.__file__, fastbyol.cli.__file__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'fastbyol/kernels/crop.py'} {tmp_path / 'fastbyol/cli.py'}\n"


def test_kernels_is_a_symlink_to_the_top_level_folder():
    assert (ROOT / "fastbyol" / "kernels").resolve() == ROOT / "kernels"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that calls caches.prepare() with simulated permissions.

    It returns the note, the error and the changed environment variables.
    """

    def prepare(*, home, writable, user="someone"):
        def nobody():
            raise KeyError("getpwuid(): uid not found: 12345")

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        for name in ("XDG_CACHE_HOME", "TRITON_HOME", "MPLCONFIGDIR", "LOGNAME", "HOME", *caches._VARIABLES):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(caches.getpass, "getuser", nobody if user is None else lambda: user)
        monkeypatch.setattr(caches.Path, "home", no_home if home is None else lambda: home)
        monkeypatch.setattr(caches.os, "access", lambda path, how: str(path).startswith(writable))
        monkeypatch.setattr(caches, "note", None)
        monkeypatch.setattr(caches, "error", None)
        before = dict(os.environ)
        caches.prepare()
        return caches.note, caches.error, {k: v for k, v in os.environ.items() if before.get(k) != v}

    return prepare


def test_writable_home_changes_nothing(machine, tmp_path):
    assert machine(home=tmp_path / "home", writable=str(tmp_path)) == (None, None, {})


def test_caches_without_a_home_are_in_a_private_folder(machine, tmp_path):
    folder = tmp_path / f"fastbyol-{os.getuid()}"
    note, error, changed = machine(home=None, user=None, writable=str(tmp_path))
    assert (note, error) == (f"there is no home folder: caches are kept in {folder}", None)
    assert changed["LOGNAME"] == f"uid{os.getuid()}"
    assert {changed[key] for key in ("HOME", "XDG_CACHE_HOME", "TRITON_HOME")} == {str(folder)}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_read_only_home_stays_the_home(machine, tmp_path):
    note, _, changed = machine(home=Path("/read-only"), writable=str(tmp_path))
    assert note.startswith("/read-only/.cache cannot be written: caches are kept in ")
    assert "HOME" not in changed
    assert changed["XDG_CACHE_HOME"] == str(tmp_path / f"fastbyol-{os.getuid()}")


@pytest.mark.parametrize(
    "place", [".cache/numba", ".cache/numba/kernels_1", ".cache/fastbyol", ".triton", ".triton/cache"]
)
def test_read_only_cache_folder_is_detected(machine, monkeypatch, tmp_path, place):
    """A run with sudo leaves such folders."""
    home = tmp_path / "home"
    (home / place).mkdir(parents=True)
    note, _, changed = machine(home=home, writable=str(tmp_path))
    assert (note, changed) == (None, {})
    monkeypatch.setattr(caches, "_can_write", lambda folder: home / place not in (folder, *folder.parents))
    monkeypatch.setattr(caches, "_fallback", lambda: tmp_path / "instead")
    monkeypatch.setattr(caches, "note", None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    caches.prepare()
    assert caches.note.startswith(str(home / place))
    assert os.environ["XDG_CACHE_HOME"] == os.environ["TRITON_HOME"] == str(tmp_path / "instead")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path / "instead"))


@pytest.mark.parametrize("variable", sorted(caches._VARIABLES))
def test_variable_with_a_read_only_folder_is_replaced(machine, monkeypatch, tmp_path, variable):
    original = monkeypatch.delenv
    monkeypatch.setattr(monkeypatch, "delenv", lambda name, **how: None if name == variable else original(name, **how))
    monkeypatch.setenv(variable, "/read-only/x")
    note, _, changed = machine(home=tmp_path / "home", writable=str(tmp_path))
    assert note.startswith("/read-only/x cannot be written: caches are kept in ")
    assert changed[variable].startswith(changed["XDG_CACHE_HOME"])


def test_folder_writable_by_others_is_not_used(machine, tmp_path):
    (tmp_path / f"fastbyol-{os.getuid()}").mkdir()
    (tmp_path / f"fastbyol-{os.getuid()}").chmod(0o777)
    _, _, changed = machine(home=None, writable=str(tmp_path))
    assert changed["XDG_CACHE_HOME"] not in ("", str(tmp_path / f"fastbyol-{os.getuid()}"))
    assert Path(changed["XDG_CACHE_HOME"]).stat().st_mode & 0o777 == 0o700


def test_error_without_a_writable_folder_is_one_line(machine, monkeypatch, capsys):
    _, error, changed = machine(home=Path("/read-only"), writable="/nothing")
    assert error.startswith("no folder for caches can be written, neither /read-only/.cache nor a temporary one")
    assert changed == {}
    from fastbyol.cli import main

    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == f"fastbyol: error: {error}\n"


@pytest.mark.slow
@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can switch users with setpriv"
)
def test_user_without_home_and_passwd_entry():
    """The installation is read-only; the user may read root's files, in case it is in /root."""
    rights = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", *rights]
    with tempfile.TemporaryDirectory() as temporary:  # other users cannot read pytest's folders
        Path(temporary).chmod(0o777)
        clean = ["env", "-i", f"PATH={os.environ['PATH']}", f"TMPDIR={temporary}"]
        command = [*user, *clean, sys.executable, "-m", "fastbyol", "doctor"]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "ok    CPU kernels" in done.stdout
        assert (
            done.stderr == f"fastbyol: note: there is no home folder: caches are kept in {temporary}/fastbyol-54321\n"
        )
