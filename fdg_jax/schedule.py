"""Schedules: one integer per stage, its staleness, is all that tells methods apart.

Stage k applies ``s_k`` updates between the forward of a batch and the use of that
batch's gradient. The last stage always has ``s = 0``. Back-propagation, DDG's delay and
the two readings of FDG are four rows of one table; any non-increasing tuple is a
schedule too.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fdg_jax.words import did_you_mean, parse_integers

NAMED = {
    "bp": lambda distance: 0,
    "minimal": lambda distance: distance,
    "reference": lambda distance: max(0, 2 * distance - 1),
    "paper": lambda distance: 2 * distance,
}
"""Staleness as a function of a stage's distance ``K - 1 - k`` from the last stage."""


class Slice(NamedTuple):
    """One piece of work on a stage's lane of the timeline, times in forwards."""

    kind: str
    batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """The staleness of every stage.

    Attributes:
        name: ``"bp"``, ``"minimal"``, ``"reference"``, ``"paper"`` or ``"custom"``.
        staleness: ``(s_0, ..., s_{K-1})``, non-increasing, ending in 0.
        drain_every: after so many batches every stage waits for all cotangents that are
            still to come, and applies them, before its next forward; 0: only
            at the end of training.
    """

    name: str
    staleness: tuple[int, ...]
    drain_every: int = 0

    @property
    def num_stages(self) -> int:
        """The number of stages K."""
        return len(self.staleness)

    def cotangent_capacity(self, stage: int) -> int:
        """Returns how many cotangents the channel into ``stage`` must hold.

        ``max(1, s_k - s_{k+1})`` is room enough that no schedule deadlocks.
        """
        return max(1, self.staleness[stage] - self.staleness[stage + 1])

    def simulate(
        self,
        num_batches: int,
        *,
        forward: float = 1.0,
        backward: float = 2.0,
        delay: float = 0.0,
    ) -> list[list[Slice]]:
        """Plays the schedule on ideal stages of equal cost.

        Args:
            num_batches: how many batches enter stage 0.
            forward: time of one stage's forward, in any unit.
            backward: time of one stage's backward and update, in the same unit.
            delay: one-way time of a hand-over between neighbours, in the same unit.

        Returns:
            Per stage the slices of its timeline, in order.
        """
        stages = range(self.num_stages)
        lanes = [[] for _ in stages]
        free = [0.0 for _ in stages]
        done = {}

        def work(stage, kind, batch, after, duration):
            start = max(free[stage], done[after] + delay if after in done else 0.0)
            free[stage] = done[kind, stage, batch] = start + duration
            lanes[stage].append(Slice(kind, batch, start, start + duration))

        # A stage's backward at its n-th turn waits for cotangents that its successor
        # made at turn n or before, so this order computes every start from known ends.
        for turn in range(num_batches):
            for k in stages:
                work(k, "F", turn, ("F", k - 1, turn), forward)
            for k in reversed(stages):
                for batch in self.due(k, turn):
                    work(k, "B", batch, ("B", k + 1, batch), backward)
        return lanes

    def due(self, stage: int, batch: int) -> range:
        """Returns the batches whose gradients a stage applies after a forward.

        Args:
            stage: k.
            batch: n, whose forward it has done.
        """
        begin = batch - batch % self.drain_every if self.drain_every else 0
        first = batch - self.staleness[stage]
        stop = batch + 1 if self.drains_after(batch) else first + 1
        return range(max(begin, first), max(begin, stop))

    def drains_after(self, batch: int) -> bool:
        """Whether nothing is under way any more once a batch is done."""
        return self.drain_every > 0 and (batch + 1) % self.drain_every == 0

    def ticks_per_batch(self, delay: float = 0.0, *, num_batches: int = 240) -> float:
        """Returns the steady time per batch in ticks (forward 1 + backward 2).

        Args:
            delay: one-way hand-over between neighbours, in forwards.
            num_batches: length of the simulation; the second half is measured.
        """
        lanes = self.simulate(num_batches, delay=delay)
        ends = [piece.end for piece in lanes[-1] if piece.kind == "B"]
        half = len(ends) // 2
        return (ends[-1] - ends[half - 1]) / (len(ends) - half) / 3.0

    def diagram(self, num_batches: int = 8) -> str:
        """Returns the timeline as text: a row per stage, ``F3`` / ``B3`` per batch.

        A forward is one cell wide and a backward with its update two.
        """
        rows = []
        for k, lane in enumerate(self.simulate(num_batches)):
            cells = ["   ."] * round(max(piece.end for piece in lane))
            for kind, batch, start, end in lane:
                for cell in range(round(start), round(end)):
                    cells[cell] = f"{kind + str(batch):>4}"
            rows.append(f"stage {k} |{''.join(cells)}")
        return "\n".join(rows)

    def __str__(self) -> str:
        """Formats the schedule as ``reference (s = 5, 3, 1, 0)``."""
        drained = f"; drained every {self.drain_every}" if self.drain_every else ""
        return f"{self.name} (s = {', '.join(map(str, self.staleness))}{drained})"


def resolve(schedule: str | Sequence[int] | Schedule, num_stages: int) -> Schedule:
    """Returns the schedule of K stages that a name, a tuple or text ("3,1,0") means.

    Args:
        schedule: a name of ``NAMED``, the staleness of each stage, or a ``Schedule``.
        num_stages: K, at least 1.

    Raises:
        ValueError: no stage; unknown name; wrong length; a staleness that is negative,
            increases from a stage to the next, or is not 0 at the last stage.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1; got {num_stages}")
    if isinstance(schedule, Schedule):
        _validate(schedule.staleness, num_stages)
        return schedule
    if isinstance(schedule, str) and schedule in NAMED:
        distances = reversed(range(num_stages))
        return Schedule(schedule, tuple(NAMED[schedule](d) for d in distances))
    if isinstance(schedule, str) or not isinstance(schedule, Iterable):
        schedule = _parse(schedule)
    staleness = tuple(schedule)
    _validate(staleness, num_stages)
    return Schedule("custom", tuple(map(operator.index, staleness)))


def _parse(text: object) -> tuple[int, ...]:
    try:
        return parse_integers(text)
    except ValueError:
        raise ValueError(
            f"schedule must be one of {', '.join(NAMED)}, or one staleness per stage "
            f"such as '3,1,0'; got {text!r}{did_you_mean(text, NAMED)}"
        ) from None


def _validate(staleness: tuple[int, ...], num_stages: int) -> None:
    """Checks ``s_0 >= s_1 >= ... >= s_{K-1} = 0``, which also rules out deadlock."""

    def refuse(rule):
        raise ValueError(
            f"{rule}; got schedule {staleness} for num_stages={num_stages}; use one of "
            f"{', '.join(NAMED)}, or a tuple s_0 >= s_1 >= ... >= s_(K-1) = 0"
        )

    if any(isinstance(s, bool) or not hasattr(s, "__index__") for s in staleness):
        refuse("every staleness must be an integer")
    if len(staleness) != num_stages:
        refuse(f"a schedule needs one staleness per stage, {num_stages} in all")
    if any(s < 0 for s in staleness):
        refuse("a staleness cannot be negative")
    if any(a < b for a, b in zip(staleness, staleness[1:], strict=False)):
        refuse("staleness must not increase from a stage to the next")
    if staleness[-1] != 0:
        refuse("the staleness of the last stage must be 0")
