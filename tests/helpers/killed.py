"""Script of test_faults.py: kill a training run TIMES times, then let it finish.

Usage: `killed.py CONFIG.json TIMES`. Each attempt is a fork of a process that has only imported the
package, so it starts within a second. It receives SIGKILL after a random number of steps plus a few
random milliseconds, regardless of the machine's speed. Prints the first step of each attempt.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fastbyol.api import train
from fastbyol.config import Config
from fastbyol.runtime import checkpoint
from fastbyol.runtime.run_folder import CHECKPOINTS
from fastbyol.step import TrainStep


def attempt(config: Config, steps: int | None, delay_s: float = 0.0) -> int:
    """Train in a child process, kill it, and return its exit status.

    SIGKILL comes `delay_s` seconds after the `steps`-th step begins; None lets the run finish.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        original = TrainStep.__call__
        TrainStep.__call__ = lambda *arguments: os.write(write_end, b".") and original(*arguments)
        code = 1
        try:
            train(config)
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb", buffering=0) as begun:
        if steps is not None:
            while steps and begun.read(1):
                steps -= 1
            time.sleep(delay_s)
            os.kill(child, signal.SIGKILL)
        while begun.read(4096):  # a full pipe would block the training
            pass
    return os.waitpid(child, 0)[1]


def main() -> int:
    config = Config.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    folder = Path(config.runs) / config.name / CHECKPOINTS
    draw = random.Random(0)
    begins, killed = [], 0
    while killed < int(sys.argv[2]):
        saved = checkpoint.latest_valid(folder, print)
        begins.append(saved[1]["step"] if saved else 0)
        killed += attempt(config, draw.randint(1, 20), draw.uniform(0, 0.03)) == signal.SIGKILL
        if len(begins) > 3 * int(sys.argv[2]):
            break  # the runs finish before the signal; the test fails on the count
    last = attempt(config, None)
    print(json.dumps({"begins": begins, "killed": killed, "last": last}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
