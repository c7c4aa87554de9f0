"""Test and benchmark everything on a CUDA machine, the most informative parts first (`make gpu`).

    python benchmarks/gpu.py                                # all groups: first, measure, rest
    python benchmarks/gpu.py --group first --seconds 480    # facts, tests, short trainings
    python benchmarks/gpu.py --group measure --seconds 590  # ResNet-50 step against baselines
    python benchmarks/gpu.py --dry-run                      # list the parts and their time limits
    cp runs/gpu/*_cuda.csv benchmarks/results/              # keep the results

The script needs only the interpreter's packages: it runs fastbyol from the checkout, installed or
not, and downloads nothing. Each part runs in a separate process group with a time limit. A part
that fails or hangs costs at most its limit, and the log has the Python stacks of a hanging part.
The table names missing packages and programs. Parts that exceed the rest of --seconds are skipped.

--work DIR (default runs/gpu) keeps state, corpora, runs and compiler caches. The same command again
continues with the parts that are not ok yet. --out DIR (default: --work) receives gpu.log, the live
output of all parts, and the result files, which are rewritten after every measurement.
FASTBYOL_COMMIT sets the commit of the results if .git is missing.

Expected times were measured on one H100 with cold caches. Those of the tests, the features, the
profile, whole runs, the kernel report and slow augmenters are estimates. The exit code is 0 if all
parts are ok. A part is ok if its exit code is 0 and, for tests, at least one test ran.
"""

import argparse
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
GRACE_S = 5  # time for a part to print its stacks after its limit
CUDA_BIN = "/usr/local/cuda/bin"  # appended to PATH
R50 = "R50 224 px, batch 256"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command."""

    name: str
    command: list[str]
    expected_s: int
    """Measured on one H100, or an estimate (see the module's docstring)."""
    limit_s: int
    fresh: tuple[Path, ...] = ()
    """Outputs of earlier attempts that are removed before the part starts."""
    report: Path | None = None
    """pytest's JUnit file, since pytest's exit code is 0 even if all tests are skipped."""


@dataclass(frozen=True)
class Result:
    """Outcome of a part."""

    state: str
    """ok, exit N, timeout, missing, skipped, over budget or unfinished."""
    seconds: float = 0.0
    last: str = ""
    """Last line of the output."""


def parts(work: Path, out: Path) -> dict[str, list[Part]]:
    """Return the parts of each group, in order; a part in two groups runs once."""
    photos, corpus, runs = work / "photos", work / "photos-500px", work / "runs"

    def fastbyol(*words: str) -> list[str]:
        return [PYTHON, "-m", "fastbyol", *words]

    def script(name: str, *words: str) -> list[str]:
        return [PYTHON, f"benchmarks/{name}.py", *words]

    def pytest(name: str, *words: str, expected_s: int, limit_s: int, under: tuple[str, ...] = ()) -> Part:
        report = work / f"{name.replace(' ', '-')}.xml"
        # Show only stdout of failing tests: torch's traces have thousands of lines.
        options = f"-p no:cacheprovider -rs --tb=short --show-capture=stdout --durations=30 --junitxml={report}".split()
        command = [*under, PYTHON, "-m", "pytest", *options, *words]
        return Part(name=name, command=command, expected_s=expected_s, limit_s=limit_s, report=report)

    def benchmark(name: str, *words: str, results: Path = out, expected_s: int, limit_s: int) -> Part:
        options = ["--devices", "cuda", "--results", str(results), "--benchmark-disable-gc"]
        return pytest(name, *words, *options, expected_s=expected_s, limit_s=limit_s)

    def train(name: str, *options: str, expected_s: int, limit_s: int) -> Part:
        words = ["--config", "configs/demo.yaml", "--device", "cuda", "--name", name, "--runs", str(runs)]
        words += ["--data.root", str(photos), "--optim.epochs", "2", *options]
        command, folder = fastbyol("train", *words), runs / name
        return Part(name=f"train {name}", command=command, expected_s=expected_s, limit_s=limit_s, fresh=(folder,))

    def prepare(name: str, folder: Path, *options: str, expected_s: int, limit_s: int) -> Part:
        command = fastbyol("prepare", "photos", "--out", str(folder), *options)
        return Part(name=name, command=command, expected_s=expected_s, limit_s=limit_s, fresh=(folder,))

    def on_gpu(name: str, result: str, *words: str, expected_s: int, limit_s: int, title: str) -> Part:
        command = script(name, *words, "--rounds", "1", "--out", str(out / result))
        return Part(name=title, command=command, expected_s=expected_s, limit_s=limit_s)

    small = prepare("photos", photos, "--images", "3600", "--size", "80", expected_s=10, limit_s=60)
    big = prepare("corpus", corpus, "--images", "5000", expected_s=20, limit_s=180)
    # One process per file, so that their compilations run in parallel.
    parallel = ["-n", "5", "--dist", "loadfile"] if find_spec("xdist") else []
    lars, augment = "benchmarks/bench_lars_ema.py", "benchmarks/bench_augment.py"
    first = [
        Part(name="facts", command=script("gpu", "--facts"), expected_s=6, limit_s=60),
        Part(name="doctor", command=fastbyol("doctor"), expected_s=35, limit_s=90),
        pytest("tests", "tests/gpu", *parallel, "-o", "timeout=200", expected_s=180, limit_s=400),
        small,
        train("eager", "--step.mode", "eager", expected_s=40, limit_s=90),
        train("compile", "--step.mode", "compile", expected_s=100, limit_s=180),
        train("cuda_graph", "--step.mode", "cuda_graph", expected_s=50, limit_s=150),
        benchmark(
            "own kernels", lars, augment, "--rounds", "1", "-k", "fastbyol or copy", results=out / "own_kernels",
            expected_s=20, limit_s=120,
        ),
    ]  # fmt: skip
    contenders = ["fastbyol", "plain torch compiled", "plain torch compiled graphs", "fastbyol cudnn", "supervised"]
    contenders += ["plain torch channels-last bf16", "fastbyol eager"]
    r50 = ["--device", "cuda", "--sets", R50]
    profile = ["--config", "configs/imagenet_r50_100ep.yaml", "--data.root", str(corpus), "--data.batch_size", "256"]
    profile += ["--device", "cuda", "--steps", "20", "--out", str(out / "profile_r50")]
    measure = [
        Part(name="tune", command=fastbyol("tune", "--data.batch_size", "256"), expected_s=120, limit_s=300),
        on_gpu(
            "bench_step", "step_cuda.csv", *r50, "--only", *contenders, expected_s=450, limit_s=540, title="step R50"
        ),
        benchmark("batch norm", "benchmarks/bench_batch_norm.py", "--rounds", "1", expected_s=65, limit_s=150),
        benchmark("lars and target", lars, "--rounds", "1", expected_s=30, limit_s=120),
    ]
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--report-api-errors", "no")
    rest = [
        big,
        on_gpu(
            "bench_loader", "loader_cuda.csv", "--set", "loader_cuda", "--seconds", "4", expected_s=30, limit_s=240,
            title="loaders",
        ),
        on_gpu(
            "bench_features", "features_cuda.csv", "--device", "cuda", "--images", "10000", expected_s=150, limit_s=300,
            title="features",
        ),
        Part(name="profile R50", command=fastbyol("profile", *profile), expected_s=330, limit_s=500),
        small,
        train("fp16", "--precision", "fp16", "--step.mode", "cuda_graph", expected_s=85, limit_s=150),
        on_gpu("bench_train", "train_cuda.csv", *r50, "--seconds", "15", expected_s=180, limit_s=360, title="whole runs"),
        pytest(
            "memcheck", "tests/gpu/test_kernels.py", "-k", "not twenty_steps", under=sanitizer, expected_s=15, limit_s=240
        ),
        Part(name="kernel report", command=[PYTHON, "benchmarks/kernel_resources.py"], expected_s=30, limit_s=120),
        # torchvision launches about a hundred kernels per view.
        benchmark(
            "slow augmenters", augment, "--rounds", "1", "--views", "16", results=out / "16_views", expected_s=60, limit_s=180
        ),
        Part(
            name="table", command=script("against", "--device", "cuda", "--results", str(out)), expected_s=3, limit_s=30
        ),
    ]  # fmt: skip
    return {"first": first, "measure": measure, "rest": rest}


def environment(work: Path) -> dict[str, str]:
    """Return the environment of the parts.

    The checkout comes first in PYTHONPATH. Compiler caches are in WORK, unless already configured.
    """
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(work / "cache" / "inductor"),
        "TRITON_CACHE_DIR": str(work / "cache" / "triton"),
    }
    env = caches | os.environ
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), CUDA_BIN]))
    env["FASTBYOL_CORPUS"] = str(work / "photos-500px")
    return env | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def run(part: Part, limit_s: float, log: Path, env: dict[str, str]) -> Result:
    """Run a part until its end or limit, then kill the rest of its process group."""
    began = time.monotonic()
    for path in (*part.fresh, *([part.report] if part.report else [])):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with open(log, "a") as file:
        file.write(f"\n===== {part.name}: {' '.join(part.command)}\n")
        file.flush()
        start = file.tell()
        try:
            process = subprocess.Popen(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            return Result("missing", 0.0, f"{part.command[0]}: {error.strerror}")
        code = None
        try:
            code = process.wait(limit_s)
            lines = _lines(log, start)
        except subprocess.TimeoutExpired:
            lines = _lines(log, start)
            process.send_signal(signal.SIGABRT)  # Python's faulthandler prints the stacks of all threads
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:  # also after an interrupt
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(_state(part, code, lines), round(time.monotonic() - began, 1), lines[-1] if lines else "")


def _state(part: Part, code: int | None, lines: list[str]) -> str:
    if code is None:
        return "timeout"
    if code != 0:
        missing = any(re.search(r"No module named", line) for line in lines[-3:])
        return "missing" if missing else f"exit {code}"
    return "skipped" if part.report is not None and not _tests_that_ran(part.report) else "ok"


def _tests_that_ran(report: Path) -> int:
    """Return the number of executed tests in a JUnit file; 0 if it is missing."""
    if not report.exists():
        return 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    return sum(int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) for suite in suites)


def _lines(log: Path, start: int) -> list[str]:
    """Return the lines of a part's output, without colors, empty lines and carriage returns."""
    with open(log, "rb") as file:
        file.seek(start)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read().decode(errors="replace"))
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def run_all(chosen: list[Part], work: Path, out: Path, seconds: float | None, again: bool) -> dict[str, Result]:
    """Run the parts that are not ok yet (or all), save the state after each, return all results."""
    began, state, log = time.monotonic(), work / "parts.json", out / "gpu.log"
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    results = {name: Result(**fields) for name, fields in _read(state).items()}

    def keep(name: str, result: Result) -> None:
        results[name] = result
        for path in {state, out / "parts.json"}:
            unfinished = path.with_suffix(".new")
            unfinished.write_text(json.dumps({name: asdict(each) for name, each in results.items()}, indent=1))
            unfinished.replace(path)

    for part in chosen:
        if not again and part.name in results and results[part.name].state == "ok":
            continue
        left = float("inf") if seconds is None else seconds - GRACE_S - (time.monotonic() - began)
        if left < part.expected_s:
            keep(
                part.name, Result("over budget", 0.0, f"needs about {part.expected_s} s; {max(left, 0):.0f} s are left")
            )
            continue
        print(f"{part.name}: about {part.expected_s} s, at most {min(part.limit_s, left):.0f} s", flush=True)
        keep(part.name, Result("unfinished"))  # remains if this script is killed
        keep(part.name, run(part, min(part.limit_s, left), log, environment(work)))
        print(row(part.name, results[part.name]), flush=True)
    return {part.name: results[part.name] for part in chosen}


def _read(state: Path) -> dict[str, dict]:
    return json.loads(state.read_text()) if state.exists() else {}


def row(name: str, result: Result) -> str:
    """Return one line of the table."""
    return f"{name:<18}{result.state:<12}{result.seconds:7.1f} s   {result.last[:110]}"


def dry_run(groups: dict[str, list[Part]]) -> str:
    """Return the parts with expected times and limits, as text."""
    lines = []
    for group, members in groups.items():
        expected, limits = sum(p.expected_s for p in members), sum(p.limit_s for p in members)
        lines.append(f"{group}: about {expected} s, at most {limits} s")
        lines += [f"  {p.name:<18}about {p.expected_s:>4} s, limit {p.limit_s:>4} s   {_shown(p)}" for p in members]
    return "\n".join(lines)


def _shown(part: Part) -> str:
    return " ".join(f"'{word}'" if " " in word else word for word in part.command).replace(PYTHON, "python")


def facts() -> int:
    """Print available programs, packages and hardware; return 1 if torch sees no CUDA device."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    for program in ("nvidia-smi", "nvcc", "gcc", "g++", "git", "make", "compute-sanitizer", "ncu", "nsys"):
        print(f"{program:<20} {shutil.which(program) or 'not installed'}")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [wanted["dependencies"], *wanted["optional-dependencies"].values()]
    names = [re.match(r"[\w.-]+", text)[0] for texts in lists for text in texts]
    missing = []
    for name in dict.fromkeys(names):
        try:
            print(f"{name:<20} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    print(f"missing packages: {', '.join(name for name in missing if name != 'fastbyol') or 'none'}")
    print(
        f"disk {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB free, /dev/shm {shutil.disk_usage('/dev/shm').free / 2**30:.0f} GiB"
    )
    import torch

    from fastbyol.runtime.environment import describe

    for name, fact in describe().items():
        print(f"{name:<20} {fact}")
    print(f"torch's CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not torch.cuda.is_available():
        print("torch sees no CUDA device")
        return 1
    device = torch.cuda.get_device_properties(0)
    print(
        f"{device.name}, {device.total_memory / 2**30:.1f} GiB, sm_{device.major}{device.minor}, {device.multi_processor_count} multiprocessors"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--group", choices=["first", "measure", "rest"], help="group to run; by default all")
    options.add_argument("--only", nargs="+", metavar="PART", help="names of the parts to run")
    options.add_argument(
        "--seconds", type=float, help="total time limit; by default only the limits of the parts apply"
    )
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="state, corpora, runs and caches")
    options.add_argument("--out", type=Path, help="log and result files; by default the folder of --work")
    options.add_argument("--again", action="store_true", help="also run parts that are already ok")
    options.add_argument("--dry-run", action="store_true", help="list the parts and run none")
    options.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    return options


def main() -> int:
    args = parser().parse_args()
    if args.facts:
        return facts()
    work = args.work.resolve()
    out = (args.out or work).resolve()
    groups = {name: members for name, members in parts(work, out).items() if args.group in (None, name)}
    offered = {part.name: part for members in groups.values() for part in members}
    unknown = [name for name in args.only or () if name not in offered]
    if unknown:
        parser().error(f"--only {unknown[0]!r}: choose from {', '.join(map(repr, offered))}")
    chosen = [part for part in offered.values() if not args.only or part.name in args.only]
    if args.dry_run:
        print(dry_run({group: [part for part in members if part in chosen] for group, members in groups.items()}))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the part's processes
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    results = run_all(chosen, work, out, args.seconds, args.again)
    print("\n" + "\n".join(row(name, result) for name, result in results.items()))
    bad = [name for name, result in results.items() if result.state != "ok"]
    print(
        f"{len(results) - len(bad)} of {len(results)} parts are ok{'; not ok: ' + ', '.join(bad) if bad else ''}; log: {out / 'gpu.log'}"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
