"""The serial engine: all stage programs in the caller's thread, turn by turn.

The reference for the others, and the one to debug with: a stage runs until it would
wait, then it is the next one's turn.
"""

from collections.abc import Sequence
from typing import Any

from fdg_jax.channel import Kind, Message
from fdg_jax.engines.program import Receive, StageProgram, blame, connect
from fdg_jax.interrupts import HeldInterrupts
from fdg_jax.schedule import Schedule
from fdg_jax.snapshot import Snapshot
from fdg_jax.stage import Stage, StageState, wait_for
from fdg_jax.stall import FOR_EVER, Patience, wait_before_leaving


class SerialEngine:
    """Runs the stage programs as coroutines."""

    burst = 1

    def __init__(
        self,
        stages: Sequence[Stage],
        start: Snapshot,
        schedule: Schedule,
        *,
        capacity: int,
        timeline: Any = None,
        patience: Patience = FOR_EVER,
    ):
        """Connects the stages.

        Args:
            stages: the stages in order.
            start: what they go on from; its states are given up to the engine.
            schedule: their staleness.
            capacity: activations that a channel holds.
            timeline: a ``Timeline`` that records the stages, or None.
            patience: how long the end of the work is awaited; what the caller's own
                thread does here cannot be given up.
        """
        self._patience = patience
        self._wiring = connect(stages, start, schedule, capacity, timeline)
        self.window = self._wiring.window
        self._turns = [_Turn(program) for program in self._wiring.programs]
        self.failure = None

    def await_room(self) -> None:
        """Works until stage 0 has room for another message."""
        while any(c.full() for c in (self._wiring.source, *self._wiring.labels)):
            self._advance()

    def put(self, message: Message, label: Message | None = None) -> None:
        """Gives a message to stage 0 and, with data, its labels where losses are."""
        self._wiring.feed(message, label)

    def await_result(self) -> None:
        """Works until the next result is there; for that of STOP to the end."""
        while self._wiring.results.empty():
            self._advance()
        if self._wiring.results.oldest().kind is Kind.STOP:
            while not all(turn.ended for turn in self._turns):
                self._advance()
            self._patience.wait_for(self.states())
            wait_for(self.states())

    def get(self) -> Message:
        """Returns the next result."""
        return self._wiring.result(self._wiring.results.get())

    def states(self) -> list[StageState]:
        """Returns the state of each stage, as its last finished step left it."""
        return [program.state for program in self._wiring.programs]

    def abort(self, wait: bool = True) -> None:
        """Drops all work in flight."""
        for turn in self._turns:
            turn.close()
        if wait:
            wait_before_leaving(self.states())

    def describe(self) -> list[str]:
        """Says what every stage is doing."""
        return [program.describe() for program in self._wiring.programs]

    def _advance(self) -> None:
        # An interrupt between two lines of a program would be the end of it.
        with HeldInterrupts():
            try:
                moved = [turn.advance() for turn in self._turns]
            except BaseException as error:
                self.failure = error
                raise
        assert any(moved), "every stage waits for another one"


class _Turn:
    """A stage program that is suspended between requests."""

    def __init__(self, program: StageProgram):
        self._program = program
        self._requests = program.run()
        self._request = next(self._requests)

    @property
    def ended(self) -> bool:
        return self._request is None

    def advance(self) -> bool:
        """Grants requests until one would wait; tells whether any was granted."""
        moved = False
        while not self.ended and not self._waits():
            channel, self._program.awaited = self._request.channel, None
            if isinstance(self._request, Receive):
                reply = channel.get()
            else:
                reply = channel.put(self._request.message)
            with blame(self._program):
                self._request = self._resume(reply)
            moved = True
        if not self.ended:
            self._program.awaited = self._request.channel
        return moved

    def close(self) -> None:
        self._requests.close()
        self._request = None

    def _waits(self) -> bool:
        channel = self._request.channel
        if isinstance(self._request, Receive):
            return channel.empty()
        return channel.full()

    def _resume(self, reply):
        try:
            return self._requests.send(reply)
        except StopIteration:
            return None
