"""Measurement loop of benchmarks: saves every row immediately, and skips contenders that fail."""

import json
import subprocess
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import results_csv

Row = dict[str, Any]


class Skipped(Exception):
    """A contender could not be measured.

    Args:
        reason: One line.
        failed: False if this is expected, for example because the GPU's memory is too small.
    """

    def __init__(self, reason: str, failed: bool = True) -> None:
        super().__init__(reason, failed)
        self.reason, self.failed = reason, failed


class Runner:
    """Collects measurements in a result file.

    Args:
        out: The result file.
        complete: Adds columns to the measured rows before they are written.
    """

    def __init__(self, out: Path, complete: Callable[[list[Row]], list[Row]]) -> None:
        self.rows: list[Row] = []
        self._out, self._complete = out, complete
        self._skipped: set[Hashable] = set()
        self._failed: list[str] = []

    def measure(self, key: Hashable, title: str, function: Callable[[], Row]) -> Row | None:
        """Measure a contender once and write all rows.

        Args:
            key: Identifies the contender. After it was skipped once, further calls do nothing.
            title: Name of the contender in messages.
            function: Returns the row, or raises Skipped.

        Returns:
            The row, None if the contender was skipped.
        """
        if key in self._skipped:
            return None
        try:
            row = function()
        except Skipped as error:
            self._skipped.add(key)
            self._failed += [title] if error.failed else []
            print(f"{title} {'failed' if error.failed else 'skipped'}: {error.reason}", flush=True)
            return None
        self.rows.append(row)
        results_csv.write(self._out, self._complete(self.rows), quiet=True)
        return row

    def finish(self) -> int:
        """Print the result file and the failures.

        Returns:
            The exit code: 1 if a contender failed or nothing was measured.
        """
        print(f"wrote {self._out}" if self.rows else "nothing was measured")
        if self._failed:
            print(f"failed: {'; '.join(self._failed)}")
        return int(bool(self._failed) or not self.rows)


def error_summary(error: BaseException) -> str:
    """Return the type and the first line of an exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_json(command: list[str]) -> dict[str, float]:
    """Run a measurement in its own process and parse the JSON in the last line of its output.

    Raises:
        Skipped: The process failed. The end of its stderr is printed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    print(done.stderr[-3000:], file=sys.stderr, flush=True)
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    raise Skipped(last[0])
