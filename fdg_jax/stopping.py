"""Stopping a run from outside: SIGTERM, Ctrl-C, and the time that is left then.

The first signal asks: the run finishes the batches that are under way, takes a
snapshot, and leaves. A second one, or the end of the time, ends the process at once,
which costs the steps since the last snapshot and nothing else, since snapshots are
whole or not there.
"""

import os
import signal
import sys
import threading
from types import TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was stopped from outside, and can go on later.

    Attributes:
        signal: number of the signal.
        step: batches in the snapshot that it can go on from; None if there is none.
    """

    def __init__(self, number: int, step: int | None):
        """Creates the exception."""
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.step = step


class Stopping:
    """Whether the run was asked to stop.

    As a context manager, in the main thread, it is what SIGTERM and SIGINT ask; outside
    of one it never stops anything.

    Attributes:
        signal: number of the signal that asked, or None.
    """

    def __init__(self, seconds: float):
        """Creates one that nobody has asked yet.

        Args:
            seconds: after which the process ends, whatever it is doing.
        """
        self.signal = None
        self._seconds = seconds
        self._timer = None
        self._before = {}

    def __enter__(self) -> "Stopping":
        """Takes the signals over."""
        self._before = {n: signal.signal(n, self._ask) for n in SIGNALS}
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the signals back."""
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.signal is not None:
            self._leave("a second signal", number)
        self.signal = number
        self._timer = threading.Timer(
            self._seconds,
            self._leave,
            [f"{self._seconds:g} seconds have passed", number],
        )
        self._timer.daemon = True
        self._timer.start()

    @staticmethod
    def _leave(reason: str, number: int) -> None:
        """Ends the process, without a snapshot and without waiting for any thread."""
        print(f"{reason}: leaving at once", file=sys.stderr, flush=True)
        os._exit(128 + number)
