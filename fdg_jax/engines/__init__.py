"""Engines: what runs the stages. They move arrays and do no arithmetic of their own."""

from typing import Protocol

from fdg_jax.channel import Message
from fdg_jax.engines.fused import FusedEngine
from fdg_jax.engines.serial import SerialEngine
from fdg_jax.engines.threads import ThreadsEngine
from fdg_jax.schedule import Schedule
from fdg_jax.stage import StageState
from fdg_jax.words import did_you_mean

ENGINES = {"serial": SerialEngine, "threads": ThreadsEngine, "fused": FusedEngine}


class Engine(Protocol):
    """What a pipeline needs of an engine.

    Results come out of ``get`` in the order in which messages went into ``put``, one
    for one: metrics for TRAIN and EVALUATE, a ``Snapshot`` for SNAPSHOT (taken where
    the message passed) and for STOP (of drained stages, so it holds only states).

    What waits may be interrupted at any moment, and called again. ``put`` and ``get``
    do not wait, so that a caller may hold interrupts back until it has noted what they
    did.

    Attributes:
        burst: how many results come out together, at most.
        window: the most messages without a result that the engine makes use of; ``put``
            must not be called with more outstanding.
        failure: what a stage raised, after which the engine is of no use; else None.
    """

    burst: int
    window: int
    failure: BaseException | None

    def await_room(self) -> None:
        """Waits, or works, until ``put`` may be called."""

    def put(self, message: Message, label: Message | None = None) -> None:
        """Gives a message to stage 0 and, with data, its labels where losses are."""

    def await_result(self) -> None:
        """Waits, or works, until ``get`` may be called."""

    def get(self) -> Message:
        """Returns the next result."""

    def states(self) -> list[StageState]:
        """Returns the state of each stage, as its last finished step left it."""

    def abort(self, wait: bool = True) -> None:
        """Stops at once, without draining.

        No thread is left when it returns, unless it is told not to wait: a thread may
        hang in a device that will never answer.
        """

    def describe(self) -> list[str]:
        """Says in a line per stage what it is doing."""


def resolve_engine(name: str, schedule: Schedule, num_devices: int) -> str:
    """Returns the engine that a name means.

    ``auto`` takes threads when every stage can have a device of its own, else fused
    where it can run the schedule.

    Raises:
        ValueError: the name is unknown, or the engine cannot run the schedule.
    """
    drains = schedule.drain_every > 0
    if name == "auto":
        alone = "serial" if drains else "fused"
        return "threads" if num_devices >= schedule.num_stages else alone
    if name not in ENGINES:
        raise ValueError(
            f"engine must be one of auto, {', '.join(ENGINES)}; got {name!r}"
            f"{did_you_mean(name, ['auto', *ENGINES])}"
        )
    if name == "fused" and drains:
        raise ValueError(
            f"the fused engine never drains between batches; got {schedule}; use "
            f"engine='serial', or schedule 'bp' with the same accumulation, which "
            f"computes the same"
        )
    return name
