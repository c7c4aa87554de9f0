"""Build the wheel and the source archive, and install the wheel into a clean environment."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from helpers.common import HANG_S, ROOT

_NOT_COPIED = (".git", ".venv", ".venv-bench", "build", "dist", "data", "runs", "site")  # at the top level


@dataclass(frozen=True)
class Installation:
    """fastbyol as a user has it: installed from the wheel, without a checkout.

    Attributes:
        wheel: built from a copy of the checkout.
        sdist: built from the same copy.
        wheel_of_sdist: built from the unpacked sdist.
        bin: folder of the environment's `python` and `fastbyol`.
        package: folder that `import fastbyol` must find.
    """

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path
    bin: Path
    package: Path

    def run(self, *command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, such as "fastbyol", "doctor"; return its process."""
        name, *words = map(str, command)
        return subprocess.run(
            [str(self.bin / name), *words],
            cwd=cwd,
            env=_environment() | environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )


def install(folder: Path) -> Installation:
    """Build and install into a folder; processes that share it do so once."""
    folder.mkdir(exist_ok=True)
    with _locked(folder / "lock"):
        if not (folder / "done.json").exists():
            paths = _install(folder)
            (folder / "done.json").write_text(json.dumps({name: str(path) for name, path in paths.items()}))
        return Installation(**{k: Path(v) for k, v in json.loads((folder / "done.json").read_text()).items()})


def _install(folder: Path) -> dict[str, Path]:
    checkout, unpacked = folder / "checkout", folder / "unpacked"
    # Building leaves folders behind, and an old build/ would end up in the wheel.
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=_ignored)
    for name in ("data", "runs"):
        (checkout / name).mkdir()
        (checkout / name / "image.jpg").write_bytes(b"")
    wheel, sdist = _build(checkout, "wheel", folder), _build(checkout, "sdist", folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    wheel_of_sdist = _build(next(unpacked.iterdir()), "wheel", folder / "of_sdist")
    for temporary in (checkout, unpacked):
        shutil.rmtree(temporary)

    # torch is too large to install. A .pth file adds the site-packages of this environment to the
    # module path of the clean one: its packages can be imported, but its own .pth files, among them
    # that of an editable installation of this checkout, are not read. The clean environment comes
    # first on the path, so that its fastbyol hides an installed one.
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    pip = [
        str(environment / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    _run(pip, folder)
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment)}))
    others = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (purelib / "dependencies.pth").write_text("\n".join(others) + "\n")
    return {
        "wheel": wheel,
        "sdist": sdist,
        "wheel_of_sdist": wheel_of_sdist,
        "bin": environment / "bin",
        "package": purelib / "fastbyol",
    }


def _ignored(folder: str, names: list[str]) -> set[str]:
    top = set(_NOT_COPIED) if Path(folder) == ROOT else set()
    return {name for name in names if name in top or name == "__pycache__" or name.endswith(".egg-info")}


def _build(source: Path, kind: str, out: Path) -> Path:
    """Return the archive that the build backend writes, without its network-using front end."""
    code = f"import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    out.mkdir(exist_ok=True)
    return out / _run([sys.executable, "-c", code, str(out)], source).splitlines()[-1]


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _environment() -> dict[str, str]:
    """Return this process's environment without what leads to the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def files_of(archive: Path) -> set[str]:
    """Return the paths of all files in a wheel or sdist, without the folder around an sdist's."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        assert all(member.isfile() or member.isdir() for member in sdist)  # no links
        return {member.name.partition("/")[2] for member in sdist if member.isfile()}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
