"""Stalls: nothing comes out of the pipeline for longer than anybody wants to wait."""

import queue
import threading
from typing import Any

import jax

from fdg_jax.channel import WaitTimeout


class StalledError(RuntimeError):
    """No result came within the time that ``stall_timeout`` allows.

    The message has a line per stage: what it waits for, and with which batches.
    """


class Patience:
    """Waits for arrays, but not for ever.

    Nobody can be woken who waits for a device that never answers, so a thread of its
    own does the waiting. It is left behind where the device does not answer.
    """

    def __init__(self, seconds: float | None):
        """Starts no thread yet.

        Args:
            seconds: the most to wait; None for as long as it takes.
        """
        self.seconds = seconds
        self._asked = self._answered = self._thread = None

    def wait_for(self, arrays: Any) -> None:
        """Waits until arrays are ready, or have failed.

        Args:
            arrays: a pytree of arrays.

        Raises:
            WaitTimeout: the time is over.
        """
        if self.seconds is None:
            return
        if self._thread is None:
            self._asked, self._answered = queue.SimpleQueue(), queue.SimpleQueue()
            self._thread = threading.Thread(
                target=self._wait, name="fdg-patience", daemon=True
            )
            self._thread.start()
        self._asked.put(arrays)
        del arrays
        try:
            self._answered.get(timeout=self.seconds)
        except queue.Empty:
            raise WaitTimeout from None

    def end(self, wait: bool = True) -> None:
        """Ends the thread; harmless when it has ended, or never began.

        Args:
            wait: until it has ended, which it never may if a device does not answer.
        """
        if self._thread is not None:
            self._asked.put(None)
            if wait:
                self._thread.join()
                self._thread = None

    def _wait(self) -> None:
        while (arrays := self._asked.get()) is not None:
            array = None
            for array in jax.tree.leaves(arrays):
                try:
                    jax.block_until_ready(array)
                except RuntimeError:
                    continue  # whoever reads the arrays hears of it
            del arrays, array
            self._answered.put(None)


FOR_EVER = Patience(None)
"""Never gives up."""
