"""Callbacks: order of the hooks, state in checkpoints, and errors."""

import json

import pytest
import torch
from helpers.common import losses
from helpers.stopping import stop_after

import fastbyol
from fastbyol import resume
from fastbyol.callbacks import Callback
from fastbyol.errors import RunError
from fastbyol.loop import train_loop as train
from fastbyol.runtime import run_log
from fastbyol.runtime.logging import logger
from fastbyol.tools.report import write_report


class Counter(Callback):
    """Record hook calls, and keep the step count across a resume."""

    name = "counter"

    def __init__(self):
        self.calls, self.lines, self.steps = [], [], 0

    def on_model(self, model, config):
        self.calls.append("model")

    def on_build(self, training):
        self.calls.append("build")

    def on_start(self, run):
        assert (run.folder.path / "train.log").exists()
        self.calls.append(f"start at {run.start}")

    def on_step(self, run, batch, output):
        self.steps += 1

    def on_metrics(self, run, kind, step, values):
        self.lines.append({"kind": kind, "step": step, **values})

    def on_epoch_end(self, run, done):
        self.calls.append(done)
        return done == 4

    def on_end(self, run, summary):
        self.calls.append("end")
        assert json.loads((run.folder.path / "summary.json").read_text()).keys() == summary.keys()

    def on_error(self, run, error):
        self.calls.append(error)

    def summary(self):
        return {"counted": self.steps}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_hooks_run_in_order_and_resume_their_state(make_config):
    first, second = Counter(), Counter()
    result = train(make_config(optim={"epochs": 2, "warmup_epochs": 0, "base_lr": 2.0}), [first])
    assert first.calls == ["model", "build", "start at 0", 4, 8, "end"]
    assert json.loads((result.folder / "summary.json").read_text())["counted"] == 8
    best = torch.load(result.folder / "checkpoints" / "best.pt", weights_only=True)
    assert (best["step"], best["counter"]) == (4, {"steps": 4})
    train(make_config(optim={"epochs": 3, "warmup_epochs": 0, "base_lr": 2.0}, resume="auto"), [second])
    assert second.calls == ["build", "start at 8", 12, "end"]
    assert second.steps == 12


def test_on_metrics_gets_every_line_of_the_log(make_config):
    counter = Counter()
    config = make_config(
        optim={"epochs": 2, "warmup_epochs": 0, "base_lr": 2.0}, probe={"enabled": True}, knn={"every_epochs": 1}
    )
    folder = fastbyol.train(config, [counter]).folder
    assert counter.lines == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in counter.lines} == {"train", "knn", "quality", "probe"}


class Raises(Callback):
    """Raise an error in one hook."""

    def __init__(self, hook, error):
        self.error = error
        setattr(self, hook, self.fail)

    def fail(self, *args):
        raise self.error


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_metrics", "on_epoch_end", "on_end"])
def test_error_of_a_callback_ends_the_run_with_a_closed_log(make_config, hook):
    """It propagates with its traceback, other callbacks learn of it, and the run can be resumed."""
    optim = {"epochs": 1, "warmup_epochs": 0, "base_lr": 2.0}
    counter, error = Counter(), ValueError("user's code")
    with pytest.raises(ValueError, match="^user's code$") as caught:
        train(make_config(optim=optim), [Raises(hook, error), counter])
    assert caught.traceback[-1].name == "fail"
    assert counter.calls[-1] is error
    assert ("end" in counter.calls, counter.calls.count(error)) == (False, 1)
    assert not any(isinstance(handler, run_log._TextLog) for handler in logger.handlers)
    result = train(make_config(optim=optim, resume="auto"))
    assert result.step == 4
    assert result.already_finished == (hook == "on_end")  # the error came after the end
    assert sorted(losses(result.folder)) == [1, 2, 3, 4]


def test_io_error_of_a_callback_is_the_cause_of_a_run_error(make_config):
    error = FileNotFoundError(2, "No such file or directory", "labels.txt")
    counter = Counter()
    with pytest.raises(RunError, match="^labels.txt: No such file or directory; there is no checkpoint yet$") as caught:
        train(make_config(), [Raises("on_step", error), counter])
    assert caught.value.__cause__ is error
    assert counter.calls[-1] is caught.value


def test_errors_of_on_error_are_logged(make_config, log_lines):
    counter = Counter()
    first = Raises("on_step", ValueError("first"))
    with pytest.raises(ValueError, match="^first$"):
        train(make_config(), [Raises("on_error", ValueError("second")), first, counter])
    assert counter.calls[-1] is first.error
    assert "warning: Raises.on_error failed too: second" in log_lines


def test_run_stopped_by_a_signal_ends_without_an_error(make_config, monkeypatch):
    counter = Counter()
    stop_after(monkeypatch, 2)
    train(make_config(), [counter])
    assert counter.calls == ["model", "build", "start at 0", "end"]


def test_run_without_callbacks(make_config):
    result = train(make_config(optim={"epochs": 1, "warmup_epochs": 0, "base_lr": 2.0}))
    assert result.step == 4
    saved = torch.load(result.folder / "checkpoints" / "step_00000004.pt", weights_only=True)
    assert saved["knn"] == {}
    assert saved.keys() == {*resume._ENTRIES, "knn"}  # the names that no callback may have


@pytest.mark.parametrize("name", ["model", "optimizer", "counter"])
def test_callback_names_must_be_unique(make_config, name):
    """Otherwise one state would silently replace another in the checkpoint."""
    second = Counter()
    second.name = name
    with pytest.raises(ValueError, match=f"the name '{name}' of a callback is already used"):
        train(make_config(optim={"epochs": 1, "warmup_epochs": 0, "base_lr": 2.0}), [Counter(), second])


def test_run_without_callbacks_has_a_report(make_config, log_lines):
    folder = train(make_config(optim={"epochs": 1, "warmup_epochs": 0, "base_lr": 2.0})).folder
    page = write_report(folder).read_text()
    assert "Last loss" in page
    assert "Online kNN" not in page
    assert not any("summary" in line for line in log_lines)
