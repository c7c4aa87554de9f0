"""Script for the ranks of test_profiling.py: `torchrun ... commands.py COMMANDS.json`.

Runs all command lines of a JSON list in one process, since startup dominates their time. Writes the
exit codes to RANK.json in the same folder.
"""

import json
import os
import sys
from pathlib import Path

from fastbyol import cli

if __name__ == "__main__":
    commands = Path(sys.argv[1])
    codes = [cli.main(command) for command in json.loads(commands.read_text())]
    commands.with_name(f"{os.environ['RANK']}.json").write_text(json.dumps(codes))
