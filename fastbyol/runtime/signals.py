"""Signals that ask a run to stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from fastbyol.errors import RunError

_GRACE_S = 3.0  # for a collective to return; torchrun kills after 30


@contextmanager
def sigterm_raises(text: str) -> Iterator[None]:
    """Context manager: the first SIGTERM inside raises RunError.

    torchrun sends it to ranks that lost a peer, and would otherwise end them before they could say
    so. A process that waits in a collective, where no Python code runs, prints the text and ends
    after _GRACE_S. After an error, the next signal is ignored: the program reports the error and
    ends.
    """
    seen = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not seen.is_set():
            seen.set()
            raise RunError(text)
        signal.signal(number, old)

    def watch() -> None:
        while (number := os.read(reader, 1)) not in (b"", bytes([signal.SIGTERM])):
            pass
        if number and not seen.wait(_GRACE_S):
            print(f"fastbyol: error: {text}", file=sys.stderr, flush=True)
            os._exit(1)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="fastbyol-sigterm", daemon=True)
    watcher.start()
    old = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    except BaseException:
        seen.set()
        raise
    else:
        signal.signal(signal.SIGTERM, old)
    finally:
        signal.set_wakeup_fd(old_writer)
        os.close(writer)
        watcher.join()
        os.close(reader)


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
