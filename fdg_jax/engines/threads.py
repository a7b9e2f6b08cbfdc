"""The threads engine: one host thread per stage, so that devices work side by side."""

import threading
from collections.abc import Sequence
from typing import Any

from fdg_jax import stall
from fdg_jax.channel import ChannelClosed, Kind, Message, WaitTimeout
from fdg_jax.engines.program import Receive, StageProgram, blame, connect
from fdg_jax.schedule import Schedule
from fdg_jax.snapshot import Snapshot
from fdg_jax.stage import Stage, StageState, wait_for
from fdg_jax.stall import FOR_EVER, Patience


class ThreadsEngine:
    """Runs every stage program in a thread of its own.

    JAX's context managers (``with jax.enable_x64(True):`` and the like) reach the
    caller's thread alone; set what stages need through ``jax.config``.
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
        self._failure = None
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

    def put(self, message: Message, label: Message | None = None) -> None:
        """Gives a message to stage 0 and, with data, its labels where losses are."""
        try:
            if label is not None:
                for channel in self._wiring.labels:
                    channel.put(label)
            self._wiring.source.put(message, self._patience.seconds)
        except ChannelClosed:
            self._raise_failure()

    def get(self) -> Message:
        """Returns the next result; waits for it."""
        try:
            message = self._wiring.results.get(self._patience.seconds)
        except ChannelClosed:
            self._raise_failure()
        if message.kind is Kind.STOP:
            self._join(self._patience.seconds)
            if self._failure is not None:
                self._raise_failure()
            self._patience.wait_for(self._states())
            wait_for(self._states())
        return self._wiring.result(message)

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
                self._failure = self._failure or error
            for channel in self._wiring.channels:
                channel.close()

    def _join(self, seconds: float | None = None) -> None:
        for thread in self._threads:
            # The garbage collector may end a forgotten pipeline in one of its stages.
            if thread is not threading.current_thread():
                thread.join(seconds)
                if thread.is_alive():
                    raise WaitTimeout

    def _leave(self) -> None:
        """Waits for the threads, and for what their devices still compute."""
        try:
            self._join(stall.LEAVING_SECONDS)
        except WaitTimeout:
            return  # left behind with a device that does not answer
        stall.wait_before_leaving(self._states())

    def _states(self) -> list[StageState]:
        return [program.state for program in self._wiring.programs]

    def _raise_failure(self) -> None:
        """Raises in the caller what a stage raised, once every thread has ended."""
        self._leave()
        raise self._failure or RuntimeError("the engine was stopped")
