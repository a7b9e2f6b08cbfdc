"""The rules of attribution, held against devices that are only made up."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdg_jax.recorder import RESOLUTION, Clock, Interval, Lane, fill


class FakeClock:
    """A clock that only waiting moves on."""

    def __init__(self):
        self.lock = threading.Lock()
        self.ends = {}
        self.time = 0.0

    def now(self):
        return self.time


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of a platform."""

    platform: str


class FakeArray:
    """An array that is ready at a certain time."""

    def __init__(self, clock, ready):
        self._clock, self._ready = clock, ready

    def block_until_ready(self):
        self._clock.time = max(self._clock.time, self._ready)
        return self


def make_lane(clock, platform="cpu", limit=999):
    return Lane(clock, "stage 1", FakeDevice(platform), first=False, limit=limit)


def time_notes(lane):
    """Runs the watcher in this thread, to the end of the notes."""
    lane._notes.put(None)
    lane._watch()


def note(lane, clock, kind, begun, returned, end, inputs=(), traced=False):
    inputs = [(name, FakeArray(clock, ready)) for name, ready in inputs]
    lane._note(kind, begun, returned, traced, inputs, FakeArray(clock, end))


intervals = st.lists(st.floats(0.0, 10.0), max_size=8).map(
    lambda times: [
        Interval(f"{i}", a, b)
        for i, (a, b) in enumerate(
            zip(sorted(times)[::2], sorted(times)[1::2], strict=False)
        )
    ]
)


@given(st.floats(0.0, 10.0), st.floats(0.0, 10.0), intervals)
def test_a_gap_is_filled_without_holes(start, length, intervals):
    end = start + length
    waits = list(fill(start, end, intervals))
    edges = [start, *(wait.end for wait in waits)]
    assert [wait.start for wait in waits] == edges[:-1]
    assert edges[-1] <= end and end - edges[-1] < RESOLUTION
    assert all(wait.end - wait.start >= RESOLUTION for wait in waits)
    for kind, first, last in intervals:
        named = sum(wait.end - wait.start for wait in waits if wait.kind == kind)
        within = max(0.0, min(last, end) - max(first, start))
        # A neighbour shorter than the resolution may have come to it, or gone from it.
        assert named == pytest.approx(within, abs=len(intervals) * RESOLUTION)


@given(
    st.lists(
        st.tuples(*[st.integers(0, 40)] * 4, st.integers(1, 40)),
        min_size=1,
        max_size=12,
    )
)
def test_slices_are_what_a_device_does_with_calls_that_run_in_order(calls):
    clock = FakeClock()
    lane = make_lane(clock)
    returned, device_free, expected = 0.0, 0.0, []
    for idle, dispatch, first_input, second_input, duration in calls:
        begun = returned + idle
        returned = begun + dispatch
        inputs = [returned - 20 + first_input, returned - 20 + second_input]
        start = max(returned, device_free, *inputs)
        device_free = start + duration
        expected.append((start, device_free))
        named = zip(("activation", "labels"), inputs, strict=True)
        note(lane, clock, "loss_step", begun, returned, device_free, named)
    time_notes(lane)
    slices = list(lane.slices)
    assert [s[2:4] for s in slices if not s.is_wait] == expected
    # Waits and work fill the lane: nothing overlaps, nothing is missing.
    assert slices[0].start == 0.0
    assert all(a.end == b.start for a, b in zip(slices, slices[1:], strict=False))


def waits_of(lane):
    return [s[:1] + s[2:4] for s in lane.slices if s.is_wait]


def test_a_wait_is_named_after_what_came_last():
    clock = FakeClock()
    lane = make_lane(clock)
    note(lane, clock, "forward", 0.0, 0.0, 2.0)
    # Dispatched while the device worked; its activation came at 3, its label at 5.
    inputs = [("activation", 3.0), ("labels", 5.0)]
    note(lane, clock, "loss_step", 0.5, 1.0, 8.0, inputs)
    # Dispatched late: the host waited for a message and for room, then took 1 to call.
    lane._host_waits = [
        Interval("cotangent", 4.0, 9.0),
        Interval("room", 9.0, 10.0),
    ]
    note(lane, clock, "backward", 11.0, 12.0, 15.0)
    # Compiled at first.
    note(lane, clock, "update", 12.0, 20.0, 21.0, traced=True)
    time_notes(lane)
    assert waits_of(lane) == [
        ("activation", 2.0, 3.0),
        ("labels", 3.0, 5.0),
        ("cotangent", 8.0, 9.0),
        ("room", 9.0, 10.0),
        ("dispatch", 10.0, 12.0),
        ("compile", 15.0, 20.0),
    ]


def test_inputs_that_were_there_in_time_are_not_waited_for():
    clock = FakeClock()
    lane = make_lane(clock)
    note(lane, clock, "forward", 0.0, 0.0, 2.0, [("activation", 0.0)])
    note(lane, clock, "forward", 0.1, 0.2, 4.0, [("activation", 1.9)])
    time_notes(lane)
    assert [s[2:4] for s in lane.slices] == [(0.0, 2.0), (2.0, 4.0)]


def test_a_device_that_is_shared_and_runs_one_call_at_a_time_is_waited_for():
    clock = FakeClock()
    one, other = make_lane(clock, "gpu"), make_lane(clock, "gpu")
    note(one, clock, "backward", 0.0, 0.0, 5.0)
    note(other, clock, "forward", 1.0, 2.0, 8.0)
    time_notes(one)
    time_notes(other)
    (dispatch, device_busy, forward) = other.slices
    assert dispatch[:1] + dispatch[2:4] == ("dispatch", 0.0, 2.0)
    assert device_busy[:1] + device_busy[2:4] == ("device", 2.0, 5.0)
    assert forward[:1] + forward[2:4] == ("forward", 5.0, 8.0)


def test_on_a_cpu_calls_of_two_threads_run_side_by_side():
    clock = FakeClock()
    one, other = make_lane(clock), make_lane(clock)
    note(one, clock, "backward", 0.0, 0.0, 5.0)
    thread = threading.Thread(
        target=note, args=(other, clock, "forward", 1.0, 2.0, 8.0)
    )
    thread.start()
    thread.join()
    time_notes(one)
    time_notes(other)
    assert other.slices[-1][2:4] == (2.0, 8.0)


def test_the_last_slices_are_kept():
    clock = FakeClock()
    lane = make_lane(clock, limit=5)
    for n in range(20):
        lane.turn_to(n)
        note(lane, clock, "forward", n, n, n + 1)
    time_notes(lane)
    assert [s.batch for s in lane.slices] == [15, 16, 17, 18, 19]


class Program:
    """Something with compiled functions."""

    def __init__(self, jit):
        self.forward = jit(self._forward_fn, donate_argnums=0)
        self.evaluate_loss = jit(self._evaluate_loss_fn)

    def _forward_fn(self, params, activation):
        return params + 1, activation @ activation

    def _evaluate_loss_fn(self, params, x, label):
        return (params.sum() + x.sum() - label).sum()


def call(program, x):
    params, y = program.forward(jax.device_put(np.ones(3, np.float32)), x)
    return params, y, program.evaluate_loss(params, y, x)


def test_a_recorded_function_returns_the_same_and_leaves_slices():
    lane = Lane(Clock(), "stage 0", jax.devices()[0], first=True, limit=99)
    x = jax.device_put(np.arange(9.0, dtype=np.float32).reshape(3, 3))
    lane.start()
    recorded = Program(lane.jit)
    lane.turn_to(7)
    results = [call(recorded, x) for _ in range(2)]
    lane.stop()
    assert lane._watcher is None
    plain = call(Program(jax.jit), x)
    for result in results:
        jax.tree.map(np.testing.assert_array_equal, result, plain)
    work = [(s.kind, s.batch) for s in lane.slices if not s.is_wait]
    assert work == [("forward", 7), ("evaluate", 7)] * 2
    # Each function was compiled once, before its first slice.
    kinds = [s.kind for s in lane.slices if s.kind == "compile" or not s.is_wait]
    assert kinds == ["compile", "forward", "compile", "evaluate", "forward", "evaluate"]
    assert lane.source == "data"


def test_the_watcher_survives_arrays_that_never_get_ready():
    clock = FakeClock()
    lane = make_lane(clock)
    deleted = jax.device_put(np.ones(3, np.float32))
    deleted.delete()
    lane._note("forward", 0.0, 1.0, False, [("activation", deleted)], deleted)
    note(lane, clock, "backward", 1.0, 2.0, 3.0)
    time_notes(lane)
    assert [s.kind for s in lane.slices if not s.is_wait] == ["forward", "backward"]


def test_no_input_is_kept():
    lane = Lane(Clock(), "stage 1", jax.devices()[0], first=False, limit=99)
    lane.start()
    program = Program(lane.jit)
    x = jax.device_put(np.ones((13, 13), np.float32))
    results = call(program, x)
    lane.stop()
    del results, x
    assert len(lane.slices) >= 2
    assert not [a for a in jax.live_arrays() if a.shape == (13, 13)]
