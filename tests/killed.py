"""What test_faults.py runs: `killed.py CONFIG.json TIMES`, a training that is killed so often, and then let go on to its end.

Every attempt is a fork of a process that has imported everything and computed nothing, so it starts within a second. SIGKILL comes
after a random time, in the middle of whatever happens then. Prints the steps at which attempts began.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from fastbyol import checkpoint
from fastbyol.config import Config
from fastbyol.train import CHECKPOINTS, train


def attempt(config: Config, seconds: float | None) -> int:
    child = os.fork()
    if child == 0:
        os.close(1)
        os.open(os.devnull, os.O_WRONLY)
        code = 1
        try:
            train(config)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> int:
    config = Config.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    folder = Path(config.runs) / config.name / CHECKPOINTS
    draw = random.Random(0)
    begins, killed = [], 0
    while killed < int(sys.argv[2]):
        saved = checkpoint.newest_good(folder, print)
        begins.append(saved[1]["step"] if saved else 0)
        killed += attempt(config, draw.uniform(0.3, 1.5)) == signal.SIGKILL
        if len(begins) > 3 * int(sys.argv[2]):
            break  # it ends before it can be killed: the test says so
    last = attempt(config, None)
    print(json.dumps({"begins": begins, "killed": killed, "last": last}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
