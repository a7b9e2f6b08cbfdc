"""Engines: what runs the stages. They move arrays and do no arithmetic of their own."""

from typing import Protocol

from fdg_jax.channel import Message
from fdg_jax.engines.fused import FusedEngine
from fdg_jax.engines.serial import SerialEngine
from fdg_jax.engines.threads import ThreadsEngine
from fdg_jax.schedule import Schedule
from fdg_jax.words import did_you_mean

ENGINES = {"serial": SerialEngine, "threads": ThreadsEngine, "fused": FusedEngine}


class Engine(Protocol):
    """What a pipeline needs of an engine.

    Results come out of ``get`` in the order in which messages went into ``put``, one
    for one: metrics for TRAIN and EVALUATE, a ``Snapshot`` for SNAPSHOT (taken where
    the message passed) and for STOP (of drained stages, so it holds states alone).

    Attributes:
        burst: how many results come out together, at most.
        window: the most messages without a result that the engine makes use of; ``put``
            must not be called with more outstanding.
    """

    burst: int
    window: int

    def put(self, message: Message, label: Message | None = None) -> None:
        """Gives a message to stage 0 and, with data, its labels where losses are."""

    def get(self) -> Message:
        """Returns the next result; waits for it where it must."""

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
