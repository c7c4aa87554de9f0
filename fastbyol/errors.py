"""Errors for the user: shown as one line, without a traceback."""

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """Return the text with control characters and invalid UTF-8 bytes of file names escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FastbyolError(Exception):
    """Base class of errors for the user.

    The command line prints the text and exits with `exit_code`.

    The text is one line. Control characters, such as those in names of files and classes, are
    escaped.
    """

    exit_code = 1

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(text))


class InputError(FastbyolError):
    """Unusable input (config, path, data set, checkpoint); nothing was started. Exit code 2."""

    exit_code = 2


class RunError(FastbyolError):
    """A run had to stop, e.g. for a non-finite loss or a full disk. Exit code 1."""

    exit_code = 1


class PeerFailure(FastbyolError):
    """Another rank has reported the error that ends the run. Nothing is printed."""


class StorageError(RunError):
    """A remote storage does not answer, or no longer admits the user."""


class LoaderTimeout(RunError):
    """No batch arrived within data.timeout_s.

    Attributes:
        stacks: the stacks of all threads.
    """

    def __init__(self, text: str, stacks: str) -> None:
        super().__init__(text)
        self.stacks = stacks


_OUT_OF_MEMORY = re.compile(
    r"out of memory|not enough memory|can't allocate memory|Storage size calculation overflowed|can't start new thread|"
    r"failed to map segment|cannot allocate memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the machine ran out of memory or threads.

    The text decides, since torch's CPU allocator and Python's threads raise a RuntimeError.
    """
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def error_reason(error: BaseException) -> str:
    """Return the reason of an I/O error in one line, the system's if there is one."""
    return getattr(error, "strerror", None) or first_line(error)


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message: "a, b, c (+3 more)"."""
    return ", ".join(names[:most]) + (f" (+{len(names) - most} more)" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an exception's text, or its class name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading alone has no information
    return line if len(line) <= 400 else f"{line[:400]}..."
