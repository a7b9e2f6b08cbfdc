"""Stopping a run from outside: SIGTERM, Ctrl-C, and the time that is left then.

The first signal asks: the run finishes the batches that are under way, takes a
snapshot, and leaves. A second one, or the end of the time, ends the process at once,
which costs the steps since the last snapshot and nothing else, since snapshots are
whole or not there.

Python's own handlers wait for the main thread, which may be compiling, or waiting for
a device. So the operating system's handler writes the signal's number into a pipe
(``signal.set_wakeup_fd``), and a thread reads it there.
"""

import os
import select
import signal
import threading
from types import TracebackType

from fdg_jax.channel import WaitTimeout, wait_running

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run was stopped from outside, and can go on later.

    Attributes:
        signal: number of the signal.
        step: batches in the snapshot that it goes on from; 0 where there is none.
    """

    def __init__(self, number: int, step: int):
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

    def __enter__(self) -> "Stopping":
        """Takes the signals over."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer)
        # A handler there must be; it has nothing left to do.
        self._before = {n: signal.signal(n, lambda *_: None) for n in SIGNALS}
        self._watcher = threading.Thread(
            target=self._watch, name="fdg-stopping", daemon=True
        )
        self._watcher.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # which ends the watcher
        self._watcher.join()
        os.close(self._reader)

    def _watch(self) -> None:
        """Body of the thread: the first signal asks; then there is no way back."""
        asked = self._next_signal(None)
        if asked is None:
            return
        self.signal = asked
        again = self._next_signal(self._seconds)
        if again is not None:
            self._leave(
                "a second signal" if again else self._time_is_over, again or asked
            )

    @property
    def _time_is_over(self) -> str:
        return f"{self._seconds:g} seconds have passed"

    def _next_signal(self, seconds: float | None) -> int | None:
        """Number of the next signal; 0 when the time is over, None at the end."""
        while True:
            try:
                wait_running(self._has_signal, seconds)
            except WaitTimeout:
                return 0
            number = os.read(self._reader, 1)
            if not number:
                return None
            if number[0] in SIGNALS:
                return number[0]

    def _has_signal(self, seconds: float) -> bool:
        return bool(select.select([self._reader], [], [], seconds)[0])

    @staticmethod
    def _leave(reason: str, number: int) -> None:
        """Ends the process, without a snapshot and without waiting for any thread."""
        try:
            # A pipe that is full, because nobody reads it, would keep the process.
            if select.select([], [2], [], 0)[1]:
                os.write(2, f"{reason}: leaving at once\n".encode())
        finally:
            os._exit(128 + number)
