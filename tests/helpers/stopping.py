"""Signals during a training run."""

import os
import signal

from fastbyol import step


def stop_after(monkeypatch, steps):
    """Send SIGTERM during optimizer step number `steps`, counted from this call."""
    count = iter(range(1, 10_000))
    original = step.TrainStep.__call__

    def counted(self, *args):
        output = original(self, *args)
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return output

    monkeypatch.setattr(step.TrainStep, "__call__", counted)
