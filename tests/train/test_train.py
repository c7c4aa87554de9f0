"""Whole runs of 16 steps on the CPU: resume, signals, run folders and errors."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.common import BATCH, HANG_S, jpeg, losses
from helpers.stopping import stop_after
from PIL import Image

from fastbyol import step
from fastbyol.api import train
from fastbyol.config import Config, DataConfig, OptimConfig
from fastbyol.data import find_images, open_split
from fastbyol.data.pack import pack
from fastbyol.errors import InputError, RunError
from fastbyol.model import BYOLOutput
from fastbyol.runtime import checkpoint
from fastbyol.runtime.distributed import World
from fastbyol.runtime.files import FolderLock
from fastbyol.runtime.run_log import RunLog, read_metrics
from fastbyol.runtime.signals import StopSignals
from fastbyol.trackers.tensorboard import EventFile
from fastbyol.weights.load import load_checkpoint_model

STEPS = 16  # 4 epochs of 4 batches


def test_run_end_to_end(make_config, capsys):
    config = make_config(log={"trackers": ["tensorboard"]})
    result = train(config)
    assert (result.step, result.total_steps, result.stopped_by) == (STEPS, STEPS, None)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert trained[0]["lr"] == 0
    assert trained[4]["lr"] == pytest.approx(2.0 * BATCH / 256)
    assert trained[0]["tau"] == pytest.approx(0.99)
    assert all(0 < line["loss"] < 8 and 0 <= line["wait_share"] <= 1 for line in trained)
    assert [line["step"] for line in lines if line["kind"] == "knn"] == [8, 16]
    assert any((result.folder / "tensorboard").iterdir())
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["knn_best"] >= summary["knn_last"] > 0
    assert "images/s" in capsys.readouterr().out
    state = checkpoint.load(result.folder / "checkpoints" / f"step_{STEPS:08d}.pt")
    assert all(name.split(".")[0] in ("online", "predictor", "target") for name in state["model"])
    # The optimizer's threads stay alive for the next step, like torch's.
    left = [t.name for t in threading.enumerate() if t.name.startswith("fastbyol")]
    assert all(name.startswith("fastbyol-kernel") for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("cut", [1, 6, 8])  # 8 is the end of an epoch, 1 and 6 are not
def test_resume_is_bit_exact(make_config, monkeypatch, name, cut):
    optim = {"name": name, "base_lr": 2.0 if name == "lars" else 0.05}
    whole = train(make_config(name="whole", optim=optim))
    with monkeypatch.context() as patch:
        stop_after(patch, cut)
        first = train(make_config(name="cut", optim=optim))
    assert (first.step, first.stopped_by) == (cut, signal.SIGTERM)
    second = train(make_config(name="cut", optim=optim, resume="auto"))
    assert second.step == STEPS
    assert losses(second.folder) == losses(whole.folder)
    states = [checkpoint.load(r.folder / "checkpoints" / f"step_{STEPS:08d}.pt") for r in (whole, second)]
    assert all(torch.equal(states[0]["model"][k], states[1]["model"][k]) for k in states[0]["model"])


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_threads(make_config):
    runs = [train(make_config(name=f"t{n}", data={"threads": n}, knn={"every_epochs": 0})) for n in (1, 4)]
    assert losses(runs[0].folder) == losses(runs[1].folder)


def test_device_values_are_read_only_for_logging(make_config, monkeypatch):
    """Counts all conversions of tensors to Python values, which would be host syncs on a GPU."""
    reads = []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)

    original_step = step.TrainStep.__call__
    counts = []

    def watched(self, *args):
        reads.clear()
        output = original_step(self, *args)
        counts.append(len(reads))
        return output

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__"):
        count(name)
    monkeypatch.setattr(step.TrainStep, "__call__", watched)
    logged = []
    monkeypatch.setattr(RunLog, "train", lambda self, number, **values: logged.append((number, len(reads))))
    train(make_config(log={"log_every_steps": 8}, knn={"every_epochs": 0}, checkpoint={"every_epochs": 4}))
    assert counts == [0] * STEPS
    assert [number for number, _ in logged] == [8, 16]
    assert all(0 < n <= 4 for _, n in logged)


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "adam"])
def test_target_update_follows_each_optimizer_step(make_config, monkeypatch, name):
    """The target is the moving average of the weights after each step, updated once per step."""
    updates = []
    original = step.TrainStep.__call__

    def checked(self, number, batch):
        before = [t.clone() for _, t in self.model.target_pairs()]
        output = original(self, number, batch)
        tau = self.schedule.tau(number)
        for (w, t), old in zip(self.model.target_pairs(), before, strict=True):
            assert (t - (old + (1 - tau) * (w.detach() - old))).abs().max() < 1e-6
        updates.append(number)
        return output

    monkeypatch.setattr(step.TrainStep, "__call__", checked)
    train(make_config(optim={"name": name, "epochs": 2, "tau_base": 0.5}, knn={"every_epochs": 0}))
    assert updates == list(range(8))


def test_checkpoint_keeps_the_target(make_config, monkeypatch):
    stop_after(monkeypatch, 6)
    first = train(make_config())
    state = checkpoint.load(first.folder / "checkpoints" / "step_00000006.pt")
    online, target = (state["model"][f"{part}.backbone.conv1.weight"] for part in ("online", "target"))
    assert not torch.equal(online, target)


def test_existing_run_needs_resume(make_config):
    config = make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})
    train(config)
    with pytest.raises(InputError, match="already holds a run: continue it with --resume auto"):
        train(config)
    again = train(dataclasses.replace(config, resume="auto"))
    assert again.step == 4  # nothing to do


SHORT = {"knn": {"every_epochs": 0}, "optim": {"epochs": 1, "warmup_epochs": 0}}


def contents(folder):
    """Return bytes and modification time of all files in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(("epochs", "of"), [(1, 1), (2, 1)])
def test_finished_run_is_reported_and_unchanged(make_config, capsys, epochs, of):
    first = train(make_config(**SHORT | {"optim": {"epochs": epochs, "warmup_epochs": 0}}))
    before = contents(first.folder)
    capsys.readouterr()
    second = train(make_config(resume="auto", **SHORT | {"optim": {"epochs": of, "warmup_epochs": 0}}))
    assert (second.step, second.already_finished) == (4 * epochs, True)
    out = capsys.readouterr().out
    assert "already finished: checkpoint" in out
    assert f"is of epoch {epochs}, optim.epochs={of}; nothing to do" in out
    assert contents(first.folder) == before


def test_remainders_of_epochs_add_up_to_steps(make_config, photos, capsys):
    """72 images in batches of 16: three epochs are floor(3 * 4.5) = 13 steps."""
    optim = {"epochs": 3, "warmup_epochs": 1, "base_lr": 2.0}
    result = train(make_config(data={"root": str(photos)}, optim=optim, knn={"every_epochs": 1}))
    assert (result.step, result.total_steps) == (13, 13)
    lines = read_metrics(result.folder)
    assert [(line["step"], line["epoch"]) for line in lines if line["kind"] == "knn"] == [
        (step, step / 4.5) for step in (4, 9, 13)
    ]
    assert sorted(path.stem for path in (result.folder / "checkpoints").glob("step_*")) == [
        f"step_{step:08d}" for step in (4, 9, 13)
    ]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates[4] == max(rates) == 2.0 * BATCH / 256  # floor(4.5) steps of warm-up
    assert "epoch 3/3" in capsys.readouterr().out


def test_finished_run_of_an_older_version_stays_finished(make_config, photos):
    """Older versions counted floor(N / B) steps per epoch: 8 of 72 images in batches of 16."""
    optim = {"epochs": 2, "warmup_epochs": 0}
    options = {"data": {"root": str(photos)}, "knn": {"every_epochs": 0}, "optim": optim}
    folder = train(make_config(**options)).folder
    (path,) = (folder / "checkpoints").glob("step_00000009.pt")
    state = checkpoint.load(path)
    torch.save(state | {"step": 8}, path.with_stem("step_00000008"))
    path.unlink()
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 8, "total_steps": 8}))
    assert train(make_config(**options, resume="auto")).already_finished
    (folder / "summary.json").write_text(json.dumps(summary | {"steps": 8, "total_steps": 9}))  # interrupted
    assert train(make_config(**options, resume="auto")).step == 9


def test_checkpoints_of_older_versions_keep_their_stem(make_config):
    """`width` used to leave the stem at 64 channels."""
    folder = train(make_config(model={"stem_channels": 64}, **SHORT)).folder
    (path,) = (folder / "checkpoints").glob("step_*.pt")
    state = checkpoint.load(path)
    for name in ("stem_channels", "padding", "zero_init_last"):
        del state["config"]["model"][name]
    torch.save(state, path)
    loaded = load_checkpoint_model(path)
    assert loaded.config.model.stem_channels == loaded.model.online.backbone.conv1.out_channels == 64
    longer = {"optim": {"epochs": 2, "warmup_epochs": 0}, "knn": {"every_epochs": 0}, "resume": "auto"}
    with pytest.raises(
        InputError, match="was made with model.stem_channels=64, this run has model.stem_channels=0: use"
    ):
        train(make_config(**longer))
    assert train(make_config(model={"stem_channels": 64}, **longer)).step == 8
    assert Config.from_dict({"model": {"width": 2}}).model.stem_channels == 0  # a user's choice, not a stored config


def test_resume_writes_a_missing_summary(make_config):
    folder = train(make_config(**SHORT)).folder
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    assert not train(make_config(resume="auto", **SHORT)).already_finished
    again = json.loads((folder / "summary.json").read_text())
    for key in ("steps", "total_steps", "loss", "images_per_s"):
        assert again[key] == summary[key]


def test_longer_run_reports_changed_schedules(make_config, capsys):
    train(make_config(knn={"every_epochs": 0}, optim={"epochs": 2, "warmup_epochs": 0}))
    train(make_config(knn={"every_epochs": 0}, optim={"epochs": 4, "warmup_epochs": 0}, resume="auto"))
    out = capsys.readouterr().out
    lr = 2.0 * BATCH / 256 / 2  # halfway down the cosine
    assert (
        f"optim.epochs 2 -> 4: the schedules span 4 epochs, so at step 8 the learning rate is {lr:.4g} instead of 0, "
        "tau 0.995 instead of 1"
    ) in out


def test_resume_rejects_another_dataset_of_equal_size(make_config, photos, tmp_path):
    train(make_config(data={"root": str(photos)}, **SHORT))
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    config = make_config(resume="auto", data={"root": str(copy)}, optim={"epochs": 2, "warmup_epochs": 0})
    assert train(config).step == 9  # a copy of the images is the same dataset
    first = sorted((copy / "train").iterdir())[0]
    image = sorted(first.iterdir())[0]
    image.rename(image.with_name("other.jpg"))
    config = dataclasses.replace(config, optim=OptimConfig(epochs=3, warmup_epochs=0))
    with pytest.raises(InputError, match=rf"made on other images.*: class '{first.name}' has other files; resume with"):
        train(config)
    shutil.move(first / "other.jpg", sorted((copy / "train").iterdir())[1] / "other.jpg")
    with pytest.raises(
        InputError, match=r"class '\w+' has 3 images instead of 4; class '\w+' has 5 images instead of 4"
    ):
        train(config)


def test_run_folder_is_locked(make_config):
    config = make_config(name="two", resume="auto", **SHORT)
    folder = Path(config.runs) / "two"
    with FolderLock(folder), pytest.raises(InputError, match=r"two: another run writes into it \(process"):
        train(config)
    assert not folder.exists()
    assert train(config).step == 4


def test_failed_start_leaves_no_folder(make_config):
    config = make_config(data={"root": "/nowhere"})
    with pytest.raises(InputError, match="no folder"):
        train(config)
    assert not Path(config.runs).exists()


def test_resume_skips_a_damaged_checkpoint(make_config, capsys):
    whole = train(make_config())
    folder = whole.folder / "checkpoints"
    newest = folder / "step_00000016.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    expected = losses(whole.folder)
    capsys.readouterr()
    result = train(make_config(resume="auto"))
    output = capsys.readouterr().out
    assert "step_00000016.pt is damaged" in output
    assert "steps 12 to 16" in output
    assert result.step == STEPS
    assert losses(result.folder) == expected


def test_resume_without_a_usable_checkpoint(make_config, capsys):
    assert (
        train(make_config(resume="auto", optim={"epochs": 1, "warmup_epochs": 0})).step == 4
    )  # no checkpoint: a new run
    for path in checkpoint.list_checkpoints(checkpoint_folder(make_config)):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* is usable: .*damaged"):
        train(make_config(resume="auto"))


def checkpoint_folder(make_config):
    config = make_config()
    return checkpoint.Path(config.runs) / config.name / "checkpoints"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"backbone": "resnet34"}},
            r"made with model.backbone=resnet18, this run has model.backbone=resnet34",
        ),
        ({"optim": {"name": "sgd"}}, "made with optim.name=lars, this run has optim.name=sgd"),
        ({"data": {"batch_size": 8}}, "made with data.batch_size=16, this run has data.batch_size=8"),
    ],
)
def test_resume_rejects_incompatible_settings(make_config, changes, message):
    train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    with pytest.raises(InputError, match=message):
        train(make_config(resume="auto", **changes))


def test_resume_reports_changed_settings(make_config, capsys):
    train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    train(make_config(resume="auto", optim={"epochs": 2, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    assert "resumed with other settings than the run began with: optim.epochs 1 -> 2" in capsys.readouterr().out


# --- errors and warnings ---


def poison(monkeypatch, at):
    original = step.TrainStep.__call__

    def poisoned(self, number, batch):
        if number == at:
            with torch.no_grad():
                self.model.predictor[0].weight.fill_(float("nan"))
        return original(self, number, batch)

    monkeypatch.setattr(step.TrainStep, "__call__", poisoned)


@pytest.mark.parametrize("log_every", [1, 7])
def test_nan_loss_reports_step_lr_and_the_last_good_checkpoint(make_config, monkeypatch, log_every):
    poison(monkeypatch, at=9)
    with pytest.raises(RunError, match=r"NaN or infinite at step 9 \(lr 0\.0\d+\).*step_00000008.pt") as caught:
        train(make_config(log={"log_every_steps": log_every}))
    assert "\n" not in str(caught.value)
    folder = checkpoint_folder(make_config)
    assert checkpoint.list_checkpoints(folder)[-1].name == "step_00000008.pt"
    assert all(torch.isfinite(v).all() for v in checkpoint.load(folder / "step_00000008.pt")["model"].values())


def test_collapse_warning(make_config, monkeypatch, capsys):
    original = step.TrainStep.__call__

    def collapsed(self, number, batch):
        output = original(self, number, batch)
        return BYOLOutput(output.loss, output.projection_std * (0.01 if number >= 5 else 1))

    monkeypatch.setattr(step.TrainStep, "__call__", collapsed)
    train(make_config(knn={"every_epochs": 0}))
    output = capsys.readouterr().out
    assert output.count("the network is collapsing") == 1
    assert "step 6: std of the normalized projections" in output


def test_bad_images_are_listed_in_log_and_summary(make_config, folder_of, capsys):
    files = {f"train/{c}/{i:02d}.jpg": jpeg(i) for i in range(20) for c in "ab"}
    files["train/a/05.jpg"] = b"words"
    root = folder_of(files)
    result = train(
        make_config(data={"root": str(root), "max_bad_fraction": 0.05}, optim={"epochs": 2, "warmup_epochs": 0})
    )
    output = capsys.readouterr().out
    assert output.count("a/05.jpg: not an image file") == 1
    assert "1 unreadable images were skipped" in output
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["bad_images"] == {"a/05.jpg": "not an image file"}


def test_single_class_trains_without_knn(make_config, folder_of, capsys):
    root = folder_of({f"train/a/{i}.jpg": jpeg(i) for i in range(16)} | {"val/a/0.jpg": jpeg(0)})
    result = train(make_config(data={"root": str(root)}, optim={"epochs": 1, "warmup_epochs": 0}))
    assert result.step == 1
    assert "no online kNN: " in capsys.readouterr().out


def test_full_disk_keeps_the_last_checkpoint(make_config, monkeypatch):
    original = os.fsync

    def full_after_first(handle):
        if any((checkpoint_folder(make_config)).glob("step_*.pt")):
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", full_after_first)
    with pytest.raises(RunError, match=r"No space left on device.*last good checkpoint is .*step_00000004.pt"):
        train(make_config())
    assert [p.name for p in checkpoint_folder(make_config).iterdir()] == ["step_00000004.pt"]


def test_unwritable_run_folder(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot be written: .*file is not a folder; choose another --runs"):
        train(make_config(runs=str(tmp_path / "file")))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_signals_save_a_checkpoint_and_explain_how_to_resume(photos, tmp_path, number, code):
    command = [sys.executable, "-m", "fastbyol", "train", "--name", "s", "--runs", str(tmp_path)]
    command += ["--data.root", str(photos), "--data.batch_size", "16", "--data.image_size_px", "32"]
    command += ["--model.backbone", "resnet18", "--model.width", "0.125", "--model.hidden_dim", "32"]
    command += ["--optim.epochs", "500", "--log.log_every_steps", "1", "--log.trackers", "[]"]
    command += ["--knn.every_epochs", "0", "--checkpoint.every_epochs", "100"]
    # The test's parent may ignore the signal, like nohup, and child processes inherit that.
    command = ["env", f"--default-signal={number}", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "s" / "metrics.jsonl"
    deadline = time.monotonic() + HANG_S
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=HANG_S)
    assert process.returncode == code, errors
    assert "--resume auto continues from here" in output
    assert "Traceback" not in errors
    saved = checkpoint.load(checkpoint.list_checkpoints(tmp_path / "s" / "checkpoints")[-1])
    assert f"stopped after step {saved['step']} of 2250" in output
    assert saved["step"] == metrics.read_text().count("\n")


def test_ignored_sighup_stays_ignored():
    """nohup ignores SIGHUP, for example."""
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # shell and kernel may both send one
            assert stop.received == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.slow
@pytest.mark.parametrize("console", ["| head -n 1", "> /dev/full", ">&-"])
def test_training_survives_a_broken_console(photos, tmp_path, console):
    command = [sys.executable, "-m", "fastbyol", "train", "--name", "s", "--runs", str(tmp_path)]
    command += ["--data.root", str(photos), "--data.batch_size", "16", "--data.image_size_px", "32"]
    command += ["--model.backbone", "resnet18", "--model.width", "0.125", "--model.hidden_dim", "32"]
    command += ["--optim.epochs", "2", "--optim.warmup_epochs", "0", "--log.trackers", "[]"]
    script = f"{shlex.join(command)} {console}"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint.load(checkpoint.list_checkpoints(tmp_path / "s" / "checkpoints")[-1])["step"] == 9
    assert json.loads((tmp_path / "s" / "summary.json").read_text())["steps"] == 9
    text = (tmp_path / "s" / "train.log").read_text()
    assert "9 steps in" in text
    assert ("the console is gone" in text) == (console != ">&-")
    assert (tmp_path / "s" / "report.html").exists()


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
    options = {"total_steps": 8, "steps_per_epoch": 4, "batch_size": 2}
    values = {"loss": 1.0, "lr": 0.1, "tau": 0.9, "projection_std": 0.2, "wait_s": 0.0}
    with RunLog(tmp_path, start=0, **options) as log:
        for number in range(1, 7):
            log.train(number, **values)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')  # a line cut by a crash
    with RunLog(tmp_path, start=4, **options) as log:
        log.train(5, **values)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]


def test_batch_size_and_warmup_limits():
    assert DataConfig(batch_size=2).batch_size == 2
    with pytest.raises(ValueError, match="data.batch_size=1: BatchNorm needs at least 2 images"):
        DataConfig(batch_size=1)
    with pytest.raises(ValueError, match="optim.warmup_epochs=10: must lie between 0 and optim.epochs=5"):
        OptimConfig(epochs=5, warmup_epochs=10)


@pytest.mark.parametrize(("given", "named"), [(1, ""), (0.5, "optim.warmup_epochs 0.5 -> 1.0")])
def test_default_warmup_is_limited_and_reported(make_config, capsys, given, named):
    text = "optim.warmup_epochs: the default of 10 is longer than half of the run; using 1 epochs"
    train(make_config(optim={"epochs": 1, "warmup_epochs": given}, knn={"every_epochs": 0}))
    assert "optim.warmup_epochs" not in capsys.readouterr().out
    result = train(make_config(resume="auto", optim={"epochs": 2, "warmup_epochs": None}, knn={"every_epochs": 0}))
    out = capsys.readouterr().out
    assert out.count(text) == 1
    # The comparison with the original run uses the effective number of warmup epochs.
    changed = next(line for line in out.splitlines() if "resumed with other settings" in line)
    assert ("warmup" in changed, named in changed) == (bool(named), True)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines if line["kind"] == "train" and line["step"] > 4) == pytest.approx(
        2 * 16 / 256
    )


def _folder(path):
    path.mkdir()


def _pipe(path):
    os.mkfifo(path)


def _dangling(path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_folder, _pipe, _dangling])
@pytest.mark.parametrize(
    "name", ["config.json", "summary.json", "metrics.jsonl", "train.log", "report.html", "checkpoints/best.pt"]
)
def test_blocked_output_files_are_rejected_before_training(make_config, name, make):
    folder = Path(make_config().runs) / "run"
    (folder / name).parent.mkdir(parents=True)
    make(folder / name)
    with pytest.raises(InputError, match=f"{name} is not a file, but the run writes one there: move it away"):
        train(make_config(**SHORT))


def test_blocked_output_folders_are_rejected(make_config, tmp_path):
    runs = Path(make_config().runs)
    (runs / "run").mkdir(parents=True)
    (runs / "run" / "checkpoints").write_text("")
    with pytest.raises(
        InputError, match="checkpoints is not a folder, but the run writes into one there: move it away"
    ):
        train(make_config(**SHORT))
    (runs / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="link is a link to a folder that does not exist"):
        train(make_config(name="link", **SHORT))


def test_dangling_links_for_output_folders_are_rejected(make_config):
    folder = Path(make_config().runs) / "run"
    folder.mkdir(parents=True)
    for name in ("checkpoints", "tensorboard"):
        (folder / name).symlink_to("nowhere")
        with pytest.raises(
            InputError, match=f"{name} is not a folder, but the run writes into one there: move it away"
        ):
            train(make_config(**SHORT))
        (folder / name).unlink()


def test_resume_rejects_other_images_under_the_same_names(make_config, photos, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(photos, copy)
    images = sorted((copy / "train").rglob("*.jpg"))
    whole = [image.read_bytes() for image in images]
    images[0].write_bytes(whole[0][:300])  # unreadable; repaired later
    train(make_config(data={"root": str(copy), "max_bad_fraction": 0.1}, **SHORT))
    images[0].write_bytes(whole[0])
    shutil.move(copy, tmp_path / "moved")
    images = sorted((tmp_path / "moved" / "train").rglob("*.jpg"))
    longer = {"knn": {"every_epochs": 0}, "optim": {"epochs": 2, "warmup_epochs": 0}}
    config = make_config(resume="auto", data={"root": str(tmp_path / "moved")}, **longer)
    for image, data in zip(images, whole[1:] + whole[:1], strict=True):
        image.write_bytes(data)
    with pytest.raises(InputError, match="made on other images .*: files of the same names hold other images"):
        train(config)
    for image, data in zip(images, whole, strict=True):
        image.write_bytes(data)
    capsys.readouterr()
    assert train(config).step == 9  # floor(2 * 72 / 16)
    out = " ".join(capsys.readouterr().out.split())
    assert f"data.root {copy} -> {tmp_path / 'moved'}" in out
    assert "1 of 64 compared images have changed since the run began" in out


def test_unreadable_images_are_not_compared(make_config, photos, monkeypatch):
    def unreadable(self, index):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("fastbyol.data.folder.ImageFolder.read", unreadable)
        assert set(find_images(make_config().data, "train").content_hashes()) == {""}


class _Full:
    """A file on a disk that is full after `left` bytes."""

    def __init__(self, file, left):
        self._file, self._left = file, left

    def write(self, data):
        self._left -= len(data)
        if self._left < 0:
            raise OSError(28, os.strerror(28))
        return self._file.write(data)

    def close(self):
        self._file.close()


def tensorboard_losses(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_tensorboard_events_are_readable_and_optional(make_config, monkeypatch, capsys):
    options = {"log": {"trackers": ["tensorboard"]}} | SHORT
    folder = train(make_config(**options)).folder
    assert tensorboard_losses(folder) == [(k, pytest.approx(loss)) for k, loss in losses(folder).items()]
    train(make_config(resume="auto", **options | {"optim": {"epochs": 2, "warmup_epochs": 0}}))
    (folder / "checkpoints" / "step_00000008.pt").unlink()  # steps 5 to 8 are repeated
    train(make_config(resume="auto", **options | {"optim": {"epochs": 3, "warmup_epochs": 0}}))
    assert [step for step, _ in tensorboard_losses(folder)] == list(range(1, 13))
    original = EventFile.__init__

    def full(self, *args):
        original(self, *args)
        self._records._writer = _Full(self._file, 300)

    monkeypatch.setattr(EventFile, "__init__", full)
    capsys.readouterr()
    result = train(make_config(name="full", **options))
    assert result.step == 4
    warning = "TensorBoard has failed: No space left on device; the run continues without it"
    assert capsys.readouterr().out.count(warning) == 1


def test_resume_from_an_earlier_checkpoint_needs_another_name(make_config):
    first = train(make_config(**SHORT | {"optim": {"epochs": 3, "warmup_epochs": 0}}))
    early = first.folder / "checkpoints" / "step_00000004.pt"
    before = contents(first.folder)
    again = make_config(resume=str(early), **SHORT | {"optim": {"epochs": 2, "warmup_epochs": 0}})
    with pytest.raises(
        InputError, match=r"already holds a run up to step_00000012.pt: continue it with --resume auto, or"
    ):
        train(again)
    assert contents(first.folder) == before
    second = train(dataclasses.replace(again, name="back"))
    assert [p.name for p in checkpoint.list_checkpoints(second.folder / "checkpoints")] == ["step_00000008.pt"]
    # Another run's checkpoint is rejected too, but resuming from the newest checkpoint is allowed.
    with pytest.raises(InputError, match=r"already holds a run up to step_00000008.pt"):
        train(dataclasses.replace(again, name="back", resume=str(first.folder)))
    newest = str(second.folder / "checkpoints" / "step_00000008.pt")
    longer = OptimConfig(epochs=4, warmup_epochs=0)
    assert train(dataclasses.replace(again, name="back", resume=newest, optim=longer)).step == 16


def test_restarted_workers_resume_from_their_own_checkpoints(make_config, monkeypatch):
    first = train(make_config(**SHORT))
    early = str(first.folder / "checkpoints" / "step_00000004.pt")
    config = make_config(name="other", resume=early, **SHORT | {"optim": {"epochs": 2, "warmup_epochs": 0}})
    train(config)
    monkeypatch.setattr("fastbyol.loop.world_from_environment", lambda: World(restarts=1))
    third = train(dataclasses.replace(config, optim=OptimConfig(epochs=3, warmup_epochs=0)))
    assert json.loads((third.folder / "summary.json").read_text())["steps"] == 12
    assert [m["step"] for m in read_metrics(third.folder) if m["kind"] == "train"][:1] == [5]  # from its first attempt


def test_new_checkpoints_survive_damaged_later_ones(make_config):
    folder = train(make_config(**SHORT | {"optim": {"epochs": 4, "warmup_epochs": 0}})).folder / "checkpoints"
    for path in checkpoint.list_checkpoints(folder)[1:]:
        path.write_bytes(b"")
    keep = {"checkpoint": {"keep_last": 1}}
    stopped = make_config(resume="auto", **SHORT | {"optim": {"epochs": 3, "warmup_epochs": 0}}, **keep)
    assert train(stopped).step == 12
    assert checkpoint.load(folder / "step_00000012.pt")["step"] == 12


@pytest.mark.parametrize("gone", ["moved", "removed", "taken"])
def test_run_folder_that_disappears_during_training(make_config, monkeypatch, capsys, gone):
    config = make_config(log={"trackers": ["tensorboard"]}, **SHORT | {"optim": {"epochs": 3, "warmup_epochs": 0}})
    folder, elsewhere = Path(config.runs) / "run", Path(config.runs) / "elsewhere"
    original = step.TrainStep.__call__
    with ExitStack() as stack:

        def stepping(self, number, batch):
            if number == 5:
                folder.rename(elsewhere)
                if gone == "removed":
                    shutil.rmtree(elsewhere)
                elif gone == "taken":
                    stack.enter_context(FolderLock(folder))
            return original(self, number, batch)

        monkeypatch.setattr(step.TrainStep, "__call__", stepping)
        if gone == "taken":
            with pytest.raises(
                RunError, match=r"another run writes into it .*this run's own folder was moved or removed"
            ):
                train(config)
            assert [p.name for p in folder.iterdir()] == [".lock"]
            return
        assert train(config).step == 12
    assert "was moved or removed during the run; the run continues in a new folder" in capsys.readouterr().out
    saved = [p.name for p in checkpoint.list_checkpoints(folder / "checkpoints")]
    assert saved == ["step_00000008.pt", "step_00000012.pt"]
    assert {"config.json", "summary.json", "train.log"} <= {p.name for p in folder.iterdir()}
    assert sorted(losses(folder)) == [step for step, _ in tensorboard_losses(folder)] == [9, 10, 11, 12]
    if gone == "moved":
        assert [p.name for p in checkpoint.list_checkpoints(elsewhere / "checkpoints")] == ["step_00000004.pt"]
    monkeypatch.undo()
    assert train(dataclasses.replace(config, resume="auto")).already_finished


def test_removed_lock_is_recreated_silently(make_config, monkeypatch, capsys):
    config = make_config(**SHORT | {"optim": {"epochs": 2, "warmup_epochs": 0}})
    folder = Path(config.runs) / "run"
    original = step.TrainStep.__call__

    def stepping(self, number, batch):
        if number == 5:
            (folder / ".lock").unlink()
        return original(self, number, batch)

    monkeypatch.setattr(step.TrainStep, "__call__", stepping)
    assert train(config).step == 8
    assert "was moved" not in capsys.readouterr().out
    assert len(checkpoint.list_checkpoints(folder / "checkpoints")) == 2
    assert (folder / ".lock").exists()


def test_finished_run_with_a_damaged_checkpoint_is_unchanged(make_config, capsys):
    folder = train(make_config(**SHORT | {"optim": {"epochs": 2, "warmup_epochs": 0}})).folder
    (folder / "checkpoints" / "step_00000008.pt").write_bytes(b"")
    before = (folder / "summary.json").read_bytes()
    for resume in ("auto", str(folder), str(folder / "checkpoints")):
        assert train(make_config(resume=resume, **SHORT)).already_finished
        assert (folder / "summary.json").read_bytes() == before


def test_finished_checkpoint_of_another_run_suggests_no_report(make_config, capsys):
    folder = train(make_config(**SHORT)).folder
    capsys.readouterr()
    assert train(make_config(name="other", resume=str(folder), **SHORT)).already_finished
    assert "fastbyol report" not in capsys.readouterr().out


def test_finished_run_without_a_report_suggests_the_command(make_config, capsys):
    folder = train(make_config(**SHORT)).folder
    capsys.readouterr()
    train(make_config(resume="auto", **SHORT))
    assert f"; `fastbyol report --run {folder}` writes the missing report" in capsys.readouterr().out
    (folder / "report.html").touch()
    train(make_config(resume="auto", **SHORT))
    assert "fastbyol report" not in capsys.readouterr().out


def test_resume_rejects_another_packed_dataset_of_equal_size(make_config, tmp_path):
    """Raw images of one size differ only in their pixels."""
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        for k in range(16):
            path = tmp_path / name / "train" / "ab"[k % 2] / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        pack(open_split(tmp_path / name, "train"), tmp_path / f"{name}-packed" / "train.beton")
    options = {"batch_size": 8, "image_size_px": 32}
    train(make_config(data={"root": str(tmp_path / "one-packed"), **options}, **SHORT))
    longer = SHORT | {"optim": {"epochs": 2, "warmup_epochs": 0}}
    with pytest.raises(InputError, match="made on other images .*files of the same names hold other images"):
        train(make_config(resume="auto", data={"root": str(tmp_path / "two-packed"), **options}, **longer))


def modify_newest_checkpoint(folder, change):
    """Apply `change` to the state in the newest checkpoint of a run."""
    path = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["config"]["optim"].update(nesterov=True), "cannot be used: optim.nesterov: unknown key"),
        (lambda state: state.update(files=5), "does not say what images it was made on"),
        (lambda state: state.update(files={1: ["x", 2]}), "does not say what images it was made on"),
        (lambda state: state.update(files={"a": [[1], {}]}), "does not say what images it was made on"),
        (lambda state: state.update(images=0), "does not say what images it was made on"),
        (lambda state: state.update(step=-5), "is damaged: its step is -5"),
        (lambda state: state.update(step=10**30), "is damaged: its step is 10+$"),
        (lambda state: state.update(config={}), "cannot be used: its config has no data"),
        (lambda state: state.update(optimizer={}), "does not fit this model: it holds no momenta"),
        (
            lambda state: state.update(optimizer=dict.fromkeys(state["optimizer"], 1)),
            "its optimizer state is not one dict per parameter",
        ),
        (
            lambda state: state.update(optimizer={name: {"momentum_buffer": 1} for name in state["optimizer"]}),
            "does not fit this model: optimizer state momentum_buffer of .* is 1$",
        ),
        (lambda state: state.update(model={}), "does not fit this model: .{,500}$"),
        (
            lambda state: state["config"]["optim"].update(epochs="many"),
            "cannot be used: optim.epochs='many': expected an integer",
        ),
    ],
)
def test_inconsistent_checkpoints_are_one_line(make_config, change, message):
    folder = train(make_config(**SHORT)).folder
    modify_newest_checkpoint(folder, change)
    longer = SHORT | {"optim": {"epochs": 2, "warmup_epochs": 0}}
    with pytest.raises(InputError, match=message):
        train(make_config(resume="auto", **longer))
