"""What a method of decoupled training is made of: values of the one stage program.

A method is no code that an engine runs. It says which staleness each stage has, which
weights the backward sees, how many batches make an update, and whether stages have a
loss of their own or a copy of the whole network; ``Pipeline`` takes these as arguments.
"""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fdg_jax import schedule as schedules
from fdg_jax.local_heads import LocalHead
from fdg_jax.schedule import Schedule

AUTO = "auto"
"""In place of a value: the one that the method sets."""


@dataclass(frozen=True)
class Method:
    """A method, as arguments of ``Pipeline``.

    Attributes:
        name: as in a config.
        schedule: a name of ``fdg_jax.schedule.NAMED``, or a function from K and M to a
            ``Schedule``.
        backward: which weights it sees: "stored", "recompute" or "replay".
        accumulation: M, batches that make an update.
        local_head: makes a head per stage, where stages have losses of their own.
        is_data_parallel: whether K devices share out each batch of an uncut network.
        leaves_open: the arguments that may be chosen, of "schedule", "backward",
            "accumulation" and "shrink"; what is said above is then but the default.
    """

    name: str
    schedule: str | Callable[[int, int], Schedule] = "reference"
    backward: str = "stored"
    accumulation: int = 1
    local_head: LocalHead | None = None
    is_data_parallel: bool = False
    leaves_open: tuple[str, ...] = ()

    def arguments(
        self,
        num_stages: int,
        *,
        schedule: Any = AUTO,
        backward: str = AUTO,
        accumulation: int = 0,
        shrink: Any = 1.0,
    ) -> dict[str, Any]:
        """Returns the arguments that make a ``Pipeline`` this method.

        Args:
            num_stages: K; of a data-parallel method the number of devices.
            schedule: "auto" for the method's own; another where it is left open.
            backward: "auto" for the method's own, too.
            accumulation: M; 0 for the method's own.
            shrink: beta; 1.0 for none.

        Raises:
            ValueError: a value is given that the method does not leave open, and that
                is not its own.
        """
        given = {
            "schedule": (schedule, AUTO, self.schedule),
            "backward": (backward, AUTO, self.backward),
            "accumulation": (accumulation, 0, self.accumulation),
            "shrink": (shrink, 1.0, 1.0),
        }
        for name, (value, unset, own) in given.items():
            if name not in self.leaves_open and not _is(value, unset, own):
                raise ValueError(
                    f"method {self.name!r} sets {name} itself; got {value!r}; leave "
                    f"it at {unset!r}, or take a method that leaves it open, as 'fdg'"
                )
        accumulation = accumulation or self.accumulation
        if accumulation < 1:
            raise ValueError(
                f"accumulation must be at least 1, or 0 for the method's own; got "
                f"{accumulation}"
            )
        if _is(schedule, AUTO):
            schedule = self.schedule
        if callable(schedule):
            schedule = schedule(num_stages, accumulation)
        replicas = num_stages if self.is_data_parallel else 1
        num_stages = 1 if self.is_data_parallel else num_stages
        return {
            "num_stages": num_stages,
            "schedule": schedules.resolve(schedule, num_stages),
            "backward": self.backward if backward == AUTO else backward,
            "accumulation": accumulation,
            "shrink": shrink,
            "local_head": self.local_head,
            "replicas": replicas,
        }


def _is(value: Any, *others: Any) -> bool:
    """Whether a value is one of some words, or of some numbers, where 1 is 1.0."""
    return isinstance(value, (str, numbers.Number)) and value in others
