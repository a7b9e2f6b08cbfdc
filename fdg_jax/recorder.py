"""How a stage's device is timed though nothing waits for it; see ``timeline``.

A call of a compiled function returns before the device has done the work, so no clock
in a stage's thread can time it. Here every such call leaves a note (when it returned,
its inputs from elsewhere, a scalar output), and one more thread per stage, the watcher,
follows the notes: it waits until the inputs are ready, then until the output is, and
takes the time of both. A stage's calls run one after another, hence

    end   = the output is ready
    start = max(the call has returned, its inputs are ready, end of the call before)

and the gap before ``start`` is a wait, named after what was awaited. The stage's own
thread waits for nothing that it would not wait for anyway. The scalar is a constant
that each recorded function returns besides its results: all outputs of a call become
ready together, and unlike the results it is never donated and holds no memory. Held
against JAX's own profiler (ResNet-20, two stages, a CPU of two busy cores), ends are
0.06 ms and starts 0.4 ms off in the median; in the worst tenth, where the watcher found
no free core, 2.5 ms.

What JAX does on a CPU (0.10): calls return at once there too, except that one with next
to no work runs before it returns, and that the 33rd under way waits for the oldest.
Calls from one thread to one device run in order; those from two threads run side by
side. On other platforms a device runs one call at a time, whoever made it.

So where stages share a device, on a CPU their slices may overlap, and each is as long
as it took beside the others. Elsewhere, and in the serial engine, a slice starts when
that of the other stage ends, and the wait until then is called "device". Device work
that is no stage's, such as making batches and copying, has no slice of its own: it
shows as a wait for what it makes. The fused engine has no stages to see: it has one
lane, with a slice per call of its compiled program (up to 8 batches).
"""

import functools
import inspect
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdg_jax.channel import Message
from fdg_jax.engines.program import Ports, Receive, Send, StageProgram
from fdg_jax.snapshot import StageSnapshot
from fdg_jax.stage import Stage

RESOLUTION = 50e-6
"""Seconds; a shorter wait is not told from the time that it takes to notice it."""

WORK = ("forward", "loss_step", "backward", "update", "train", "drain", "evaluate")
"""What a slice can be; "train" (up to 8 batches) and "drain" are the fused engine's."""

WAITS = (
    *("data", "activation", "cotangent", "labels"),  # until it came
    "room",  # in the channel down or up
    "device",  # which was busy with another stage
    *("dispatch", "compile"),  # the host
)
"""What a stage can wait for, which is also a slice."""

# Arguments that come from elsewhere, by the names that compiled functions give them.
_AWAITED = {
    "activation": "activation",
    "x": "activation",
    "images": "activation",
    "cotangent": "cotangent",
    "label": "labels",
    "labels": "labels",
}


class Slice(NamedTuple):
    """A piece of a lane.

    Attributes:
        kind: one of ``WORK`` or ``WAITS``.
        batch: its number, the first one where there are several; for an evaluation, of
            the batch that would be trained next.
        start: seconds since the timeline was made.
        end: in the same seconds.
        num_batches: batches in a slice of the fused engine.
    """

    kind: str
    batch: int
    start: float
    end: float
    num_batches: int = 1

    @property
    def is_wait(self) -> bool:
        """Whether the stage's device had nothing to do."""
        return self.kind in WAITS


class Interval(NamedTuple):
    """A time in which something was awaited."""

    kind: str
    start: float
    end: float


class Clock:
    """The time, and when devices finished, for all lanes of a timeline.

    Attributes:
        lock: to hold while slices and ends are read or changed.
        ends: when the last call ended, by what runs its calls one after another.
    """

    def __init__(self):
        """Starts at 0."""
        self.lock = threading.Lock()
        self.ends = {}
        self._origin = time.perf_counter()

    def now(self) -> float:
        """Returns the seconds since the clock was made."""
        return time.perf_counter() - self._origin


@dataclass(slots=True)
class _Note:
    """What a compiled call leaves for the watcher; times are those of the clock.

    Attributes:
        kind: of its slice.
        batch: number of its batch, the first one where there are several.
        num_batches: how many there are.
        begun: when the function was called.
        returned: when it returned.
        compiled: whether it was traced and compiled in between.
        inputs: name and arrays of its inputs from elsewhere; emptied as they get ready.
        token: scalar output.
        in_order: what runs its calls one after another.
        host_waits: when the host waited in a channel, since the call before.
    """

    kind: str
    batch: int
    num_batches: int
    begun: float
    returned: float
    compiled: bool
    inputs: list[tuple[str, Any]]
    token: jax.Array
    in_order: Hashable
    host_waits: list[Interval]


class Lane:
    """The slices of one stage, and the watcher that times them.

    Attributes:
        name: of the stage.
        device: the stage's.
        slices: the last ones, in order.
    """

    def __init__(
        self, clock: Clock, name: str, device: jax.Device, *, first: bool, limit: int
    ):
        """Creates an empty lane.

        Args:
            clock: shared by all lanes.
            name: of the stage.
            device: the stage's.
            first: whether its activations are the data.
            limit: how many slices to keep.
        """
        self.name = name
        self.device = device
        self.slices = deque(maxlen=limit)
        self.source = "data" if first else "activation"
        self._clock = clock
        self._batch, self._num_batches = 0, 1
        self._host_waits = []
        self._end = 0.0
        self._notes = queue.SimpleQueue()
        self._watcher = None
        self._is_ending = False

    def start(self) -> None:
        """Starts the watcher; to call before an engine's first call."""
        self._end = self._clock.now()
        self._host_waits = []
        self._is_ending = False
        self._watcher = threading.Thread(
            target=self._watch, name=f"fdg-timeline-{self.name}", daemon=True
        )
        self._watcher.start()

    def end(self) -> None:
        """Tells the watcher to end once all calls have been timed, and goes on.

        It takes no lock and waits for nobody, since the garbage collector may end a
        forgotten pipeline in any thread, and while that thread holds the clock's lock.
        """
        if self._watcher is not None and not self._is_ending:
            self._is_ending = True
            self._notes.put(None)

    def stop(self, seconds: float | None = None) -> None:
        """Ends the watcher, and waits until it has; harmless when ended.

        Args:
            seconds: the most to wait; None for as long as it takes.
        """
        self.end()
        if self._watcher is not None:
            self._watcher.join(seconds)
            self._watcher = None

    def turn_to(self, batch: int, num_batches: int = 1) -> None:
        """Says which batch, and how many from it on, the next calls are for."""
        self._batch, self._num_batches = batch, num_batches

    def jit(self, function: Callable, **options: Any) -> Callable:
        """Compiles a function, as ``jax.jit`` does, and records its calls.

        Args:
            function: its name, less "_fn", is the kind of its slices, and the names of
                its arguments say which of them come from elsewhere.
            **options: of ``jax.jit``.
        """
        kind = function.__name__.strip("_").removesuffix("_fn").removesuffix("_loss")
        parameters = inspect.signature(function).parameters
        awaited = [_AWAITED.get(parameter) for parameter in parameters]
        awaited = [self.source if name == "activation" else name for name in awaited]
        traced = called = False

        @functools.wraps(function)
        def with_token(*args):
            nonlocal traced
            traced = True
            return function(*args), jnp.zeros((), jnp.uint32)

        compiled = jax.jit(with_token, **options)

        @functools.wraps(function)
        def recorded(*args):
            nonlocal traced, called
            if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(args)):
                return compiled(*args)[0]  # somebody asks only for shapes
            # Its trace may be known from then, but it has not been compiled yet.
            first, called, traced = not called, True, False
            begun = self._clock.now()
            results, token = compiled(*args)
            returned = self._clock.now()
            inputs = [(name, a) for name, a in zip(awaited, args, strict=True) if name]
            self._note(kind, begun, returned, traced or first, inputs, token)
            return results

        return recorded

    def follow(
        self, requests: Generator[Send | Receive, Message | None, None], ports: Ports
    ) -> Generator[Send | Receive, Message | None, None]:
        """Passes on a stage program's requests, and notes how long each one takes.

        Args:
            requests: what the program yields.
            ports: its channels.
        """
        kinds = {ports.activations: self.source, ports.cotangents: "cotangent"}
        kinds[ports.labels] = "labels"
        reply = None
        while True:
            try:
                request = [requests.send(reply)]
            except StopIteration:
                return
            sends = isinstance(request[0], Send)
            kind = "room" if sends else kinds[request[0].channel]
            reply, began = None, self._clock.now()
            # No name may hold a message while the stage waits.
            reply = yield request.pop()
            self._host_waits.append(Interval(kind, began, self._clock.now()))
            if not sends:
                self.turn_to(reply.batch)

    def _note(self, kind, begun, returned, traced, inputs, token):
        in_order = self.device
        if self.device.platform == "cpu":
            in_order = (self.device, threading.get_ident())
        numbers = self._batch, self._num_batches
        waits, self._host_waits = self._host_waits, []
        self._notes.put(
            _Note(
                *(kind, *numbers, begun, returned, traced),
                *(inputs, token, in_order, waits),
            )
        )

    def _watch(self) -> None:
        """Body of the watcher: times the calls, in the order in which they run."""
        while (note := self._notes.get()) is not None:
            input_waits, ready = [], note.returned
            while note.inputs:
                name, arrays = note.inputs.pop(0)
                looked = self._clock.now()
                _wait_for(arrays)
                del arrays  # the watcher must not keep activations alive
                now = self._clock.now()
                if now - looked > RESOLUTION:
                    input_waits.append(Interval(name, ready, now))
                    ready = max(ready, now)
            _wait_for(note.token)
            self._add(note, input_waits, ready, self._clock.now())

    def _add(self, note, input_waits, ready, end):
        """Adds the slice of a call, and before it those of the waits for it."""
        with self._clock.lock:
            ends = self._clock.ends
            free = max(self._end, ready)
            start = min(end, max(free, ends.get(note.in_order, 0.0)))
            compilation = [Interval("compile", note.begun, note.returned)]
            intervals = [
                *note.host_waits,
                *(compilation if note.compiled else []),
                *input_waits,
                Interval("device", free, start),
            ]
            for wait in fill(self._end, start, intervals):
                self.slices.append(Slice(wait.kind, note.batch, wait.start, wait.end))
                self._end = wait.end
            self.slices.append(
                Slice(note.kind, note.batch, self._end, end, note.num_batches)
            )
            self._end = ends[note.in_order] = end


class RecordedProgram(StageProgram):
    """A stage program whose requests are timed; its stage's calls are, by ``jit``."""

    def __init__(
        self, lane: Lane, stage: Stage, start: StageSnapshot, batch: int, ports: Ports
    ):
        """Creates the program of one stage, and starts its lane."""
        super().__init__(stage, start, batch, ports)
        self._lane = lane
        lane.start()

    def run(self) -> Generator[Send | Receive, Message | None, None]:
        """Handles messages, as every stage program does."""
        return self._lane.follow(super().run(), self._ports)


def fill(start: float, end: float, intervals: Iterable[Interval]) -> Iterator[Interval]:
    """Fills a gap between two calls with the reasons for it.

    Args:
        start: of the gap.
        end: of the gap.
        intervals: what was awaited when, in order; may reach beyond the gap.

    Yields:
        Intervals that cover the gap from its start without holes, "dispatch" where
        nothing was awaited. What is shorter than RESOLUTION goes to its neighbour.
    """
    for kind, first, last in intervals:
        first, last = max(first, start), min(last, end)
        if last - first < RESOLUTION:
            continue
        if first - start >= RESOLUTION:
            yield Interval("dispatch", start, first)
            start = first
        yield Interval(kind, start, last)
        start = last
    if end - start >= RESOLUTION:
        yield Interval("dispatch", start, end)


def _wait_for(arrays: Any) -> None:
    """Waits until arrays are ready, or will never be."""
    try:
        jax.block_until_ready(arrays)
    except RuntimeError:
        # The call failed, which its caller hears from JAX, or the user has deleted the
        # data meanwhile. Either way the wait is over.
        return
