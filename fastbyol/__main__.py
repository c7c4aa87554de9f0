"""`python -m fastbyol` is the same program as the `fastbyol` command."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from fastbyol.cli import local_rank, main


def _report_checkout() -> None:
    """Print a note if -m runs a checkout in the current folder instead of the installed package."""
    installed = PathFinder.find_spec("fastbyol", sys.path[1:])
    here = Path(__file__).resolve().parent
    if installed is not None and installed.origin is not None and local_rank() == 0:
        there = Path(installed.origin).resolve().parent
        if there != here:
            print(f"fastbyol: note: this runs {here}, not the installed {there}", file=sys.stderr)


if __name__ == "__main__":
    _report_checkout()
    raise SystemExit(main())
