"""benchmarks/gpu.py: isolation of parts that fail, hang, are missing or run no tests."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import against
import bench_features
import bench_loader
import bench_step
import bench_train
import gpu
import pytest
from helpers.common import HANG_S, ROOT

from fastbyol import cli
from fastbyol.runtime import environment
from fastbyol.settings.command_line import parse_command_line

PARSERS = {
    "bench_features": bench_features,
    "bench_step": bench_step,
    "bench_train": bench_train,
    "bench_loader": bench_loader,
    "against": against,
    "gpu": gpu,
}
LONG = 120  # seconds; limit of parts that end immediately


def part(name, program, *, expected_s=0, limit_s=LONG, **options):
    """Return a part that runs a Python program."""
    command = [sys.executable, "-c", program]
    return gpu.Part(name=name, command=command, expected_s=expected_s, limit_s=limit_s, **options)


def pytest_on(tmp_path, name, text):
    """Return a part that runs pytest on a new file."""
    file, report = tmp_path / f"test_{name}.py", tmp_path / f"{name}.xml"
    file.write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        str(file),
    ]
    return gpu.Part(name=name, command=command, expected_s=0, limit_s=LONG, report=report)


OK = part("ok", "print('first'); print('all is well')")
BAD = part("bad", "raise SystemExit('the GPU is on fire')")


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Return a function that runs the script with other parts: exit code, states and output."""

    def call(parts, *arguments):
        monkeypatch.setattr(gpu, "parts", lambda work, out: {"first": list(parts)})
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--work", str(tmp_path / "work"), *arguments])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        code = gpu.main()
        state = json.loads((tmp_path / "work" / "parts.json").read_text())
        return (
            code,
            {name: (fields["state"], fields["last"]) for name, fields in state.items()},
            capsys.readouterr().out,
        )

    return call


def test_failing_parts_are_reported_and_the_rest_runs(run, tmp_path):
    missing = gpu.Part(name="no program", command=["no-such-sanitizer"], expected_s=0, limit_s=LONG)
    no_package = part("no package", "import no_such_package")
    code, states, out = run([BAD, missing, no_package, OK])
    assert code == 1
    assert states == {
        "bad": ("exit 1", "the GPU is on fire"),
        "no program": ("missing", "no-such-sanitizer: No such file or directory"),
        "no package": ("missing", "ModuleNotFoundError: No module named 'no_such_package'"),
        "ok": ("ok", "all is well"),
    }
    table = out.split("\n\n")[-1].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["bad", "no", "no", "ok"]
    assert "1 of 4 parts are ok; not ok: bad, no program, no package; log: " in table[4]
    log = (tmp_path / "work" / "gpu.log").read_text()
    assert "first\nall is well" in log and "the GPU is on fire" in log


def test_exit_code_is_0_if_all_parts_are_ok(run):
    assert run([OK])[0] == 0


# The process and its child, which is in the same process group, ignore SIGTERM.
HANGING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
def hanging_function():
    time.sleep(600)
hanging_function()
"""


def is_running(pid):
    """Return True if a process runs; zombies count as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_hanging_part_is_killed_with_its_children_at_its_limit(run, tmp_path):
    began = time.monotonic()
    code, states, _ = run([part("hangs", HANGING, limit_s=8), OK])
    took = time.monotonic() - began
    assert code == 1
    state, child = states["hangs"]
    assert state == "timeout"
    assert states["ok"] == ("ok", "all is well")
    assert 8 <= took < 300  # the program sleeps for 600
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)
    assert "in hanging_function" in (tmp_path / "work" / "gpu.log").read_text()


def test_part_with_only_skipped_tests_is_not_ok(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts faster
    skip = "import pytest\n@pytest.mark.skip(reason='no CUDA device available')\ndef test_a(): pass\n"
    parts = [
        pytest_on(tmp_path, "skips", skip),
        pytest_on(tmp_path, "one_runs", skip + "def test_b(): pass\n"),
        pytest_on(tmp_path, "one_fails", skip + "def test_b(): assert False\n"),
        pytest_on(tmp_path, "no_test", ""),
    ]
    code, states, _ = run(parts)
    assert code == 1
    assert {name: state for name, (state, _) in states.items()} == {
        "skips": "skipped",
        "one_runs": "ok",
        "one_fails": "exit 1",
        "no_test": "exit 5",
    }


def test_old_report_is_ignored(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    first = pytest_on(tmp_path, "a", "def test_a(): pass\n")
    assert run([first])[1]["a"][0] == "ok"
    silent = part("a", "print('1 passed')", report=first.report)
    assert run([silent], "--again")[1]["a"][0] == "skipped"


def test_parts_over_the_budget_are_skipped(run):
    long = part("long", "print('ran')", expected_s=5000, limit_s=6000)
    code, states, _ = run([long, OK], "--seconds", "1000")
    assert code == 1
    assert states["long"][0] == "over budget"
    assert states["ok"][0] == "ok"


def test_budget_limits_running_parts(run):
    began = time.monotonic()
    _, states, _ = run([part("hangs", "import time; time.sleep(600)", limit_s=500)], "--seconds", "8")
    assert states["hangs"][0] == "timeout"
    assert time.monotonic() - began < 300


def test_rerun_skips_parts_that_are_ok(run, tmp_path):
    def counting(name, code):
        file = tmp_path / name
        return part(name, f"open({str(file)!r}, 'a').write('x'); raise SystemExit({code})"), file

    (good, good_file), (bad, bad_file) = counting("good", 0), counting("bad", 3)
    for _ in range(2):
        assert run([good, bad])[0] == 1
    assert (good_file.read_text(), bad_file.read_text()) == ("x", "xx")
    run([good, bad], "--only", "good")
    assert good_file.read_text() == "x"
    run([good, bad], "--only", "good", "--again")
    assert (good_file.read_text(), bad_file.read_text()) == ("xx", "xx")


def test_state_survives_a_killed_run(tmp_path, monkeypatch):
    """State and log are written after every part, and an interrupted part is not ok."""
    seen = []

    def killed(part, limit_s, log, env):
        seen.append(json.loads((tmp_path / "parts.json").read_text()))
        if part is BAD:
            raise KeyboardInterrupt
        return gpu.Result("ok", 1.0, "fine")

    monkeypatch.setattr(gpu, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_all([OK, BAD], tmp_path, tmp_path, None, again=False)
    state = json.loads((tmp_path / "parts.json").read_text())
    assert {name: fields["state"] for name, fields in state.items()} == {"ok": "ok", "bad": "unfinished"}
    assert seen[1] == state


def test_leftovers_of_an_attempt_are_removed(run, tmp_path):
    folder = tmp_path / "half"
    half = part("half", f"import os; os.mkdir({str(folder)!r}); raise SystemExit(1)", fresh=(folder,))
    for _ in range(2):
        assert run([half])[1]["half"] == ("exit 1", "")


def test_environment_of_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/else")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    env = gpu.environment(tmp_path)
    assert env["PYTHONPATH"] == f"{ROOT}:/else"
    assert env["TRITON_CACHE_DIR"] == "/mine"
    assert env["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    assert env["FASTBYOL_CORPUS"].startswith(str(tmp_path))


def test_only_rejects_unknown_parts(run, capsys):
    with pytest.raises(SystemExit):
        run([OK], "--only", "okay")
    assert "--only 'okay': choose from 'ok'" in capsys.readouterr().err


# --- the real parts ---


WORK = Path("/work-folder")
GROUPS = gpu.parts(WORK, WORK / "out")
ALL = [pytest.param(p, id=f"{group}: {p.name}") for group, members in GROUPS.items() for p in members]


def test_groups_and_expected_seconds():
    assert list(GROUPS) == ["first", "measure", "rest"]
    assert sum(p.expected_s for p in GROUPS["first"]) <= 450
    for members in GROUPS.values():
        assert all(0 < p.expected_s <= p.limit_s <= 595 for p in members)  # fits a limit of ten minutes per command
        assert len({p.name for p in members}) == len(members)
    by_name = {}
    for p in (p for members in GROUPS.values() for p in members):
        assert by_name.setdefault(p.name, p) == p


def test_dry_run_lists_all_parts_and_runs_none(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "--work", str(tmp_path / "work")])
    assert gpu.main() == 0
    out = capsys.readouterr().out
    for group, members in GROUPS.items():
        assert f"{group}: about {sum(p.expected_s for p in members)} s" in out
        for p in members:
            assert re.search(
                rf"^  {re.escape(p.name)} +about +{p.expected_s} s, limit +{p.limit_s} s ", out, re.MULTILINE
            )
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("part", ALL)
def test_commands_are_valid(part, monkeypatch):
    """Every script, subcommand, option and contender exists; parts create the files in WORK."""
    monkeypatch.chdir(ROOT)
    command = part.command
    words = command[command.index(sys.executable) + 1 :]
    for word in words:
        if re.match(r"(benchmarks|tests|configs)/", word):
            assert (ROOT / word).exists(), word
    if words[:2] == ["-m", "fastbyol"]:
        parse_command_line(words[2:], cli.COMMANDS)
    elif words[0] == "-m":
        assert words[1] == "pytest"
    elif words != ["benchmarks/kernel_resources.py"]:
        PARSERS[Path(words[0]).stem].parser().parse_args(words[1:])
    folders = [Path(word) for word in words if word.startswith("/") and word != sys.executable]
    assert all(folder.is_relative_to(WORK) for folder in (*folders, *part.fresh))


@pytest.mark.slow
def test_pytest_parts_collect_tests(tmp_path):
    """Collects all parts in one process, since importing torch is slow."""
    commands = [p.values[0].command for p in ALL if "pytest" in p.values[0].command]
    calls = [[*c[c.index("pytest") + 1 :], "--collect-only"] for c in commands]
    calls = [[f"--junitxml={tmp_path}/x.xml" if word.startswith("--junitxml") else word for word in c] for c in calls]
    program = f"import pytest\nfor call in {calls!r}:\n    assert pytest.main(call) == 0, call"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert calls


def test_commit_without_git_comes_from_the_environment(monkeypatch):
    monkeypatch.setattr(environment, "__file__", "/environment.py")
    monkeypatch.setenv("FASTBYOL_COMMIT", "abc1234")
    assert environment.commit() == "abc1234"
    monkeypatch.delenv("FASTBYOL_COMMIT")
    assert environment.commit() == ""


def test_cuda_benchmarks_without_a_gpu_fail_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for module, words in (
        (bench_step, ["--device", "cuda"]),
        (bench_train, ["--device", "cuda"]),
        (bench_loader, ["--set", "loader_cuda"]),
    ):
        monkeypatch.setattr(sys, "argv", ["x", *words])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {' '.join(words)}: torch sees no CUDA device here\n"
