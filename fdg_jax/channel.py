"""Channels: bounded queues between neighbouring stages, and the messages in them.

Each channel has one writer and one reader, and both block, so the pipeline is a Kahn
process network: its results do not depend on how threads are scheduled.
"""

import enum
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax


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


class Channel(Protocol):
    """What stages need of a channel, whatever carries the messages."""

    def put(self, message: Message, timeout: float | None = None) -> None:
        """Sends a message; waits while the channel is full, ``timeout`` seconds."""

    def get(self, timeout: float | None = None) -> Message:
        """Returns the oldest message; waits for it, ``timeout`` seconds."""

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

    def put(self, message: Message, timeout: float | None = None) -> None:
        """Sends a message; waits while the channel is full.

        Args:
            message: to be sent.
            timeout: the most seconds to wait; None for as long as it takes.

        Raises:
            ChannelClosed: the channel is, or was meanwhile, closed.
            WaitTimeout: it was full all the time.
        """
        if self._placement is not None:
            payload = jax.device_put(message.payload, self._placement)
            message = Message(message.kind, message.batch, payload)
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

    def _wait_until(self, ready: Callable[[], bool], timeout: float | None) -> None:
        if not self._changed.wait_for(lambda: self._closed or ready(), timeout):
            raise WaitTimeout
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
