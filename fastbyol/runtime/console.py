"""Standard output that survives a reader that goes away, and that can print any text."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10  # of progress, if there is no terminal to draw a bar on


class Output:
    """A text stream that never raises: text that cannot be written is dropped.

    The reader may be `head`, a terminal that disconnects, or a disk that fills up. Characters that
    the encoding lacks are escaped.

    Attributes:
        lost: why the stream cannot be written any more, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: str | None = None

    @classmethod
    def of(cls, stream: Any) -> "Output":
        """Wrap a stream, unless it already is. None (a closed descriptor) becomes /dev/null."""
        if isinstance(stream, cls):
            return stream
        return cls(open(os.devnull, "w") if stream is None else stream)

    def write(self, text: str) -> int:
        """Write or drop the text; return its length."""
        if self.lost is None:
            try:
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except BlockingIOError:  # a full non-blocking pipe: the next text may fit
                pass
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
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
        """True if the reader has gone, rather than the disk being full."""
        return self.lost in (os.strerror(errno.EPIPE), os.strerror(errno.EIO))

    def _give_up(self, error: OSError | ValueError) -> None:
        self.lost = getattr(error, "strerror", None) or str(error)
        # Redirect buffered text to nowhere, or the interpreter's last flush would fail too.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


@contextmanager
def safe_stdio() -> Iterator[Output]:
    """Context manager: sys.stdout and sys.stderr are `Output`s. Yields the one of sys.stdout."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Output.of(before[0]), Output.of(before[1])  # type: ignore[assignment]
    try:
        yield sys.stdout  # type: ignore[misc]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
