"""Named spans of a training step: the profiler, NVTX ranges and traces are recorders of the same
spans.

    with span("backward"):
        loss.backward()

Without a recorder, `span` returns a shared no-op context manager (under 1 us). Only the thread that
trains may open spans.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Protocol

WAIT = "wait for data"
COPY = "copy"
AUGMENT = "augmentation"
TARGET = "target forward"
ONLINE = "online forward"
BACKWARD = "backward"
UPDATE = "update"


class Recorder(Protocol):
    """Receives the spans of this process. Spans do not overlap."""

    def begin(self, name: str) -> None:
        """A span begins."""

    def end(self, name: str) -> None:
        """The span ends, also if its body raised."""


_OFF = nullcontext()
_recorder: Recorder | None = None


def span(name: str) -> AbstractContextManager[None]:
    """Context manager around a named part of a step."""
    return _OFF if _recorder is None else _Span(name, _recorder)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Context manager: `recorder` receives all spans until it exits."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


class _Span:
    def __init__(self, name: str, recorder: Recorder) -> None:
        self._name, self._recorder = name, recorder

    def __enter__(self) -> None:
        self._recorder.begin(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._recorder.end(self._name)
