"""Errors that a user caused or has to act on: shown as one line, never as a traceback."""

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """Text for a terminal, a log or a message: control characters, and bytes of names that are not UTF-8, are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class FastbyolError(Exception):
    """Base of all errors whose text is meant for the user; the CLI prints it and exits with `exit_code`.

    Its text is one line: line breaks and other control characters, which names of files, classes and fields may hold, are escaped.
    """

    exit_code = 1

    def __init__(self, text: str = "") -> None:
        super().__init__(printable(text))


class InputError(FastbyolError):
    """The input (config, path, data set, checkpoint argument) is unusable: exit code 2, nothing was started."""

    exit_code = 2


class RunError(FastbyolError):
    """A run that had started had to stop (non-finite loss, full disk, too many bad images): exit code 1."""

    exit_code = 1


class PeerFailure(FastbyolError):
    """Another rank has said why the run ends; this one says nothing."""


class LoaderTimeout(RunError):
    """No batch came for data.timeout_s; `stacks` says where every thread was."""

    def __init__(self, text: str, stacks: str) -> None:
        super().__init__(text)
        self.stacks = stacks


_EXHAUSTED = re.compile(
    r"out of memory|not enough memory|can't allocate memory|Storage size calculation overflowed|can't start new thread|"
    r"failed to map segment|cannot allocate memory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine has no more memory or threads; torch's CPU allocator and Python's threads say so in words alone."""
    return isinstance(error, MemoryError) or _EXHAUSTED.search(str(error)) is not None


def error_reason(error: BaseException) -> str:
    """Why something cannot be read or written, in one line: the system's own words where it has some."""
    return getattr(error, "strerror", None) or first_line(error)


def join_names(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: "a, b, c (+3 more)"."""
    return ", ".join(names[:most]) + (f" (+{len(names) - most} more)" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's text (its class name if it has none), for one-line messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading says nothing by itself
    return line if len(line) <= 400 else f"{line[:400]}..."
