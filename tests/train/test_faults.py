"""What happens to long runs: kill -9, a full disk, a loader that hangs, a GPU without memory."""

import json
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.common import HANG_S, ROOT, losses

from fastbyol import step
from fastbyol.api import pretrain as train
from fastbyol.data.folder import ImageFolder
from fastbyol.errors import RunError
from fastbyol.runtime import checkpoint


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_the_run_that_was_not(make_config, tmp_path):
    options = {
        "optim": {"epochs": 100, "warmup_epochs": 1, "base_lr": 0.5},
        "knn": {"every_epochs": 0},
        "checkpoint": {"every_epochs": 1, "keep_last": 2},
    }
    whole = train(make_config(name="whole", **options))
    config = make_config(name="killed", resume="auto", **options)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    script = ROOT / "tests/helpers/killed.py"
    done = subprocess.run(
        [sys.executable, str(script), str(path), "20"], capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["killed"], result["last"]) == (20, 0), result
    assert len(set(result["begins"])) > 3  # it did get on between its deaths
    assert "damaged" not in done.stdout  # a checkpoint is there whole or not at all
    folder = Path(config.runs) / "killed"
    assert losses(folder) == losses(whole.folder)
    assert not list((folder / "checkpoints").glob(".*.partial"))
    states = [checkpoint.load(f / "checkpoints" / "step_00000400.pt")["model"] for f in (folder, whole.folder)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _train_with_files_up_to(config, limit, results):
    """In a process of its own: the kernel refuses to make any file longer than `limit` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(config)
        results.put("nothing was raised")
    except RunError as error:
        results.put(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (200_000, r"checkpoint .*step_00000004.pt could not be written"),
        (4_000, r"metrics.jsonl: No space left on device"),
    ],
)
def test_a_disk_that_takes_no_more(make_config, limit, message):
    """The operating system itself refuses to write: one line, exit, nothing half-written."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    every = 1 if "checkpoint" in message else 100
    config = make_config(
        knn={"every_epochs": 0}, optim={"epochs": 10, "warmup_epochs": 0}, checkpoint={"every_epochs": every}
    )
    process = context.Process(target=_train_with_files_up_to, args=(config, limit, results))
    process.start()
    text = results.get(timeout=HANG_S)
    process.join()
    assert "\n" not in text
    assert re.search(message, text), text
    folder = Path(config.runs) / config.name / "checkpoints"
    assert not folder.exists() or not list(folder.iterdir())


def test_a_loader_that_hangs_is_noticed_with_all_stacks(make_config, monkeypatch):
    """A file that never arrives (a dead network disk): the run ends, and says in which line each thread was."""
    original, never = ImageFolder.read, threading.Event()

    def read(self, index):
        if threading.current_thread().name.startswith("fastbyol-loader") and len(seen) > 40:
            never.wait()
        seen.append(index)
        return original(self, index)

    seen: list[int] = []
    monkeypatch.setattr(ImageFolder, "read", read)
    config = make_config(data={"timeout_s": 3, "readahead_images": 8}, knn={"every_epochs": 0})
    try:
        with pytest.raises(
            RunError, match=r"made no batch for 3 s \(data.timeout_s\).*stacks.txt has the stacks"
        ) as caught:
            train(config)
    finally:
        never.set()  # lets the threads end
    assert "\n" not in str(caught.value)
    stacks = (Path(config.runs) / config.name / "stacks.txt").read_text()
    assert stacks.lower().count("thread 0x") >= 7  # four readers, two workers, the loop
    assert "test_faults.py" in stacks  # where the reader waits
    assert "in take" in stacks  # and the loop


def test_out_of_gpu_memory_says_what_to_lower(make_config, monkeypatch):
    original = step.TrainStep.__call__

    def full(self, number, batch):
        if number == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return original(self, number, batch)

    monkeypatch.setattr(step.TrainStep, "__call__", full)
    with pytest.raises(RunError) as caught:
        train(make_config(knn={"every_epochs": 0}))
    text = str(caught.value)
    assert text.startswith("out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. (peak memory")
    for part in ("weights", "activations", "data.batch_size", "step.micro_batches", "step.activation_checkpointing"):
        assert part in text
    assert "step_00000004.pt" in text
    assert "\n" not in text


def test_a_model_that_does_not_compile_names_the_way_out(make_config, monkeypatch):
    from fastbyol.model import BYOL

    original = BYOL.forward

    def breaks(self, view1, view2):
        torch._dynamo.graph_break()
        return original(self, view1, view2)

    monkeypatch.setattr(BYOL, "forward", breaks)
    with pytest.raises(RunError, match="step.mode=compile: the model does not compile here .*step.mode=eager"):
        train(make_config(step={"mode": "compile"}, knn={"every_epochs": 0}))


def test_a_signal_while_an_error_is_on_its_way_does_not_swallow_it(make_config, tmp_path):
    """torchrun sends SIGTERM to the ranks that have lost another: they still say what happened."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(make_config(knn={"every_epochs": 0}).to_dict()))
    code = f"""
import json, os, signal
from fastbyol import step
from fastbyol.config import Config
from fastbyol.errors import RunError
from fastbyol.api import pretrain as train

def lost(self, number, batch):
    raise RunError("lost")

step.TrainStep.__call__ = lost
step.TrainStep.close = lambda self: os.kill(os.getpid(), signal.SIGTERM)
try:
    train(Config.from_dict(json.load(open({str(path)!r}))))
except RunError as error:
    print("said", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert "said lost" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 7.45 GiB for an array"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"
        ),
        RuntimeError("can't start new thread"),
    ],
)
def test_memory_that_runs_out_on_a_cpu_is_one_line_with_the_last_checkpoint(make_config, monkeypatch, error):
    original = step.TrainStep.__call__

    def run_out(self, number, batch):
        if number == 5:
            raise error
        return original(self, number, batch)

    monkeypatch.setattr(step.TrainStep, "__call__", run_out)
    with pytest.raises(
        RunError, match=r"^out of memory or threads: .*lower data.batch_size.*checkpoint is .*step_00000004.pt$"
    ):
        train(make_config(knn={"every_epochs": 0}))
    text = (Path(make_config().runs) / "run" / "train.log").read_text()
    assert "error: out of memory or threads" in text.splitlines()[-1]
