"""The package's logger, and the console output of the command line.

As a library, fastbyol logs to the standard logger "fastbyol" and configures nothing.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from fastbyol.errors import printable
from fastbyol.runtime.console import Output

logger = logging.getLogger("fastbyol")


def format_record(record: logging.LogRecord) -> str:
    """Return a record as the console shows it: with its level if not INFO, and escaped."""
    prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
    return printable(prefix + record.getMessage())


class ConsoleHandler(logging.Handler):
    """Prints records to the current sys.stdout, one line each.

    Warnings are yellow on a terminal. Never raises.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record."""
        style = "yellow" if record.levelno >= logging.WARNING else None
        # sys.stdout may have been replaced since the last record.
        console = Console(file=Output.of(sys.stdout), emoji=False)  # type: ignore[arg-type]
        console.print(format_record(record), style=style, highlight=False, markup=False, soft_wrap=True)
        console.file.flush()


@contextmanager
def console_logging() -> Iterator[None]:
    """Context manager: print the logger's records of level INFO and above, each once."""
    if any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        yield
        return
    handler, level, propagate = ConsoleHandler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # handlers of the root logger would print every line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def muted(mute: bool) -> Iterator[None]:
    """Context manager: drop records below ERROR if `mute`, on all ranks but the main process."""
    logger.addFilter(drop := lambda record: not mute or record.levelno >= logging.ERROR)
    try:
        yield
    finally:
        logger.removeFilter(drop)
