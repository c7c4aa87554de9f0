"""Signals that ask a run to stop."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from fastbyol.errors import RunError


@contextmanager
def sigterm_raises(text: str) -> Iterator[None]:
    """Context manager: the first SIGTERM inside raises RunError.

    torchrun sends it to ranks that lost a peer, and would otherwise end them before they could say
    so. After an error, signals are ignored: the program reports the error and ends.
    """
    is_inside = True

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal is_inside
        if is_inside:
            is_inside = False
            raise RunError(text)

    old = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    except BaseException:
        is_inside = False
        raise
    signal.signal(signal.SIGTERM, old)


class StopSignals:
    """Context manager: SIGTERM, SIGINT and SIGHUP ask the loop to stop after the current step.

    A second SIGTERM or SIGINT ends the program at once. A second SIGHUP does not: shell and kernel
    may each send one when a terminal closes. A SIGHUP that is already ignored, as under nohup,
    stays ignored.
    """

    received: signal.Signals | None = None

    def __enter__(self) -> Self:
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._old = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else self._old[self.received])
