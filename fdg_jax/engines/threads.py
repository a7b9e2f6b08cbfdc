"""The threads engine: one host thread per stage, so that devices work side by side."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from fdg_jax import stall
from fdg_jax.channel import ChannelClosed, Kind, Message, WaitTimeout, wait_running
from fdg_jax.engines.program import Receive, StageProgram, blame, connect
from fdg_jax.schedule import Schedule
from fdg_jax.snapshot import Snapshot
from fdg_jax.stage import Stage, StageState, wait_for
from fdg_jax.stall import FOR_EVER, Patience


class ThreadsEngine:
    """Runs every stage program in a thread of its own.

    JAX's context managers (``with jax.enable_x64(True):`` and the like) reach only
    the caller's thread; set what stages need through ``jax.config``.
    """

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
        """Connects the stages and starts their threads.

        Args:
            stages: the stages in order.
            start: what they go on from; its states are given up to the engine.
            schedule: their staleness.
            capacity: activations that a channel holds.
            timeline: a ``Timeline`` that records the stages, or None.
            patience: how long ``put`` and ``get`` wait.
        """
        self._wiring = connect(stages, start, schedule, capacity, timeline)
        self.window = self._wiring.window
        self._patience = patience
        self.failure = None
        self._failing = threading.Lock()
        self._threads = [
            threading.Thread(
                target=self._work,
                args=(program,),
                name=f"fdg-stage-{program.stage.index}",
                daemon=True,
            )
            for program in self._wiring.programs
        ]
        for thread in self._threads:
            thread.start()

    def await_room(self) -> None:
        """Waits until stage 0 has room for another message."""
        with self._failing_together():
            self._wiring.source.await_room(self._patience.seconds)

    def put(self, message: Message, label: Message | None = None) -> None:
        """Gives a message to stage 0 and, with data, its labels where losses are."""
        with self._failing_together():
            self._wiring.feed(message, label)

    def await_result(self) -> None:
        """Waits for the next result; for that of STOP until all threads have ended."""
        with self._failing_together():
            self._wiring.results.await_message(self._patience.seconds)
            if self._wiring.results.oldest().kind is Kind.STOP:
                self._join(self._patience.seconds)
                if self.failure is not None:
                    raise self.failure
                self._patience.wait_for(self.states())
                wait_for(self.states())

    def get(self) -> Message:
        """Returns the next result."""
        with self._failing_together():
            return self._wiring.result(self._wiring.results.get())

    def states(self) -> list[StageState]:
        """Returns the state of each stage, as its last finished step left it."""
        return [program.state for program in self._wiring.programs]

    def abort(self, wait: bool = True) -> None:
        """Closes every channel, which ends every thread at its next message."""
        for channel in self._wiring.channels:
            channel.close()
        if wait:
            self._leave()

    def describe(self) -> list[str]:
        """Says what every stage is doing."""
        return [program.describe() for program in self._wiring.programs]

    def _work(self, program: StageProgram) -> None:
        """Body of a stage's thread: grants each request, waiting where it must."""
        try:
            with blame(program):
                requests, reply = program.run(), None
                while True:
                    # No name may hold a message while the thread waits.
                    program.awaited = None
                    request, reply = requests.send(reply), None
                    program.awaited = request.channel
                    if isinstance(request, Receive):
                        reply = request.channel.get()
                    else:
                        request.channel.put(request.message)
                    del request
        except (StopIteration, ChannelClosed):
            return
        except BaseException as error:
            with self._failing:
                self.failure = self.failure or error
            for channel in self._wiring.channels:
                channel.close()

    def _join(self, seconds: float | None = None) -> None:
        # The garbage collector may end a forgotten pipeline in one of its stages.
        others = [t for t in self._threads if t is not threading.current_thread()]
        wait_running(functools.partial(_all_end, others), seconds)

    def _leave(self) -> None:
        """Waits for the threads, and for what their devices still compute."""
        try:
            self._join(stall.LEAVING_SECONDS)
        except WaitTimeout:
            return  # left behind with a device that does not answer
        stall.wait_before_leaving(self.states())

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Raises in the caller what a stage raised, once every thread has ended."""
        try:
            yield
        except ChannelClosed:
            self._leave()
            raise self.failure or RuntimeError("the engine was stopped") from None


def _all_end(threads: Sequence[threading.Thread], seconds: float) -> bool:
    """Waits for threads to end, so many seconds in all; tells whether they have."""
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
