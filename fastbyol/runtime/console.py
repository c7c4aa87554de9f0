"""Standard output: whoever reads it may go away, and names in it may hold anything."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from fastbyol.errors import printable

SECONDS_BETWEEN_LINES = 10  # of long work where there is no terminal to draw a bar on


class Output:
    """A text stream that never raises: what it cannot write is dropped, and `lost` says why.

    Its reader may be `head`, a terminal whose connection dies, or a disk that fills up. Characters that its encoding lacks are escaped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: str | None = None

    @classmethod
    def of(cls, stream: Any) -> "Output":
        """The stream, wrapped unless it is already; None, as of a closed descriptor, is a stream that nobody reads."""
        if isinstance(stream, cls):
            return stream
        return cls(open(os.devnull, "w") if stream is None else stream)

    def write(self, text: str) -> int:
        """Writes or drops `text`."""
        if self.lost is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except BlockingIOError:  # a pipe that is full and does not block: the next text may fit
                pass
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Passes on what is written."""
        if self.lost is None:
            try:
                self._stream.flush()
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def reader_left(self) -> bool:
        """Whether it was lost since its reader is gone, and not for want of space."""
        return self.lost in (os.strerror(errno.EPIPE), os.strerror(errno.EIO))

    def _give_up(self, error: OSError | ValueError) -> None:
        self.lost = getattr(error, "strerror", None) or str(error)
        # What is buffered goes to nowhere: the interpreter's own last flush would fail too.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def safe_stdio() -> Iterator[Output]:
    """sys.stdout and sys.stderr are such streams within; yields the former."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output.of(before[0]), Output.of(before[1])  # type: ignore[assignment]
    try:
        yield sys.stdout  # type: ignore[misc]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def say(text: object) -> None:
    """Prints one line; control characters in it are escaped."""
    print(printable(str(text)), flush=True)
