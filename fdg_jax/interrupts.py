"""Ctrl-C, held back for as long as it would leave something half done.

Python raises ``KeyboardInterrupt`` in the main thread between any two of its steps, so
also between giving a message to an engine and noting that it was given, or between a
compiled call that gives up a state's buffers and the assignment of the new state.
"""

import signal
import threading
from types import TracebackType


class HeldInterrupts:
    """A context manager in which SIGINT is only noted; it takes effect at the end.

    What waits, and may wait for ever, does not belong inside. In other threads than the
    main one, which never see a signal, it does nothing.
    """

    def __enter__(self) -> None:
        """Takes the signal over, if something in Python would be told of it."""
        self._handler = self._noted = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._note)

    def _note(self, number, frame):
        self._noted = (number, frame)

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Gives the signal back, and passes on what came meanwhile."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            if self._noted is not None and error is None:
                self._handler(*self._noted)
