"""Script for the ranks of test_distributed.py.

Usage: `torchrun ... ranks.py CONFIGS.json [WHAT RANK STEP]`. Trains all configs of a JSON list.
WHAT happens on RANK before STEP:

- `kill`: SIGKILL to itself.
- `once`: like `kill`, but only before the first restart.
- `sigterm`: SIGTERM to itself.
- `bad`: the error of too many unreadable images.
"""

import json
import os
import signal
import sys
from pathlib import Path

from helpers.torchrun import exit_code

from fastbyol import step as step_module
from fastbyol.api import train
from fastbyol.config import Config
from fastbyol.errors import RunError


def sabotage(what: str, rank: int, at: int) -> None:
    original = step_module.TrainStep.__call__

    def watched(self, number, batch):
        if self.world.rank == rank and number == at:
            if what == "kill" or (what == "once" and self.world.restarts == 0):
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "bad":
                raise RunError("too many bad images")
        return original(self, number, batch)

    step_module.TrainStep.__call__ = watched


def main() -> int:
    if len(sys.argv) > 2:
        sabotage(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    configs = json.loads(Path(sys.argv[1]).read_text())
    return exit_code(lambda: [train(Config.from_dict(values)) for values in configs])


if __name__ == "__main__":
    sys.exit(main())
