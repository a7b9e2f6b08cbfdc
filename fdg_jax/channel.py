"""Channels: bounded queues between neighbouring stages, and the messages in them.

Each channel has one writer and one reader, and both block, so the pipeline is a Kahn
process network: its results do not depend on how threads are scheduled.
"""

import enum
import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from fdg_jax.interrupts import HeldInterrupts


class Kind(enum.Enum):
    """What a message asks of the stage that receives it."""

    TRAIN = "train"
    EVALUATE = "evaluate"
    SNAPSHOT = "snapshot"
    STOP = "stop"


@dataclass(frozen=True)
class Message:
    """What travels through a channel.

    Attributes:
        kind: what to do with it; control travels in order with the data.
        batch: number of the training batch that it belongs to, or that comes next.
        payload: a pytree of arrays.
    """

    kind: Kind
    batch: int
    payload: Any = None


class ChannelClosed(Exception):
    """The channel was closed: the run is over, normally or by a failure elsewhere."""


class WaitTimeout(Exception):
    """What was awaited did not come in the time that was given."""


_SLICE_SECONDS = 0.25


def wait_running(wait: Callable[[float], bool], seconds: float | None) -> None:
    """Waits for at most so long, less the time for which the process was suspended.

    A scheduler may stop a process (SIGSTOP) for hours. Then what it waits for did not
    run either, so the time is counted in slices, and a suspension as one of them.
    Ctrl-C takes effect between two slices: within, it could leave a lock locked.

    Args:
        wait: waits for so many seconds, and tells whether what it waits for is there.
        seconds: the most to wait; None for as long as it takes.

    Raises:
        WaitTimeout: the time is over.
    """
    left = math.inf if seconds is None else seconds
    while left > 0:
        with HeldInterrupts():
            if wait(min(left, _SLICE_SECONDS)):
                return
        left -= _SLICE_SECONDS
    raise WaitTimeout


class Channel(Protocol):
    """What stages need of a channel, whatever carries the messages."""

    def put(self, message: Message, timeout: float | None = None) -> None:
        """Sends a message; waits while the channel is full, ``timeout`` seconds."""

    def get(self, timeout: float | None = None) -> Message:
        """Returns the oldest message; waits for it, ``timeout`` seconds."""

    def await_room(self, timeout: float | None = None) -> None:
        """Waits until ``put`` would not wait, ``timeout`` seconds."""

    def await_message(self, timeout: float | None = None) -> None:
        """Waits until ``get`` would not wait, ``timeout`` seconds."""

    def full(self) -> bool:
        """Whether ``put`` would wait."""

    def empty(self) -> bool:
        """Whether ``get`` would wait."""

    def close(self) -> None:
        """Makes every present and future ``put`` and ``get`` raise ChannelClosed."""


class LocalChannel:
    """A channel between two threads of one process."""

    def __init__(
        self, capacity: int, placement: jax.Device | jax.sharding.Sharding | None = None
    ):
        """Creates an empty channel.

        Args:
            capacity: the most messages that it holds, at least 1.
            placement: where the reader wants the arrays, to which ``put`` sends them
                (without waiting for them); None leaves them where they are.
        """
        assert capacity >= 1, capacity
        self.capacity = capacity
        self.most_held = 0
        self._placement = placement
        self._messages = deque()
        self._closed = False
        self._changed = threading.Condition()

    def place(self, message: Message) -> Message:
        """Returns a message with its arrays where the reader wants them."""
        if self._placement is None:
            return message
        payload = jax.device_put(message.payload, self._placement)
        return Message(message.kind, message.batch, payload)

    def put(self, message: Message, timeout: float | None = None) -> None:
        """Sends a message; waits while the channel is full.

        Args:
            message: to be sent.
            timeout: the most seconds to wait; None for as long as it takes.

        Raises:
            ChannelClosed: the channel is, or was meanwhile, closed.
            WaitTimeout: it was full all the time.
        """
        message = self.place(message)
        with self._changed:
            self._wait_until(lambda: not self.full(), timeout)
            self._messages.append(message)
            self.most_held = max(self.most_held, len(self._messages))
            self._changed.notify_all()

    def get(self, timeout: float | None = None) -> Message:
        """Returns the oldest message; waits while the channel is empty.

        Args:
            timeout: the most seconds to wait; None for as long as it takes.

        Raises:
            ChannelClosed: the channel is, or was meanwhile, closed.
            WaitTimeout: it was empty all the time.
        """
        with self._changed:
            self._wait_until(lambda: not self.empty(), timeout)
            message = self._messages.popleft()
            self._changed.notify_all()
            return message

    def await_room(self, timeout: float | None = None) -> None:
        """Waits until there is room, which stays: the caller is the only writer.

        Raises:
            ChannelClosed: the channel is, or was meanwhile, closed.
            WaitTimeout: it was full for ``timeout`` seconds.
        """
        self._wait_until(lambda: not self.full(), timeout)

    def await_message(self, timeout: float | None = None) -> None:
        """Waits until there is a message, which stays: the caller is the only reader.

        Raises:
            ChannelClosed: the channel is, or was meanwhile, closed.
            WaitTimeout: it was empty for ``timeout`` seconds.
        """
        self._wait_until(lambda: not self.empty(), timeout)

    def oldest(self) -> Message:
        """Returns the message that ``get`` would return, and leaves it."""
        return self._messages[0]

    def _wait_until(self, ready: Callable[[], bool], timeout: float | None) -> None:
        def wait(seconds):
            # Ctrl-C between two slices must not find the channel locked. Who needs
            # what was awaited to stay has locked it already; the lock is reentrant.
            with self._changed:
                return self._changed.wait_for(lambda: self._closed or ready(), seconds)

        wait_running(wait, timeout)
        if self._closed:
            raise ChannelClosed

    def full(self) -> bool:
        """Whether ``put`` would wait."""
        return len(self._messages) >= self.capacity

    def empty(self) -> bool:
        """Whether ``get`` would wait."""
        return not self._messages

    def close(self) -> None:
        """Wakes every waiting thread; messages still held are dropped."""
        with self._changed:
            self._closed = True
            self._messages.clear()
            self._changed.notify_all()
