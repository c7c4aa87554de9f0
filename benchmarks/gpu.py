"""Tests and measures everything on a CUDA machine, the most informative first: `make gpu`.

    python benchmarks/gpu.py                                   # all parts: first, measure, rest
    python benchmarks/gpu.py --group first --seconds 480       # facts, tests, short trainings: what works here?
    python benchmarks/gpu.py --group measure --seconds 590     # the step of a ResNet-50 against its baselines
    python benchmarks/gpu.py --dry-run                         # the parts, how long each should take, and its limit
    cp runs/gpu/*_cuda.csv benchmarks/results/                 # keeps the results

It needs nothing but the interpreter's packages: fastbyol runs from the checkout, installed or not, and nothing is downloaded. Every part is a process
group of its own with a time limit; one that fails or hangs costs its limit and nothing else. A hanging part's Python stacks are in the log.
A part that misses a package or program is named with it. A part that does not fit into what is left of --seconds is left out.

--work DIR (runs/gpu) keeps the state, corpora, runs and compilers' caches: the same command again goes on with the parts that are not ok yet.
--out DIR (by default the same) gets gpu.log, which has what the parts print as they print it, and the result files, rewritten after every
measurement. FASTBYOL_COMMIT names their commit where .git is not that of the tree. Expected seconds were measured on one H100 with cold caches;
those of the tests, the profile, whole runs, the kernels' report and slow augmenters are estimates. The exit code is 0 if every part is ok: its
exit code was 0 and, of tests, at least one ran.
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
GRACE_S = 5  # of a part between its limit and its end
CUDA_BIN = "/usr/local/cuda/bin"  # the toolkit's programs, where PATH does not have them
R50 = "R50 224 px, batch 256"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command."""

    name: str
    command: list[str]
    expected_s: int
    """Measured on one H100 or an estimate: see above."""
    limit_s: int
    fresh: tuple[Path, ...] = ()
    """Folders of an earlier attempt that it cannot go on from: removed before it starts."""
    report: Path | None = None
    """pytest's JUnit file: its exit code is 0 even if every test was skipped."""


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    state: str
    """ok, exit N, too long, missing, skipped, no time, unfinished"""
    seconds: float = 0.0
    last: str = ""
    """The last line that it printed."""


def parts(work: Path, out: Path) -> dict[str, list[Part]]:
    """The parts of every group, in order; a part that stands in two groups runs once."""
    photos, corpus, runs = work / "photos", work / "photos-500px", work / "runs"

    def fastbyol(*words: str) -> list[str]:
        return [PYTHON, "-m", "fastbyol", *words]

    def script(name: str, *words: str) -> list[str]:
        return [PYTHON, f"benchmarks/{name}.py", *words]

    def pytest(name: str, *words: str, expected_s: int, limit_s: int, under: tuple[str, ...] = ()) -> Part:
        report = work / f"{name.replace(' ', '-')}.xml"
        # Of what a failing test prints, torch's trace of thousands of lines is left out.
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
    # A process for each of the files, whose compilers then work beside each other.
    beside = ["-n", "5", "--dist", "loadfile"] if find_spec("xdist") else []
    lars, augment = "benchmarks/bench_lars_ema.py", "benchmarks/bench_augment.py"
    first = [
        Part(name="facts", command=script("gpu", "--facts"), expected_s=6, limit_s=60),
        Part(name="doctor", command=fastbyol("doctor"), expected_s=35, limit_s=90),
        pytest("tests", "tests/gpu", *beside, "-o", "timeout=200", expected_s=180, limit_s=400),
        small,
        train("eager", "--step.mode", "eager", expected_s=40, limit_s=90),
        train("compile", "--step.mode", "compile", expected_s=100, limit_s=180),
        train("cuda_graph", "--step.mode", "cuda_graph", expected_s=50, limit_s=150),
        benchmark(
            "own kernels", lars, augment, "--rounds", "1", "-k", "fastbyol or copy", results=out / "own_kernels",
            expected_s=20, limit_s=120,
        ),
    ]  # fmt: skip
    contenders = ["fastbyol", "plain torch compiled", "fastbyol cuda_graph", "supervised"]
    contenders += ["plain torch channels-last bf16", "fastbyol eager"]
    r50 = ["--device", "cuda", "--sets", R50]
    profile = ["--config", "configs/imagenet_r50_100ep.yaml", "--data.root", str(corpus), "--data.batch_size", "256"]
    profile += ["--device", "cuda", "--steps", "20", "--out", str(out / "profile_r50")]
    measure = [
        on_gpu(
            "bench_step", "step_cuda.csv", *r50, "--only", *contenders, expected_s=390, limit_s=450, title="step R50"
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
        Part(name="profile R50", command=fastbyol("profile", *profile), expected_s=330, limit_s=500),
        small,
        train("fp16", "--precision", "fp16", "--step.mode", "cuda_graph", expected_s=85, limit_s=150),
        on_gpu("bench_train", "train_cuda.csv", *r50, "--seconds", "15", expected_s=180, limit_s=360, title="whole runs"),
        pytest(
            "memcheck", "tests/gpu/test_kernels.py", "-k", "not twenty_steps", under=sanitizer, expected_s=15, limit_s=240
        ),
        Part(name="kernels' report", command=[PYTHON, "-m", "fastbyol.kernels.triton.resources"], expected_s=30, limit_s=120),
        # torchvision sends about a hundred kernels a view.
        benchmark(
            "slow augmenters", augment, "--rounds", "1", "--views", "16", results=out / "16_views", expected_s=60, limit_s=180
        ),
        Part(
            name="table", command=script("against", "--device", "cuda", "--results", str(out)), expected_s=3, limit_s=30
        ),
    ]  # fmt: skip
    return {"first": first, "measure": measure, "rest": rest}


def environment(work: Path) -> dict[str, str]:
    """What the parts run in: the checkout first on the path, compilers' caches in WORK unless they have a place already."""
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
    """Runs a part to its end or limit; nothing of its process group is left afterwards."""
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
            process.send_signal(signal.SIGABRT)  # Python then prints where each of its threads stands
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:  # an interrupt comes here too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Result(_state(part, code, lines), round(time.monotonic() - began, 1), lines[-1] if lines else "")


def _state(part: Part, code: int | None, lines: list[str]) -> str:
    if code is None:
        return "too long"
    if code != 0:
        missing = any(re.search(r"No module named", line) for line in lines[-3:])
        return "missing" if missing else f"exit {code}"
    return "skipped" if part.report is not None and not _tests_that_ran(part.report) else "ok"


def _tests_that_ran(report: Path) -> int:
    """By a JUnit file; 0 if there is none."""
    if not report.exists():
        return 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    return sum(int(suite.get("tests", 0)) - int(suite.get("skipped", 0)) for suite in suites)


def _lines(log: Path, start: int) -> list[str]:
    """What a part printed, without colors and empty lines; of a line that was written over, the last state."""
    with open(log, "rb") as file:
        file.seek(start)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.read().decode(errors="replace"))
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def run_all(chosen: list[Part], work: Path, out: Path, seconds: float | None, again: bool) -> dict[str, Result]:
    """Runs the parts that are not ok yet, or all, and keeps the state after each; the results of all."""
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
            keep(part.name, Result("no time", 0.0, f"needs about {part.expected_s} s of {max(left, 0):.0f} s"))
            continue
        print(f"{part.name}: about {part.expected_s} s, at most {min(part.limit_s, left):.0f} s", flush=True)
        keep(part.name, Result("unfinished"))  # what a kill leaves behind
        keep(part.name, run(part, min(part.limit_s, left), log, environment(work)))
        print(row(part.name, results[part.name]), flush=True)
    return {part.name: results[part.name] for part in chosen}


def _read(state: Path) -> dict[str, dict]:
    return json.loads(state.read_text()) if state.exists() else {}


def row(name: str, result: Result) -> str:
    """A line of the table."""
    return f"{name:<18}{result.state:<12}{result.seconds:7.1f} s   {result.last[:110]}"


def dry_run(groups: dict[str, list[Part]]) -> str:
    """The parts with their expected seconds and limits, as text."""
    lines = []
    for group, members in groups.items():
        expected, limits = sum(p.expected_s for p in members), sum(p.limit_s for p in members)
        lines.append(f"{group}: about {expected} s, at most {limits} s")
        lines += [f"  {p.name:<18}about {p.expected_s:>4} s, limit {p.limit_s:>4} s   {_shown(p)}" for p in members]
    return "\n".join(lines)


def _shown(part: Part) -> str:
    return " ".join(f"'{word}'" if " " in word else word for word in part.command).replace(PYTHON, "python")


def facts() -> int:
    """What is on this machine and what is not; 1 if torch sees no CUDA device."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], check=False)
    for program in ("nvidia-smi", "nvcc", "gcc", "g++", "git", "make", "compute-sanitizer", "ncu", "nsys"):
        print(f"{program:<20} {shutil.which(program) or 'not here'}")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [wanted["dependencies"], *wanted["optional-dependencies"].values()]
    names = [re.match(r"[\w.-]+", text)[0] for texts in lists for text in texts]
    missing = []
    for name in dict.fromkeys(names):
        try:
            print(f"{name:<20} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    print(f"packages that are not here: {', '.join(name for name in missing if name != 'fastbyol') or 'none'}")
    print(
        f"disk {shutil.disk_usage(ROOT).free / 2**30:.0f} GiB free, /dev/shm {shutil.disk_usage('/dev/shm').free / 2**30:.0f} GiB"
    )
    import torch

    from fastbyol.runtime.environment import describe

    for name, fact in describe().items():
        print(f"{name:<20} {fact}")
    print(f"torch's CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    if not torch.cuda.is_available():
        print("torch sees no CUDA device here")
        return 1
    device = torch.cuda.get_device_properties(0)
    print(
        f"{device.name}, {device.total_memory / 2**30:.1f} GiB, sm_{device.major}{device.minor}, {device.multi_processor_count} multiprocessors"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--group", choices=["first", "measure", "rest"], help="these parts alone; by default all")
    options.add_argument("--only", nargs="+", metavar="PART", help="parts by name")
    options.add_argument(
        "--seconds", type=float, help="for all parts together; by default each has its own limit alone"
    )
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu", help="state, corpora, runs and caches")
    options.add_argument("--out", type=Path, help="log and result files; by default WORK")
    options.add_argument("--again", action="store_true", help="parts that are ok already too")
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the part's processes too
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    results = run_all(chosen, work, out, args.seconds, args.again)
    print("\n" + "\n".join(row(name, result) for name, result in results.items()))
    bad = [name for name, result in results.items() if result.state != "ok"]
    print(
        f"{len(results) - len(bad)} of {len(results)} parts are ok{': not ' + ', '.join(bad) if bad else ''}; log: {out / 'gpu.log'}"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
