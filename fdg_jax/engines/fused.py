"""The fused engine: all stages in one compiled program, for a single device.

One turn of the program runs the forward of batch n through every stage, then every
stage's backward of batch n - s_k, from the last to the first. What stages stash and
hand up waits in delay lines: rings whose slot n mod depth is read before it is written,
so that what comes out went in ``depth`` turns ago. The stash of stage k is s_k deep,
the channel up into it s_k - s_{k+1}.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdg_jax.batch import signature
from fdg_jax.channel import Kind, Message
from fdg_jax.interrupts import HeldInterrupts
from fdg_jax.schedule import Schedule
from fdg_jax.snapshot import Snapshot, StageSnapshot
from fdg_jax.stage import Activation, Stage, StageState, wait_for
from fdg_jax.stall import FOR_EVER, Patience, wait_before_leaving
from fdg_jax.words import describe

STEPS_PER_CALL = 8
"""Batches per call of the compiled program."""


class Carry(NamedTuple):
    """What the program carries from turn to turn.

    Attributes:
        states: state of every stage.
        stashes: per stage but the last, the delay line of its stash entries' leaves,
            each with a leading axis of length s_k; None where that is 0.
        cotangents: per stage but the last, the delay line of the cotangents,
            of length s_k - s_{k+1}.
        turn: int32 scalar, turns since the pipeline was last empty; after a start from
            a snapshot, since the oldest batch that was in it.
    """

    states: tuple[StageState, ...]
    stashes: tuple[Any, ...]
    cotangents: tuple[Any, ...]
    turn: jax.Array


class Load(NamedTuple):
    """Metrics of one call, to be read when they are asked for.

    Attributes:
        batches: numbers of its batches.
        metrics: dict of arrays whose leading axis counts the batches of the call.
    """

    batches: tuple[int, ...]
    metrics: dict[str, jax.Array]


class OtherShapeError(ValueError):
    """A batch has another shape than those before it."""


class FusedEngine:
    """Runs several batches per call of one compiled program.

    A loop with a dynamic count serves every number of batches with one compilation;
    ``lax.scan`` would be compiled anew for each.
    """

    burst = STEPS_PER_CALL

    def __init__(
        self,
        stages: Sequence[Stage],
        start: Snapshot,
        schedule: Schedule,
        *,
        capacity: int,
        timeline: Any = None,
        patience: Patience = FOR_EVER,
        jit: Callable = jax.jit,
    ):
        """Prepares the engine; the program is compiled for the first batch.

        Args:
            stages: the stages in order, all on one device.
            start: what they go on from; given up to the engine.
            schedule: their staleness.
            capacity: unused; there are no channels between stages here.
            timeline: a ``Timeline`` that records the program's calls, or None.
            patience: how long metrics, and the end of the work, are awaited.
            jit: what compiles the program, without a timeline.
        """
        del capacity
        self._patience = patience
        self.failure = None
        # One call may be running while the next is being filled.
        self.window = 2 * STEPS_PER_CALL
        self._stages = tuple(stages)
        self._staleness = schedule.staleness
        self._placement = stages[0].placement
        states = tuple(stage.state for stage in start.stages)
        self._carry = Carry(states, (), (), None)
        self._turns = 0
        self._entry_trees = None
        self._batch = None
        self._waiting = []
        self._results = deque()
        self._lane = (
            None if timeline is None else timeline.lane("fused", stages[0].device)
        )
        if self._lane is not None:
            self._lane.start()
            jit = self._lane.jit
        self._train = jit(self._train_fn, donate_argnums=0)
        self._drain = jit(self._drain_fn, donate_argnums=0)
        self._evaluate = jit(self._evaluate_fn)
        if start.stages[0].stash:
            # Its oldest entry has the images that tell all shapes.
            self._carry = self._fill(start, start.stages[0].stash[0].x)

    def await_room(self) -> None:
        """Returns at once: what is put waits until it is worked on."""

    def put(self, message: Message, label: Message | None = None) -> None:
        """Takes a message; a full load of batches, or another kind, starts work."""
        image = labels = None
        if label is not None:
            data = (message.payload.x, label.payload)
            image, labels = jax.device_put(data, self._placement)
        with self._noting_failure():
            self._put(message, image, labels)

    def _put(self, message, image, label):
        if message.kind is Kind.TRAIN:
            self._refuse_other_shape(image, label)
            self._waiting.append((message.batch, image, label))
            if len(self._waiting) == STEPS_PER_CALL:
                self._flush()
            return
        self._flush()
        if self._lane is not None:
            self._lane.turn_to(message.batch)
        if message.kind is Kind.EVALUATE:
            result = self._evaluate(self._carry.states, image, label)
        elif message.kind is Kind.SNAPSHOT:
            result = self._snapshot(message.batch)
        else:
            if self._carry.turn is not None and self._staleness[0] > 0:
                self._carry = self._drain(self._carry)
            stages = tuple(map(StageSnapshot, self._carry.states))
            result = Snapshot(message.batch, stages)
        self._results.append(Message(message.kind, message.batch, result))

    def await_result(self) -> None:
        """Works on what is waiting, and waits for metrics and for the end."""
        if not self._results:
            with HeldInterrupts(), self._noting_failure():
                self._flush()
        result = self._results[0]
        with self._noting_failure(RuntimeError):
            if isinstance(result, Load):
                self._patience.wait_for(result.metrics)
                jax.block_until_ready(result.metrics)
            elif result.kind is Kind.STOP:
                self._patience.wait_for(self.states())
                wait_for(self.states())

    def get(self) -> Message:
        """Returns the next result."""
        result = self._results.popleft()
        if isinstance(result, Load):
            metrics = jax.device_get(result.metrics)
            rows = [
                Message(Kind.TRAIN, batch, jax.tree.map(lambda a, i=i: a[i], metrics))
                for i, batch in enumerate(result.batches)
            ]
            self._results.extendleft(reversed(rows))
            result = self._results.popleft()
        return result

    def states(self) -> list[StageState]:
        """Returns the state of each stage, as the last call left it."""
        return list(self._carry.states)

    @contextlib.contextmanager
    def _noting_failure(
        self, kinds: type[BaseException] = BaseException
    ) -> Iterator[None]:
        """Notes what the program raised; a batch of another shape is no failure."""
        try:
            yield
        except OtherShapeError:
            raise
        except kinds as error:
            self.failure = error
            raise

    def abort(self, wait: bool = True) -> None:
        """Drops all work in flight."""
        self._waiting.clear()
        self._results.clear()
        if wait:
            wait_before_leaving(self._carry.states)

    def describe(self) -> list[str]:
        """Says how far the program has been told to go."""
        given, waiting = self._turns, len(self._waiting)
        return [f"the compiled program was given {given} batches; {waiting} wait"]

    def _refuse_other_shape(self, image, label):
        batch = (signature((image, label)), describe((image, label)))
        self._batch = self._batch or batch
        if batch != self._batch:
            raise OtherShapeError(
                f"the fused engine trains on batches of one shape; got {batch[1]} "
                f"after {self._batch[1]}; drop the ragged batch, or use "
                f"engine='threads'"
            )

    def _flush(self) -> None:
        """Trains on the waiting batches, in one call."""
        if not self._waiting:
            return
        batches, images, labels = zip(*self._waiting, strict=True)
        if self._lane is not None:
            self._lane.turn_to(batches[0], len(batches))
        self._waiting.clear()
        count = len(batches)
        # A shorter load is filled up, not compiled anew; the program stops at count.
        fill = STEPS_PER_CALL - count
        images, labels = images + images[:1] * fill, labels + labels[:1] * fill
        if self._carry.turn is None:
            empty = Snapshot(batches[0], tuple(map(StageSnapshot, self._carry.states)))
            self._carry = self._fill(empty, images[0])
        self._turns += count
        self._carry, metrics = self._train(
            self._carry,
            images,
            labels,
            jax.device_put(np.int32(count), self._placement),
        )
        self._results.append(Load(batches, metrics))

    def _fill(self, start: Snapshot, image: Any) -> Carry:
        """Delay lines that hold what a snapshot does, shaped by an abstract forward."""
        self._turns = turns = len(start.stages[0].stash)
        trees, stashes, cotangents = [], [], []
        activation = Activation(image)
        for k, stage in enumerate(self._stages[:-1]):
            above, below = start.stages[k : k + 2]
            activation, _, entry = jax.eval_shape(
                stage.forward, above.state, activation
            )
            trees.append(jax.tree.structure(entry))
            if stage.has_loss:
                stashes.append(None)
                cotangents.append(None)
                continue
            depth, delay = self._depths(k)
            held = [jax.tree.leaves(entry) for entry in above.stash]
            stashes.append(_line(jax.tree.leaves(entry), depth, held, turns))
            like = stage.cotangent_like(activation.x)
            cotangents.append(_line(like, delay, below.sent, turns))
        self._entry_trees = trees
        return jax.device_put(
            Carry(
                self._carry.states, tuple(stashes), tuple(cotangents), np.int32(turns)
            ),
            self._placement,
        )

    def _snapshot(self, batch: int) -> Snapshot:
        """What the stages hold before batch ``batch``, as they would in threads."""
        carry, turns = self._carry, self._turns
        stash, sent = [()] * len(self._stages), [()] * len(self._stages)
        for k in range(len(self._stages) - 1 if turns else 0):
            depth, delay = self._depths(k)
            stash[k] = tuple(
                jax.tree.unflatten(self._entry_trees[k], leaves)
                for leaves in _held(carry.stashes[k], depth, turns, turns)
            )
            num_sent = turns - self._staleness[k + 1]
            sent[k + 1] = tuple(_held(carry.cotangents[k], delay, num_sent, turns))
        # Copies, because later calls give up the buffers.
        states = jax.tree.map(jnp.copy, carry.states)
        return Snapshot(batch, tuple(map(StageSnapshot, states, stash, sent)))

    def _depths(self, k: int) -> tuple[int, int]:
        """Depth of stage k's stash, and of the channel up into it."""
        return self._staleness[k], self._staleness[k] - self._staleness[k + 1]

    def _train_fn(self, carry, images, labels, count):
        images, labels = (
            jax.tree.map(lambda *a: jnp.stack(a), *data) for data in (images, labels)
        )

        def data_of(i):
            return jax.tree.map(
                lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False),
                (images, labels),
            )

        def step(i, loop):
            carry, metrics = loop
            carry, new = self._turn(carry, *data_of(i))
            metrics = jax.tree.map(lambda m, a: m.at[i].set(a), metrics, new)
            return carry, metrics

        shapes = jax.eval_shape(lambda c: self._turn(c, *data_of(0))[1], carry)
        metrics = jax.tree.map(
            lambda a: jnp.zeros((STEPS_PER_CALL, *a.shape), a.dtype), shapes
        )
        return lax.fori_loop(0, count, step, (carry, metrics))

    def _turn(self, carry: Carry, image, label):
        """One turn: forward of the newest batch, backward of the due ones."""
        states, entries, activation = list(carry.states), [], Activation(image)
        for k, stage in enumerate(self._stages):
            if stage.has_loss:
                activation, metrics, states[k], gradient, cotangent = stage.loss_step(
                    states[k], activation, label
                )
                states[k] = stage.update(states[k], gradient)
                entries.append(None)
            else:
                activation, states[k], entry = stage.forward(states[k], activation)
                entries.append(jax.tree.leaves(entry))
        carry = carry._replace(states=tuple(states))
        return self._backwards(carry, entries, cotangent), metrics

    def _drain_fn(self, carry: Carry) -> Carry:
        """Turns without a forward, until every gradient has been applied."""
        num_batches = carry.turn

        def step(_, carry):
            return self._backwards(carry, None, None, num_batches)

        return lax.fori_loop(0, self._staleness[0], step, carry)

    def _backwards(self, carry: Carry, entries, cotangent, num_batches=None) -> Carry:
        """Backward and update of every stage without a loss, from the bottom up.

        Args:
            carry: its states have done this turn's forward.
            entries: per stage what the forward stashes; None when draining.
            cotangent: the last stage's; None when draining.
            num_batches: when draining, the number of batches that went in.
        """
        states, turn = list(carry.states), carry.turn
        stashes, cotangents = list(carry.stashes), list(carry.cotangents)
        for k in reversed(range(len(self._stages) - 1)):
            stage, staleness = self._stages[k], self._staleness[k]
            if stage.has_loss or (entries is None and staleness == 0):
                continue
            entry = None if entries is None else entries[k]
            stashes[k], entry = _delay(stashes[k], entry, turn)
            cotangents[k], cotangent = _delay(cotangents[k], cotangent, turn)
            entry = jax.tree.unflatten(self._entry_trees[k], entry)
            gradient, cotangent = stage.backward(states[k], entry, cotangent)
            updated = stage.update(states[k], gradient)
            due = turn >= staleness
            if num_batches is not None:
                due &= turn < num_batches + staleness
            states[k] = jax.tree.map(
                lambda new, old, due=due: jnp.where(due, new, old), updated, states[k]
            )
        return Carry(tuple(states), tuple(stashes), tuple(cotangents), turn + 1)

    def _evaluate_fn(self, states, x, label):
        for stage, state in zip(self._stages[:-1], states, strict=False):
            x = stage.evaluate(state, x)
        return self._stages[-1].evaluate_loss(states[-1], x, label)


def _line(value: Any, depth: int, held: Sequence[Any], turn: int) -> Any:
    """A delay line for values like ``value``, into which ``held`` went last.

    Args:
        value: pytree of arrays, may be abstract.
        depth: how many values it holds.
        held: at most so many values, the oldest first; what they lack is zeros.
        turn: number of the turn that comes next.

    Returns:
        A pytree of arrays with a leading axis of length ``depth``; None where it is 0.
    """
    if depth == 0:
        return None
    if not held:
        return jax.tree.map(lambda a: np.zeros((depth, *a.shape), a.dtype), value)
    slots = [jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), value)] * depth
    for age, old in enumerate(reversed(held), 1):
        slots[(turn - age) % depth] = old
    return jax.tree.map(lambda *a: jnp.stack(a), *slots)


def _held(line: Any, depth: int, count: int, turn: int) -> Iterator[Any]:
    """The values that went into a delay line last, the oldest first.

    Args:
        line: the line, or None.
        depth: how many values it holds.
        count: how many ever went in.
        turn: number of the turn that comes next.
    """
    for age in range(min(count, depth), 0, -1):
        yield jax.tree.map(lambda a, slot=(turn - age) % depth: a[slot], line)


def _delay(line: Any, new: Any, turn: jax.Array) -> tuple[Any, Any]:
    """Puts a value into a delay line and takes out the one that has waited it through.

    Args:
        line: pytree of arrays with a leading axis of the line's depth, or None.
        new: the value of this turn; None to take out only.
        turn: int32 scalar.

    Returns:
        The line and the value that went in ``depth`` turns ago; ``new`` itself where
        the line is None.
    """
    if line is None:
        return None, new
    slot = turn % jax.tree.leaves(line)[0].shape[0]
    old = jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), line
    )
    if new is not None:
        line = jax.tree.map(
            lambda a, b: lax.dynamic_update_index_in_dim(a, b, slot, 0), line, new
        )
    return line, old
