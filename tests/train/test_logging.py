"""The package's logger and its console output."""

import io
import logging
import subprocess
import sys

import pytest

from fastbyol.runtime.logging import console_logging, logger, muted


@pytest.fixture(autouse=True)
def console_output():
    """Disable conftest.py's fixture, so that these tests start with an unconfigured logger."""


def test_levels_and_prefixes(capsys):
    with console_logging():
        logger.debug("hidden")
        logger.info("one")
        logger.warning("two")
        logger.error("three")
    assert capsys.readouterr() == ("one\nwarning: two\nerror: three\n", "")


def test_control_characters_are_escaped(capsys, log_lines):
    text = "caf\udce9 \x1b[2J [red]:smile:\nend"
    with console_logging():
        logger.info(text)
        logger.warning("%s", text)
    escaped = "caf\\udce9 \\x1b[2J [red]:smile:\\nend"
    assert capsys.readouterr().out == f"{escaped}\nwarning: {escaped}\n"
    assert log_lines == [escaped, f"warning: {escaped}"]


def test_long_lines_are_not_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with console_logging():
        logger.info("word " * 50 + "end")
    assert capsys.readouterr().out == "word " * 50 + "end\n"


def test_warnings_are_yellow_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with console_logging():
        logger.info("one")
        logger.warning("two")
    assert sys.stdout.getvalue() == "one\n\x1b[33mwarning: two\x1b[0m\n"


def test_import_does_not_configure_logging():
    """Importing the package adds no handler; Python's last-resort handler prints warnings."""
    code = """
import logging
import fastbyol.loop
from fastbyol.runtime.logging import logger
assert logger.handlers == [] and logger.filters == [] and logger.propagate and logger.level == logging.NOTSET
assert logging.getLogger().handlers == []
logger.info("one")
logger.warning("two")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "two\n")


def test_application_handlers_receive_records(caplog):
    with caplog.at_level(logging.INFO):
        logger.info("one")
    assert caplog.messages == ["one"]


def test_console_logging_prints_once_and_restores_the_logger(capsys, caplog):
    before = logger.level, logger.propagate, list(logger.handlers)
    with pytest.raises(KeyError), console_logging():
        logger.info("one")
        raise KeyError
    assert capsys.readouterr().out == "one\n"
    assert caplog.messages == []  # not a second time by the root logger
    assert (logger.level, logger.propagate, logger.handlers) == before


def test_output_follows_a_replaced_stdout(capsys, monkeypatch):
    with console_logging():
        logger.info("one")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            logger.info("two")
            assert sys.stdout.getvalue() == "two\n"
        logger.info("three")
    assert capsys.readouterr().out == "one\nthree\n"


def test_muted_ranks_log_errors_only(log_lines):
    with muted(True):
        logger.info("one")
        logger.warning("two")
        logger.error("three")
    with muted(False):
        logger.info("four")
    logger.info("five")
    assert log_lines == ["error: three", "four", "five"]
