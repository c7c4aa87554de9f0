"""Callbacks: order of the hooks and state in checkpoints."""

import json

import pytest
import torch

from fastbyol import resume
from fastbyol.callbacks import Callback
from fastbyol.loop import train_loop as train
from fastbyol.tools.report import write_report


class Counter(Callback):
    """Record hook calls, and keep the step count across a resume."""

    name = "counter"

    def __init__(self):
        self.calls, self.steps = [], 0

    def on_model(self, model, config):
        self.calls.append("model")

    def on_build(self, training):
        self.calls.append("build")

    def on_step(self, run, batch, output):
        self.steps += 1

    def on_epoch_end(self, run, done):
        self.calls.append(done)
        return done == 4

    def summary(self):
        return {"counted": self.steps}

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_hooks_run_in_order_and_resume_their_state(make_config):
    first, second = Counter(), Counter()
    result = train(make_config(optim={"epochs": 2, "warmup_epochs": 0, "base_lr": 2.0}), [first])
    assert first.calls == ["model", "build", 4, 8]
    assert json.loads((result.folder / "summary.json").read_text())["counted"] == 8
    best = torch.load(result.folder / "checkpoints" / "best.pt", weights_only=True)
    assert (best["step"], best["counter"]) == (4, {"steps": 4})
    train(make_config(optim={"epochs": 3, "warmup_epochs": 0, "base_lr": 2.0}, resume="auto"), [second])
    assert second.calls == ["build", 12]
    assert second.steps == 12


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
