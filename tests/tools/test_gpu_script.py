"""benchmarks/gpu.py: a part that fails, hangs, is missing or runs nothing costs no more than its limit, and the table says so."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import against
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
    "bench_step": bench_step,
    "bench_train": bench_train,
    "bench_loader": bench_loader,
    "against": against,
    "gpu": gpu,
}
LONG = 120  # seconds: the limit of a part that should end at once


def part(name, program, *, expected_s=0, limit_s=LONG, **options):
    """A part that runs a Python program."""
    command = [sys.executable, "-c", program]
    return gpu.Part(name=name, command=command, expected_s=expected_s, limit_s=limit_s, **options)


def pytest_on(tmp_path, name, text):
    """A part that runs pytest on a file of its own."""
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
    """Runs the script with other parts; its exit code, state and output."""

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


def test_what_fails_is_named_and_the_rest_goes_on(run, tmp_path):
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
    assert "1 of 4 parts are ok: not bad, no program, no package" in table[4]
    log = (tmp_path / "work" / "gpu.log").read_text()
    assert "first\nall is well" in log and "the GPU is on fire" in log


def test_a_good_run_ends_with_0(run):
    assert run([OK])[0] == 0


# It has a child of its own in the process group, and neither listens.
HANGING = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
def stands_here():
    time.sleep(600)
stands_here()
"""


def is_running(pid):
    """A killed process that nobody has waited for yet (a zombie) is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_hanging_part_costs_its_limit_and_leaves_nothing_behind(run, tmp_path):
    began = time.monotonic()
    code, states, _ = run([part("hangs", HANGING, limit_s=8), OK])
    took = time.monotonic() - began
    assert code == 1
    state, child = states["hangs"]
    assert state == "too long"
    assert states["ok"] == ("ok", "all is well")
    assert 8 <= took < 300  # it would sleep for 600
    deadline = time.monotonic() + 60
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)
    assert "in stands_here" in (tmp_path / "work" / "gpu.log").read_text()  # where it hung


def test_tests_that_all_skip_are_not_ok(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts sooner
    skip = "import pytest\n@pytest.mark.skip(reason='no CUDA device here')\ndef test_a(): pass\n"
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


def test_an_old_report_does_not_count(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    first = pytest_on(tmp_path, "a", "def test_a(): pass\n")
    assert run([first])[1]["a"][0] == "ok"
    silent = part("a", "print('1 passed')", report=first.report)
    assert run([silent], "--again")[1]["a"][0] == "skipped"


def test_parts_that_do_not_fit_into_the_budget_are_left_out(run):
    long = part("long", "print('ran')", expected_s=5000, limit_s=6000)
    code, states, _ = run([long, OK], "--seconds", "1000")
    assert code == 1
    assert states["long"][0] == "no time"
    assert states["ok"][0] == "ok"


def test_no_part_runs_beyond_the_budget(run):
    began = time.monotonic()
    _, states, _ = run([part("hangs", "import time; time.sleep(600)", limit_s=500)], "--seconds", "8")
    assert states["hangs"][0] == "too long"
    assert time.monotonic() - began < 300


def test_a_later_call_goes_on_with_what_is_not_ok(run, tmp_path):
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


def test_the_state_of_a_killed_run_is_kept(tmp_path, monkeypatch):
    """State and log are there after every part, not at the end; a part that was cut off is not taken for ok."""
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


def test_what_an_attempt_left_is_removed_before_the_next(run, tmp_path):
    folder = tmp_path / "half"
    half = part("half", f"import os; os.mkdir({str(folder)!r}); raise SystemExit(1)", fresh=(folder,))
    for _ in range(2):
        assert run([half])[1]["half"] == ("exit 1", "")


def test_parts_see_the_checkout_first_and_their_caches_in_the_work_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/else")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    env = gpu.environment(tmp_path)
    assert env["PYTHONPATH"] == f"{ROOT}:/else"
    assert env["TRITON_CACHE_DIR"] == "/mine"
    assert env["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    assert env["FASTBYOL_CORPUS"].startswith(str(tmp_path))


def test_only_names_parts_that_exist(run, capsys):
    with pytest.raises(SystemExit):
        run([OK], "--only", "okay")
    assert "--only 'okay': choose from 'ok'" in capsys.readouterr().err


# --- the real parts ---


WORK = Path("/work-folder")
GROUPS = gpu.parts(WORK, WORK / "out")
ALL = [pytest.param(p, id=f"{group}: {p.name}") for group, members in GROUPS.items() for p in members]


def test_groups_and_their_expected_seconds():
    assert list(GROUPS) == ["first", "measure", "rest"]
    assert sum(p.expected_s for p in GROUPS["first"]) <= 450
    for members in GROUPS.values():
        assert all(0 < p.expected_s <= p.limit_s <= 595 for p in members)  # ten minutes a command
        assert len({p.name for p in members}) == len(members)
    by_name = {}
    for p in (p for members in GROUPS.values() for p in members):
        assert by_name.setdefault(p.name, p) == p


def test_a_dry_run_lists_every_part_and_runs_none(capsys, monkeypatch, tmp_path):
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
def test_commands_name_what_exists(part, monkeypatch):
    """Every script, sub-command, option and contender; what is under WORK is made by the parts."""
    monkeypatch.chdir(ROOT)
    command = part.command
    words = command[command.index(sys.executable) + 1 :]
    for word in words:
        if re.match(r"(benchmarks|tests|configs)/", word):
            assert (ROOT / word).exists(), word
    if words[:2] == ["-m", "fastbyol"]:
        parse_command_line(words[2:], cli.COMMANDS)
    elif words[0] != "-m":
        PARSERS[Path(words[0]).stem].parser().parse_args(words[1:])
    else:
        assert words[1] in ("pytest", "fastbyol.kernels.triton.resources")
    folders = [Path(word) for word in words if word.startswith("/") and word != sys.executable]
    assert all(folder.is_relative_to(WORK) for folder in (*folders, *part.fresh))


@pytest.mark.slow
def test_pytest_knows_the_options_and_finds_tests(tmp_path):
    """In one process for all of these parts, as importing torch takes long."""
    commands = [p.values[0].command for p in ALL if "pytest" in p.values[0].command]
    calls = [[*c[c.index("pytest") + 1 :], "--collect-only"] for c in commands]
    calls = [[f"--junitxml={tmp_path}/x.xml" if word.startswith("--junitxml") else word for word in c] for c in calls]
    program = f"import pytest\nfor call in {calls!r}:\n    assert pytest.main(call) == 0, call"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert calls


def test_a_commit_without_git_is_the_one_that_is_named(monkeypatch):
    monkeypatch.setattr(environment, "__file__", "/environment.py")
    monkeypatch.setenv("FASTBYOL_COMMIT", "abc1234")
    assert environment.commit() == "abc1234"
    monkeypatch.delenv("FASTBYOL_COMMIT")
    assert environment.commit() == ""


def test_a_benchmark_for_a_gpu_says_in_one_line_that_there_is_none(capsys, monkeypatch):
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
