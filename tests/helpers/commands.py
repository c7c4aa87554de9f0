"""What the ranks of test_profiling.py run: `torchrun ... commands.py COMMANDS.json`.

Every command line of a JSON list, in turn, in one process: starting takes longer than they do. Their exit codes go to RANK.json beside it.
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
