"""Output streams that survive a lost reader and print any text; the console and log of a run."""

import io
import os
import subprocess
import sys

import pytest

from fastbyol.runtime.console import Output, safe_stdio
from fastbyol.runtime.logging import console_logging, logger


class Broken(io.StringIO):
    """Accepts `after` writes, then raises."""

    def __init__(self, error, after=0):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text):
        if self.left == 0:
            raise self.error
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (BrokenPipeError(32, "Broken pipe"), True),
        (OSError(5, "Input/output error"), True),
        (OSError(28, "No space left on device"), False),
        (ValueError("I/O operation on closed file"), False),
    ],
)
def test_unwritable_text_is_dropped(error, left):
    stream = Broken(error, after=1)
    output = Output.of(stream)
    assert Output.of(output) is output
    assert [output.write(text) for text in ("a", "bc", "d")] == [1, 2, 1]
    output.flush()
    assert stream.getvalue() == "a"
    assert output.lost == (getattr(error, "strerror", None) or str(error))
    assert output.reader_left == left


def test_full_pipe_is_not_lost():
    output = Output.of(Broken(BlockingIOError(11, "Resource temporarily unavailable")))
    output.write("x")
    assert output.lost is None


def test_closed_stdout_is_ignored(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with safe_stdio():
        print("x")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_printed_in_any_encoding(monkeypatch, encoding):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding))
    with safe_stdio(), console_logging():
        logger.info("caf\udce9 $x$ \x1b[2J [red]:smile: 中文\nend")
    text = buffer.getvalue().decode(encoding)
    assert text.startswith("caf\\udce9 $x$ \\x1b[2J [red]:smile: ")
    assert text.endswith("\\nend\n")
    assert ("中文" in text) == (encoding == "utf-8")


def piped(arguments, shell_end, **options):
    command = f"{sys.executable} -m fastbyol {arguments} {shell_end}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    ("shell_end", "code", "message"),
    [
        ("| head -n 1", 0, ""),
        ("> /dev/full", 1, "standard output cannot be written: No space left on device"),
        (">&-", 0, ""),
    ],
)
def test_print_only_commands_end_quietly(shell_end, code, message):
    done = piped("train --help-all", shell_end, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("\n") == (1 if message else 0)
