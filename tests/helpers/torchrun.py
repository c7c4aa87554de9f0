"""Starting scripts on several ranks, and ending them as the command line does."""

import os
import subprocess
import sys
from collections.abc import Callable

from helpers.common import HANG_S, ROOT

from fastbyol.errors import FastbyolError, PeerFailure
from fastbyol.runtime.logging import console_logging


def torchrun(script: str, *arguments: object, ranks: int, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder on `ranks` ranks; return the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={restarts}", str(ROOT / "tests/helpers" / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, env=environment, check=False)


def exit_code(work: Callable[[], object]) -> int:
    """Return the exit code of a rank; print the error for the user."""
    try:
        with console_logging():
            work()
    except PeerFailure as error:
        return error.exit_code
    except FastbyolError as error:
        print(f"fastbyol: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
