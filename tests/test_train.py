"""The run as a whole: 16 steps on the CPU, resume, signals, and everything that can go wrong."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import BATCH, HANG_S, jpeg, losses

from fastbyol import checkpoint, step
from fastbyol.config import DataConfig, OptimConfig
from fastbyol.errors import InputError, RunError
from fastbyol.model import BYOLOutput
from fastbyol.runlog import RunLog
from fastbyol.train import train

STEPS = 16  # 4 epochs of 4 batches


def stop_after(monkeypatch, steps):
    """SIGTERM arrives during optimiser step number `steps`, counted from this call."""
    count = iter(range(1, 10_000))
    original = step.TrainStep.__call__

    def counted(self, *args):
        output = original(self, *args)
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    monkeypatch.setattr(step.TrainStep, "__call__", counted)


def test_sixteen_steps_end_to_end(make_config, capsys):
    config = make_config(log={"tensorboard": True})
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
    # The optimiser's threads stay for the next step, as torch's do.
    left = [t.name for t in threading.enumerate() if t.name.startswith("fastbyol")]
    assert all(name.startswith("fastbyol-kernel") for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("cut", [1, 6, 8])  # between epochs at 8, within one otherwise
def test_a_cut_and_resumed_run_has_the_losses_of_the_uncut_one(make_config, monkeypatch, name, cut):
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
def test_the_number_of_threads_does_not_change_a_loss(make_config):
    runs = [train(make_config(name=f"t{n}", data={"threads": n}, knn={"every_epochs": 0})) for n in (1, 4)]
    assert losses(runs[0].folder) == losses(runs[1].folder)


def test_device_values_are_read_only_when_they_are_logged(make_config, monkeypatch):
    """Counts every way from a tensor to a Python number: each would be a host sync on a GPU."""
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
def test_one_target_update_per_optimiser_step_after_it(make_config, monkeypatch, name):
    """The target equals the moving average of the weights after each step, applied once per step."""
    updates = []
    original = step.TrainStep.__call__

    def checked(self, number, batch):
        before = [t.clone() for _, t in self.pairs]
        output = original(self, number, batch)
        tau = self.tau_at(number)
        for (w, t), old in zip(self.pairs, before, strict=True):
            assert (t - (old + (1 - tau) * (w.detach() - old))).abs().max() < 1e-6
        updates.append(number)
        return output

    monkeypatch.setattr(step.TrainStep, "__call__", checked)
    train(make_config(optim={"name": name, "epochs": 2, "tau_base": 0.5}, knn={"every_epochs": 0}))
    assert updates == list(range(8))


def test_the_target_is_not_reset_on_resume(make_config, monkeypatch):
    stop_after(monkeypatch, 6)
    first = train(make_config())
    state = checkpoint.load(first.folder / "checkpoints" / "step_00000006.pt")
    online, target = (state["model"][f"{part}.backbone.conv1.weight"] for part in ("online", "target"))
    assert not torch.equal(online, target)


def test_an_existing_run_is_not_mixed_with_a_new_one(make_config):
    config = make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0})
    train(config)
    with pytest.raises(InputError, match="already holds a run: continue it with --resume auto"):
        train(config)
    again = train(dataclasses.replace(config, resume="auto"))
    assert again.step == 4  # nothing was left to do


def test_resume_takes_the_one_before_a_damaged_newest(make_config, capsys):
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


def test_resume_with_nothing_usable(make_config, capsys):
    assert train(make_config(resume="auto", optim={"epochs": 1, "warmup_epochs": 0})).step == 4  # nothing there: afresh
    for path in checkpoint.listed(train_folder(make_config)):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"none of the checkpoints in .* is usable: .*damaged"):
        train(make_config(resume="auto"))


def train_folder(make_config):
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
def test_a_checkpoint_of_another_run_is_refused(make_config, changes, message):
    train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    with pytest.raises(InputError, match=message):
        train(make_config(resume="auto", **changes))


def test_resume_names_settings_that_changed(make_config, capsys):
    train(make_config(optim={"epochs": 1, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    train(make_config(resume="auto", optim={"epochs": 2, "warmup_epochs": 0}, knn={"every_epochs": 0}))
    assert "resumed with other settings than the run began with: optim.epochs 1 -> 2" in capsys.readouterr().out


# --- what can go wrong ---


def poison(monkeypatch, at):
    original = step.TrainStep.__call__

    def poisoned(self, number, batch):
        if number == at:
            with torch.no_grad():
                self.model.predictor[0].weight.fill_(float("nan"))
        return original(self, number, batch)

    monkeypatch.setattr(step.TrainStep, "__call__", poisoned)


@pytest.mark.parametrize("log_every", [1, 7])
def test_a_nan_loss_stops_with_step_lr_and_the_last_good_checkpoint(make_config, monkeypatch, log_every):
    poison(monkeypatch, at=9)
    with pytest.raises(RunError, match=r"NaN or infinite at step 9 \(lr 0\.0\d+\).*step_00000008.pt") as caught:
        train(make_config(log={"log_every_steps": log_every}))
    assert "\n" not in str(caught.value)
    folder = train_folder(make_config)
    assert checkpoint.listed(folder)[-1].name == "step_00000008.pt"
    assert all(torch.isfinite(v).all() for v in checkpoint.load(folder / "step_00000008.pt")["model"].values())


def test_collapse_is_warned_about(make_config, monkeypatch, capsys):
    original = step.TrainStep.__call__

    def collapsed(self, number, batch):
        output = original(self, number, batch)
        return BYOLOutput(output.loss, output.projection_std * (0.01 if number >= 5 else 1))

    monkeypatch.setattr(step.TrainStep, "__call__", collapsed)
    train(make_config(knn={"every_epochs": 0}))
    output = capsys.readouterr().out
    assert output.count("the network is collapsing") == 1
    assert "step 6: std of the normalised projections" in output


def test_bad_images_are_named_in_the_log_and_in_the_summary(make_config, folder_of, capsys):
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


def test_one_class_or_no_labels_train_without_knn(make_config, folder_of, capsys):
    root = folder_of({f"train/a/{i}.jpg": jpeg(i) for i in range(16)} | {"val/a/0.jpg": jpeg(0)})
    result = train(make_config(data={"root": str(root)}, optim={"epochs": 1, "warmup_epochs": 0}))
    assert result.step == 1
    assert "no online kNN: " in capsys.readouterr().out


def test_a_full_disk_while_saving(make_config, monkeypatch):
    original = os.fsync

    def full_after_first(handle):
        if any((train_folder(make_config)).glob("step_*.pt")):
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", full_after_first)
    with pytest.raises(RunError, match=r"No space left on device.*last good checkpoint is .*step_00000004.pt"):
        train(make_config())
    assert [p.name for p in train_folder(make_config).iterdir()] == ["step_00000004.pt"]


def test_a_run_folder_that_cannot_be_made(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"runs=.*file: .* cannot be written"):
        train(make_config(runs=str(tmp_path / "file")))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_finish_the_step_save_and_say_how_to_go_on(photos, tmp_path, number, code):
    command = [sys.executable, "-m", "fastbyol", "train", "--name", "s", "--runs", str(tmp_path)]
    command += ["--data.root", str(photos), "--data.batch_size", "16", "--data.image_size_px", "32"]
    command += ["--model.backbone", "resnet18", "--model.width", "0.125", "--model.hidden_dim", "32"]
    command += ["--optim.epochs", "500", "--log.log_every_steps", "1", "--log.tensorboard", "false"]
    command += ["--knn.every_epochs", "0", "--checkpoint.every_epochs", "100"]
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
    assert "--resume auto goes on from here" in output
    assert "Traceback" not in errors
    saved = checkpoint.load(checkpoint.listed(tmp_path / "s" / "checkpoints")[-1])
    assert f"stopped after step {saved['step']} of 2000" in output
    assert saved["step"] == metrics.read_text().count("\n")


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path):
    options = {"total_steps": 8, "steps_per_epoch": 4, "batch_size": 2, "tensorboard": False}
    values = {"loss": 1.0, "lr": 0.1, "tau": 0.9, "projection_std": 0.2, "wait_s": 0.0}
    with RunLog(tmp_path, start=0, **options) as log:
        for number in range(1, 7):
            log.train(number, **values)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')  # a crash in the middle of a line
    with RunLog(tmp_path, start=4, **options) as log:
        log.train(5, **values)
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4, 5]


def test_the_smallest_batch_and_a_batch_of_one():
    assert DataConfig(batch_size=2).batch_size == 2
    with pytest.raises(ValueError, match="data.batch_size=1: BatchNorm needs at least 2 images"):
        DataConfig(batch_size=1)
    with pytest.raises(ValueError, match="optim.warmup_epochs=10: must lie between 0 and optim.epochs=5"):
        OptimConfig(epochs=5, warmup_epochs=10)


@pytest.mark.parametrize(("given", "named"), [(1, ""), (0.5, "optim.warmup_epochs 0.5 -> 1.0")])
def test_a_default_warmup_longer_than_half_of_the_run_is_cut_and_said(make_config, capsys, given, named):
    text = "optim.warmup_epochs: the default of 10 is longer than half of the run; it is 1 epochs"
    train(make_config(optim={"epochs": 1, "warmup_epochs": given}, knn={"every_epochs": 0}))
    assert "optim.warmup_epochs" not in capsys.readouterr().out
    result = train(make_config(resume="auto", optim={"epochs": 2, "warmup_epochs": None}, knn={"every_epochs": 0}))
    out = capsys.readouterr().out
    assert out.count(text) == 1
    # What the run began with is compared by the number used.
    changed = next(line for line in out.splitlines() if "resumed with other settings" in line)
    assert ("warmup" in changed, named in changed) == (bool(named), True)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["lr"] for line in lines if line["kind"] == "train" and line["step"] > 4) == pytest.approx(
        2 * 16 / 256
    )
