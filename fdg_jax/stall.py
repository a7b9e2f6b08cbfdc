"""Stalls: nothing comes out of the pipeline for longer than anybody wants to wait."""

import queue
import threading
import time
from typing import Any

import jax

from fdg_jax.channel import wait_running
from fdg_jax.interrupts import HeldInterrupts


class StalledError(RuntimeError):
    """No result came within the time that ``stall_timeout`` allows.

    The message has a line per stage: what it waits for, and with which batches.
    """


class Patience:
    """Waits for arrays, but not for ever.

    A thread blocked on a hung device cannot be interrupted, so a helper thread does the
    blocking. It is left behind if the device does not answer.
    """

    def __init__(self, seconds: float | None):
        """Starts no thread yet.

        Args:
            seconds: the most to wait; None for as long as it takes.
        """
        self.seconds = seconds
        self._asked = self._answered = self._thread = None
        self._questions = self._answers = 0

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
            with HeldInterrupts():
                self._asked, self._answered = queue.SimpleQueue(), queue.SimpleQueue()
                self._thread = threading.Thread(
                    target=self._wait,
                    args=(self._asked, self._answered),
                    name="fdg-patience",
                    daemon=True,
                )
                self._thread.start()
        self._questions += 1
        self._asked.put((self._questions, arrays))
        del arrays
        wait_running(self._is_answered, self.seconds)

    def _is_answered(self, seconds: float) -> bool:
        """Waits for the answer to the last question; passes over those given up."""
        try:
            while self._answers != self._questions:
                self._answers = self._answered.get(timeout=seconds)
        except queue.Empty:
            return False
        return True

    def end(self, seconds: float | None = None) -> None:
        """Ends the thread; harmless when it has ended, or never began.

        Args:
            seconds: how long to wait until it has ended, which it never may if a device
                does not answer; None for as long as it takes.
        """
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(seconds)
            self._thread = None  # if it hangs, it is left behind; another may begin

    @staticmethod
    def _wait(questions: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
        while (asked := questions.get()) is not None:
            question, arrays = asked
            array = None
            for array in jax.tree.leaves(arrays):
                try:
                    jax.block_until_ready(array)
                except RuntimeError:
                    continue  # whoever reads the arrays hears of it
            del arrays, array, asked
            answers.put(question)


FOR_EVER = Patience(None)
"""Never gives up."""

LEAVING_SECONDS = 20.0
"""How long a pipeline that is given up waits for its stages and their devices, which
XLA must not be at work on when the process ends. One that hangs never ends at all."""


def wait_before_leaving(arrays: Any, seconds: float | None = None) -> None:
    """Waits until arrays are ready, have failed, or do not come within a while.

    Args:
        arrays: a pytree of arrays of a pipeline that is given up.
        seconds: the most to wait; None for ``LEAVING_SECONDS``.
    """
    # It asks now and then, for as Python ends no thread can be started any more.
    deadline = time.monotonic() + (LEAVING_SECONDS if seconds is None else seconds)
    for array in jax.tree.leaves(arrays):
        while not is_ready(array) and time.monotonic() < deadline:
            time.sleep(0.001)


def is_ready(array: Any) -> bool:
    """Whether a device has nothing more to do for an array, if it is one."""
    is_pending = isinstance(array, jax.Array) and not array.is_deleted()
    return not is_pending or array.is_ready()
