"""Failures of long runs: SIGKILL, full disk, hanging loader, out of memory, compile errors."""

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
from fastbyol.api import train
from fastbyol.data.folder import ImageFolder
from fastbyol.errors import RunError
from fastbyol.runtime import checkpoint


@pytest.mark.slow
def test_run_killed_twenty_times_matches_an_uninterrupted_run(make_config, tmp_path):
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
    assert len(set(result["begins"])) > 3  # the run made progress between the kills
    assert "damaged" not in done.stdout  # checkpoints are complete or absent
    folder = Path(config.runs) / "killed"
    assert losses(folder) == losses(whole.folder)
    assert not list((folder / "checkpoints").glob(".*.partial"))
    states = [checkpoint.load(f / "checkpoints" / "step_00000400.pt")["model"] for f in (folder, whole.folder)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def _train_with_file_size_limit(config, limit, results):
    """Train in this process with a file size limit of `limit` bytes."""
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
def test_full_disk_is_one_line(make_config, limit, message):
    """A write error of the operating system ends the run with one line and no partial file."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    every = 1 if "checkpoint" in message else 100
    config = make_config(
        knn={"every_epochs": 0}, optim={"epochs": 10, "warmup_epochs": 0}, checkpoint={"every_epochs": every}
    )
    process = context.Process(target=_train_with_file_size_limit, args=(config, limit, results))
    process.start()
    text = results.get(timeout=HANG_S)
    process.join()
    assert "\n" not in text
    assert re.search(message, text), text
    folder = Path(config.runs) / config.name / "checkpoints"
    assert not folder.exists() or not list(folder.iterdir())


def test_hanging_loader_ends_the_run_with_all_stacks(make_config, monkeypatch):
    """A read that never returns (dead network disk) ends the run and writes all stacks."""
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
        never.set()  # release the threads
    assert "\n" not in str(caught.value)
    stacks = (Path(config.runs) / config.name / "stacks.txt").read_text()
    assert stacks.lower().count("thread 0x") >= 7  # four readers, two workers, the loop
    assert "test_faults.py" in stacks  # the hanging reader
    assert "in take" in stacks  # the training loop


def test_out_of_gpu_memory_lists_remedies(make_config, monkeypatch):
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


def test_compile_error_recommends_eager_mode(make_config, monkeypatch):
    from fastbyol.model import BYOL

    original = BYOL.forward

    def breaks(self, view1, view2):
        torch._dynamo.graph_break()
        return original(self, view1, view2)

    monkeypatch.setattr(BYOL, "forward", breaks)
    with pytest.raises(RunError, match="step.mode=compile: the model does not compile here .*step.mode=eager"):
        train(make_config(step={"mode": "compile"}, knn={"every_epochs": 0}))


def test_signal_during_shutdown_does_not_hide_the_error(make_config, tmp_path):
    """torchrun sends SIGTERM to ranks that have lost a peer; they must still report the error."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(make_config(knn={"every_epochs": 0}).to_dict()))
    code = f"""
import json, os, signal
from fastbyol import step
from fastbyol.config import Config
from fastbyol.errors import RunError
from fastbyol.api import train

def lost(self, number, batch):
    raise RunError("lost")

step.TrainStep.__call__ = lost
step.TrainStep.close = lambda self: os.kill(os.getpid(), signal.SIGTERM)
try:
    train(Config.from_dict(json.load(open({str(path)!r}))))
except RunError as error:
    print("reported", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert "reported lost" in done.stdout, done.stderr


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
def test_out_of_cpu_memory_is_one_line_with_the_last_checkpoint(make_config, monkeypatch, error):
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
