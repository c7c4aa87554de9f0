"""The loop of a benchmark whose contenders take turns: rows are written after every turn, and a contender that fails is left out."""

import json
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import results_csv

Row = dict[str, Any]


class LeftOut(Exception):
    """A contender has no row.

    Args:
        reason: one line.
        failed: false where it was to be expected, as of a network that the GPU's memory does not hold.
    """

    def __init__(self, reason: str, failed: bool = True) -> None:
        super().__init__(reason, failed)
        self.reason, self.failed = reason, failed


class Turns:
    """Collects rows in a result file.

    Args:
        out: the file.
        complete: what makes the file's rows of those that were measured.
    """

    def __init__(self, out: Path, complete: Callable[[list[Row]], list[Row]]) -> None:
        self.rows: list[Row] = []
        self._out, self._complete = out, complete
        self._left_out: set[Hashable] = set()
        self._failed: list[str] = []

    def take(self, who: Hashable, title: str, measure: Callable[[], Row]) -> Row | None:
        """Measures a contender once and writes all rows; after a failure it has no further turns."""
        if who in self._left_out:
            return None
        try:
            row = measure()
        except LeftOut as error:
            self._left_out.add(who)
            self._failed += [title] if error.failed else []
            print(f"{title} {'failed' if error.failed else 'is left out'}: {error.reason}", flush=True)
            return None
        self.rows.append(row)
        results_csv.write(self._out, self._complete(self.rows), quiet=True)
        return row

    def end(self) -> int:
        """Says where the rows are and what failed; the exit code."""
        print(f"wrote {self._out}" if self.rows else "nothing was measured")
        if self._failed:
            print(f"failed: {'; '.join(self._failed)}")
        return int(bool(self._failed) or not self.rows)


def one_line(error: BaseException) -> str:
    """Kind and first line of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def result_of(command: list[str]) -> dict[str, float]:
    """The JSON in the last line that a measurement in a process of its own prints.

    Raises:
        LeftOut: it failed; the end of what it said has been printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    print(done.stderr[-3000:], file=sys.stderr, flush=True)
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    raise LeftOut(last[0])
