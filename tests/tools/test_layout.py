"""Import layers of the package, and names used by tests and benchmarks."""

import ast
import importlib
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from types import ModuleType

import pytest
from helpers.common import ROOT

CORE = (
    *(
        "backbones",
        "layers",
        "precision",
        "schedules",
        "loss",
        "variants",
        "model",
        "optim",
        "parallel",
        "tuning",
        "cuda_graph",
        "step",
    ),
    *("batch_size", "build", "callbacks", "resume", "run", "loop"),
)
LAYERS = [  # lowest first: a module may import its own layer and those below
    {"kernels"},
    {"errors", "settings", "config", "plugins", "runtime", "spans"},
    {"data"},
    set(CORE),
    {"weights"},
    {"evaluation"},
    {"trackers"},
    {"api"},
    {"tools"},
    {"cli"},
]


def modules():
    for path in sorted((ROOT / "fastbyol").rglob("*.py")):
        parts = path.relative_to(ROOT / "fastbyol").with_suffix("").parts
        if parts not in (("__init__",), ("__main__",)):
            yield parts[0], path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def imported(path):
    """Yield the fastbyol modules that a file imports, except under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastbyol":
            for alias in node.names:
                inner = node.module.split(".")[1:]
                name = ".".join([*inner, alias.name])
                yield (
                    name
                    if (ROOT / "fastbyol" / name.replace(".", "/")).with_suffix(".py").exists()
                    else ".".join(inner)
                )
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fastbyol.") for a in node.names if a.name.startswith("fastbyol."))


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: getattr(value, "stem", value))
def test_imports_respect_the_layers(module, path):
    """The core imports no satellite, and kernels/ imports no other layer."""
    depth = next(k for k, layer in enumerate(LAYERS) if module in layer)
    assert not {name.split(".")[0] for name in imported(path)} - {""} - set().union(*LAYERS[: depth + 1])


def test_imports_have_no_cycles():
    graph = {}
    for _, path in modules():
        root = ROOT if path.is_relative_to(ROOT / "kernels") else ROOT / "fastbyol"
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {other for other in imported(path) if other and other != name}
    TopologicalSorter(graph).prepare()  # raises CycleError


def scripts():
    for path in sorted(path for folder in ("tests", "tests/gpu", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")):
        marks = [pytest.mark.ffcv] if "from fastbyol.data import ffcv" in path.read_text() else []
        yield pytest.param(path, marks=marks, id=path.name)


@pytest.mark.parametrize("path", list(scripts()))
def test_names_used_by_tests_and_benchmarks_exist(path):
    """Checks names statically, since many scripts run only on a GPU."""
    tree = ast.parse(path.read_text())
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastbyol":
            if node.module.startswith("fastbyol.kernels.triton"):
                continue  # the import would fix Triton's mode in this process
            module = importlib.import_module(node.module)
            for alias in node.names:
                if f"{node.module}.{alias.name}" == "fastbyol.kernels.triton":
                    continue
                inner = getattr(module, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
                if isinstance(inner, ModuleType):
                    known[alias.asname or alias.name] = inner
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            assert hasattr(known[node.value.id], node.attr), f"{path.name}:{node.lineno}: {node.value.id}.{node.attr}"


# Packages that a GPU machine may lack. scikit-image has the photographs of the test corpus.
OPTIONAL = (
    *("nvidia.dali", "ffcv", "onnx", "onnxscript", "onnxruntime", "hypothesis", "lightly", "pytest_benchmark"),
    *("pytest_timeout", "skimage", "ruff"),
)


@pytest.mark.slow
def test_gpu_tests_collect_without_optional_packages():
    """Collects in a process without the optional packages and without pytest plugins."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None makes imports fail
import pytest
sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"]))
"""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert files == {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert "deselected" not in done.stdout  # every test has the marker


def test_license_is_apache_2():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()
