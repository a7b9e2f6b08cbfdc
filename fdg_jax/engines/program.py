"""The stage program: what every stage does with its messages, written once.

The algorithm in ten lines, over a stage's own batch counter n::

    x      = receive activation n                    # stage 0: from the data
    y, res = forward(params, x);  stash[n] = res;  send y down
    if n >= s_k:
        m          = n - s_k
        g          = receive cotangent m
        dparams,dx = backward(stash.pop(m), g);  send dx up
        params     = update(params, beta**(K-1-k) * dparams)

It is a generator that yields ``Send`` and ``Receive`` requests, so that the same lines
run in a thread that may wait (``threads``) or in turns that may not (``serial``). The
stash is a queue: it holds more than s_k entries exactly when n >= s_k, and the oldest
entry is then that of batch n - s_k.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.channel import Channel, ChannelClosed, Kind, LocalChannel, Message
from fdg_jax.schedule import Schedule
from fdg_jax.snapshot import Snapshot, StageSnapshot
from fdg_jax.stage import Activation, Stage


class Send(NamedTuple):
    """Request to put a message into a channel."""

    channel: Channel
    message: Message


class Receive(NamedTuple):
    """Request for the next message of a channel."""

    channel: Channel


@dataclass(frozen=True)
class Ports:
    """The channels of one stage.

    Attributes:
        activations: from the stage before, or from the data.
        down: to the stage after, or to the results.
        cotangents: from the stage after; None for the last stage.
        up: to the stage before; None for stage 0.
        labels: from the data; None but for stages with a loss.
        delay: batches by which the stage before applies a cotangent later than this
            one, s_{k-1} - s_k: so many are on their way up between two batches.
    """

    activations: Channel
    down: Channel
    cotangents: Channel | None = None
    up: Channel | None = None
    labels: Channel | None = None
    delay: int = 0


class StageProgram:
    """One stage at work.

    Attributes:
        stage: its compiled functions.
        state: what it carries from batch to batch; final once the program has ended.
        batch: number of the batch in hand, for messages.
        snapshots: of the stage, one for each SNAPSHOT message handled.
        awaited: the channel that its engine waits for; None while it works.
    """

    def __init__(self, stage: Stage, start: StageSnapshot, batch: int, ports: Ports):
        """Creates the program of one stage, ready to ``run`` from a batch on."""
        self.stage = stage
        self.state = start.state
        self.batch = batch
        self.snapshots = deque()
        self.awaited = None
        self._ports = ports
        first = batch - len(start.stash)
        self._stash = deque(enumerate(start.stash, first))
        self._sent = deque(start.sent, maxlen=ports.delay)

    def run(self) -> Generator[Send | Receive, Message | None, None]:
        """Handles messages in order until STOP, then drains the stash."""
        ports = self._ports
        train = self._train_with_loss if self.stage.has_loss else self._train
        evaluate = self._evaluate_last if self.stage.is_last else self._evaluate
        while True:
            message = yield Receive(ports.activations)
            self.batch = message.batch
            if message.kind in (Kind.TRAIN, Kind.EVALUATE):
                work = train if message.kind is Kind.TRAIN else evaluate
                steps = work(message)
                del message  # its arrays must not outlive their use
                yield from steps
                continue
            if message.kind is Kind.SNAPSHOT:
                self.snapshots.append(self._snapshot())
            yield Send(ports.down, message)
            if message.kind is Kind.STOP:
                break
        while self._stash:
            yield from self._train_backward()

    def describe(self) -> str:
        """Says what the stage is doing, or waiting for."""
        ports, stash = self._ports, [batch for batch, _ in list(self._stash)]
        waits = {
            ports.activations: f"waits for an activation, after batch {self.batch}",
            ports.labels: f"waits for the labels of batch {self.batch}",
            ports.down: f"waits for room to send batch {self.batch} down",
            ports.up: f"waits for room to send cotangent {self.batch} up",
        }
        # The stage goes on meanwhile, so it may have emptied its stash by now.
        oldest = stash[0] if stash else self.batch
        waits[ports.cotangents] = f"waits for the cotangent of batch {oldest}"
        awaited = self.awaited
        doing = f"works on batch {self.batch}"
        if awaited is not None:
            doing = waits[awaited]
        held = f"; its stash holds {', '.join(map(str, stash))}" if stash else ""
        return f"stage {self.stage.index} {doing}{held}"

    def _snapshot(self) -> StageSnapshot:
        # The state is copied, because later updates give up its buffers. No buffer of
        # the stash or of a cotangent is ever given up.
        return StageSnapshot(
            state=jax.tree.map(jnp.copy, self.state),
            stash=tuple(entry for _, entry in self._stash),
            sent=tuple(self._sent),
        )

    def _train(self, message):
        y, self.state, entry = self.stage.forward(self.state, message.payload)
        self._stash.append((message.batch, entry))
        message = Message(Kind.TRAIN, message.batch, y)
        del entry, y
        yield Send(self._ports.down, message)
        del message
        drains = self._drains_after(self.batch)
        while len(self._stash) > (0 if drains else self.stage.staleness):
            yield from self._train_backward()
        if drains:
            self._sent.clear()  # the stage above waits until it has used them all

    def _train_backward(self):
        cotangent = yield Receive(self._ports.cotangents)
        self.batch, entry = self._stash.popleft()
        assert cotangent.batch == self.batch, (cotangent.batch, self.batch)
        results = self.stage.backward(self.state, entry, cotangent.payload)
        del entry, cotangent
        yield from self._finish(*results)

    def _train_with_loss(self, message):
        label = yield Receive(self._ports.labels)
        assert label.batch == message.batch, (label.batch, message.batch)
        y, metrics, self.state, gradient, cotangent = self.stage.loss_step(
            self.state, message.payload, label.payload
        )
        down = metrics if self.stage.is_last else y
        message = Message(Kind.TRAIN, message.batch, down)
        del y, down
        yield Send(self._ports.down, message)
        del message
        yield from self._finish(gradient, cotangent)
        if self._drains_after(self.batch):
            self._sent.clear()

    def _finish(self, gradient, cotangent):
        if self.stage.sends_up:
            self._sent.append(cotangent)
            yield Send(self._ports.up, Message(Kind.TRAIN, self.batch, cotangent))
        self.state = self.stage.update(self.state, gradient)

    def _drains_after(self, batch):
        every = self.stage.drain_every
        return every > 0 and (batch + 1) % every == 0

    def _evaluate(self, message):
        if self.stage.has_loss:
            yield Receive(self._ports.labels)  # a local head's, which only trains
        y = Activation(self.stage.evaluate(self.state, message.payload.x))
        yield Send(self._ports.down, Message(Kind.EVALUATE, message.batch, y))

    def _evaluate_last(self, message):
        label = yield Receive(self._ports.labels)
        assert label.batch == message.batch, (label.batch, message.batch)
        metrics = self.stage.evaluate_loss(self.state, message.payload.x, label.payload)
        yield Send(self._ports.down, Message(Kind.EVALUATE, message.batch, metrics))


@contextlib.contextmanager
def blame(program: StageProgram) -> Iterator[None]:
    """Adds the stage and the batch to whatever a stage program raises."""
    try:
        yield
    except ChannelClosed:
        raise
    except BaseException as error:
        error.add_note(f"raised in stage {program.stage.index}, batch {program.batch}")
        raise


@dataclass(frozen=True)
class Wiring:
    """Stage programs and the channels that join them to each other and to the caller.

    Attributes:
        programs: one per stage.
        source: activations into stage 0.
        labels: labels into every stage with a loss.
        results: what the last stage sends down.
        channels: all of them.
        window: the most messages that may be between ``source`` and ``results``.
    """

    programs: list[StageProgram]
    source: Channel
    labels: list[Channel]
    results: Channel
    channels: list[Channel]
    window: int

    def feed(self, message: Message, label: Message | None) -> None:
        """Gives a message to stage 0 and its labels where losses are: all or nothing.

        Args:
            message: for stage 0.
            label: the labels of its batch; None with a control message.
        """
        # What fails, fails here: a label without its image would be the next one's.
        message = self.source.place(message)
        channels = [] if label is None else self.labels
        placed = [channel.place(label) for channel in channels]
        for channel, label in zip(channels, placed, strict=True):
            channel.put(label)
        self.source.put(message)

    def result(self, message: Message) -> Message:
        """Completes a control message with what the stages have left for it."""
        if message.kind is Kind.SNAPSHOT:
            stages = tuple(program.snapshots.popleft() for program in self.programs)
        elif message.kind is Kind.STOP:
            stages = tuple(StageSnapshot(program.state) for program in self.programs)
        else:
            return message
        snapshot = Snapshot(message.batch, stages)
        return Message(message.kind, message.batch, snapshot)


def connect(
    stages: Sequence[Stage],
    start: Snapshot,
    schedule: Schedule,
    capacity: int,
    timeline: Any = None,
) -> Wiring:
    """Joins stages by channels that are just large enough.

    Args:
        stages: the stages in order.
        start: what they go on from.
        schedule: their staleness, which sizes the channels that lead up.
        capacity: activations that a channel leading down holds, at least 1.
        timeline: a ``Timeline`` that records the programs, or None.
    """
    num_stages, staleness = len(stages), schedule.staleness
    # Stage 0 can be s_0 + 1 batches ahead of the last stage's answers; the rest waits
    # in channels on the way down.
    window = staleness[0] + 1 + num_stages * capacity
    down = [LocalChannel(capacity, stage.placement) for stage in stages]
    up = [
        LocalChannel(schedule.cotangent_capacity(k), stages[k].placement)
        for k in range(num_stages - 1)
    ]
    labels = {
        stage.index: LocalChannel(window, stage.placement)
        for stage in stages
        if stage.has_loss
    }
    results = LocalChannel(window)
    make_program = StageProgram if timeline is None else timeline.program
    programs = [
        make_program(
            stage,
            start.stages[k],
            start.batch,
            Ports(
                activations=down[k],
                down=results if stage.is_last else down[k + 1],
                cotangents=None if stage.has_loss else up[k],
                up=up[k - 1] if stage.sends_up else None,
                labels=labels.get(k),
                delay=0 if stage.is_first else staleness[k - 1] - staleness[k],
            ),
        )
        for k, stage in enumerate(stages)
    ]
    for above, below, channel in zip(start.stages, start.stages[1:], up, strict=False):
        oldest = start.batch - len(above.stash)
        for batch, cotangent in enumerate(below.sent, oldest):
            channel.put(Message(Kind.TRAIN, batch, cotangent))
    labels = list(labels.values())
    channels = [*down, *up, *labels, results]
    return Wiring(programs, down[0], labels, results, channels, window)
