"""The multi-rank step with NCCL, in a process group of one rank."""

import json
import os
import subprocess
import sys

import pytest
from helpers.common import ROOT
from helpers.on_device import DEVICE

pytestmark = pytest.mark.gpu


def test_multi_rank_step_of_one_rank_equals_the_plain_step():
    """In float32 with SyncBN, losses agree to 1e-4 and weight changes to 2%.

    A captured step replays the same kernels: its losses agree to 1e-2 over 14 steps.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = (
        os.environ
        | alone
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    )
    command = [sys.executable, str(ROOT / "tests/helpers/group_of_one.py")]
    limit_s = 180 if DEVICE.type == "cuda" else 280
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == 1
    assert found["backend"] == ("nccl" if DEVICE.type == "cuda" else "gloo")
    assert found["host backend"] == "gloo"
    assert max(abs(a - b) for a, b in zip(found["plain"], found["parallel"], strict=True)) < 1e-4
    assert found["weight difference"] < 0.02
    if DEVICE.type == "cuda":
        plain, captured = found["captured"]
        assert max(abs(a - b) for a, b in zip(plain, captured, strict=True)) < 1e-2
    assert found["maximum"] == 3
    assert found["agreed"] == [False, False, True]
