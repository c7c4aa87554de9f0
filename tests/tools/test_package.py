"""Wheel and sdist: their files, and the installed package without a checkout."""

import re
import sysconfig
import tomllib
from email.parser import HeaderParser
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers.common import ROOT, jpeg
from helpers.installation import files_of

import fastbyol

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_files() -> set[str]:
    """Return the files of the package in the checkout, those of the linked folders included."""
    found = set()
    for folder, name in (("fastbyol", "fastbyol"), ("kernels", "fastbyol/kernels"), ("configs", "fastbyol/configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                found.add(f"{name}/{path.relative_to(ROOT / folder)}")
    return found


@pytest.mark.slow
def test_archives_hold_every_file_of_the_package_and_nothing_else(installation):
    version = fastbyol.__version__
    assert installation.wheel.name == f"fastbyol-{version}-py3-none-any.whl"
    assert installation.sdist.name == f"fastbyol-{version}.tar.gz"
    expected = package_files()
    assert {"fastbyol/py.typed", "fastbyol/configs/demo.yaml", "fastbyol/kernels/cpu/crop.py"} < expected
    wheel, sdist = files_of(installation.wheel), files_of(installation.sdist)
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    rest = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in sdist if not name.startswith("fastbyol.egg-info/")} == expected | rest


@pytest.mark.slow
def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(installation):
    assert installation.wheel_of_sdist.name == installation.wheel.name
    with ZipFile(installation.wheel) as first, ZipFile(installation.wheel_of_sdist) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        for name in first.namelist():
            if not name.endswith("/RECORD"):  # in the order of the file system
                assert first.read(name) == second.read(name), name


@pytest.mark.slow
def test_metadata_of_the_wheel(installation):
    with ZipFile(installation.wheel) as wheel:
        folder = f"fastbyol-{fastbyol.__version__}.dist-info"
        metadata = HeaderParser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        assert "fastbyol = fastbyol.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == fastbyol.__version__
    assert set(metadata.get_all("Provides-Extra")) == set(PYPROJECT["project"]["optional-dependencies"])


@pytest.mark.slow
def test_installed_package_is_the_one_of_the_wheel(installation, tmp_path):
    code = "import fastbyol, fastbyol.kernels.crop as c; print(fastbyol.__file__, c.__file__, sep='\\n')"
    done = installation.run("python", "-c", code, cwd=tmp_path)
    package = installation.package
    assert done.stdout.splitlines() == [str(package / "__init__.py"), str(package / "kernels" / "crop.py")], done.stderr
    done = installation.run("python", "-c", "import sys; print(*sys.path[1:], sep='\\n')", cwd=tmp_path)
    with_package = {path for path in done.stdout.splitlines() if (Path(path) / "fastbyol").exists()}
    assert with_package - {sysconfig.get_path("purelib")} == {str(package.parent)}  # no checkout


@pytest.mark.slow
def test_commands_of_the_installed_package(installation, tmp_path):
    def run(*words):
        done = installation.run("fastbyol", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("--version") == f"fastbyol {fastbyol.__version__}\n"
    names = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert re.findall(r"^(\w+)  ", run("configs"), re.MULTILINE) == names
    assert run("configs", "demo") == (ROOT / "configs" / "demo.yaml").read_text()
    assert run("train", "--config", "demo", "--help").startswith("usage: fastbyol train ")
    assert "ok    CPU kernels" in run("doctor")


@pytest.mark.slow
def test_training_and_report_of_the_installed_package(installation, tmp_path):
    for split, count in (("train", 16), ("val", 4)):
        for k in range(count):
            path = tmp_path / "images" / split / f"class{k % 2}" / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(k))
    small = ["--data.batch_size", "8", "--data.image_size_px", "32", "--model.width", "0.125", "--optim.epochs", "1"]
    words = ["train", "--config", "demo", "--data.root", "images", "--optim.warmup_epochs", "0", *small]
    done = installation.run("fastbyol", *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "demo"
    assert '"step": 2' in (run / "metrics.jsonl").read_text()
    (run / "report.html").unlink()
    done = installation.run("fastbyol", "report", "--run", "runs/demo", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "<html" in (run / "report.html").read_text()


def test_version_is_in_one_place_and_in_the_changelog():
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "fastbyol.__version__"}}
    release = re.fullmatch(r"(\d+\.\d+\.\d+)(\.dev\d+)?", fastbyol.__version__)
    newest = re.search(r"^## \[(.+?)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == release[1]
    assert (newest[2] == "unreleased") == (release[2] is not None)


def texts():
    """Yield the files that may name an extra."""
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "Dockerfile", "pyproject.toml"))
    for folder in ("docs", "fastbyol", "kernels", "benchmarks", "tests", "recipes", ".github"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".md", ".py", ".yaml", ".yml", ".sh") and path.name != "test_package.py":
                yield path


def test_extras_that_texts_name_exist():
    """In `pip install '.[x]'`, 'fastbyol[x]' or FILE.whl[x], and in `uv pip install --extra x`."""
    known, found = set(PYPROJECT["project"]["optional-dependencies"]), set()
    for path in texts():
        text = path.read_text().replace("\\\n", " ")
        for words in re.findall(r"(?:pip3? install |fastbyol\[).*", text):
            named = re.findall(r"(?:fastbyol|\.|\.whl)\[([a-z][\w,-]*)\]|--extra[ =]([\w-]+)", words)
            extras = {extra for several, one in named for extra in (one or several).split(",")}
            assert extras <= known, f"{path.relative_to(ROOT)}: {words}"
            found |= extras
    assert {"dev", "docs", "onnx"} <= found  # the expression finds them
