"""Threads, channels and staleness, with stages that only count: no JAX in the way."""

import random
import signal
import threading
import time

import own_threads
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import methods
from fdg_jax.channel import Kind, Message
from fdg_jax.engines.serial import SerialEngine
from fdg_jax.engines.threads import ThreadsEngine
from fdg_jax.schedule import Schedule, resolve
from fdg_jax.snapshot import Snapshot, StageSnapshot
from fdg_jax.stage import Activation

pytestmark = pytest.mark.usefixtures("compiled_quickly")


class CountingStage:
    """A stage whose state is the number of its updates, and which records staleness."""

    placement = None

    def __init__(self, index, schedule, pause=0.0, fail=None, local=False):
        self.index = index
        self.staleness = schedule.staleness[index]
        self.drain_every = schedule.drain_every
        self.is_first = index == 0
        self.is_last = index == schedule.num_stages - 1
        self.has_loss = self.is_last or local
        self.sends_up = index > 0 and not local
        self.measured = []
        self.stashed = self.most_stashed = 0
        self._pause, self._fail = pause, fail
        self._turns = {"forward": 0, "backward": 0, "update": 0, "loss_step": 0}

    def _work(self, kind):
        time.sleep(random.random() * self._pause)
        if self._fail == (kind, self._turns[kind]):
            raise OSError("broken on purpose")
        self._turns[kind] += 1

    def forward(self, state, activation):
        self._work("forward")
        self.stashed += 1
        self.most_stashed = max(self.most_stashed, self.stashed)
        return Activation(activation.x + 1), state, state

    def backward(self, state, entry, cotangent):
        self._work("backward")
        self.stashed -= 1
        self.measured.append(state - entry)
        return 1, cotangent

    def update(self, state, grads):
        self._work("update")
        return state + grads

    def loss_step(self, state, activation, label):
        self._work("loss_step")
        self.measured.append(0)
        assert activation.x == label + self.index, "activation of another batch"
        down = None if self.is_last else Activation(activation.x + 1)
        return down, {"loss": label}, state, 1, label if self.sends_up else None

    def evaluate(self, state, x):
        return x + 1

    def evaluate_loss(self, state, x, label):
        return {"loss": label}


def start(engine, staleness, capacity, drain_every=0, **options):
    resolve(tuple(staleness), len(staleness))  # refuses what is no schedule
    schedule = Schedule("custom", tuple(staleness), drain_every)
    stages = [CountingStage(k, schedule, **options) for k in range(len(staleness))]
    start = Snapshot(0, (StageSnapshot(0),) * len(stages))
    return engine(stages, start, schedule, capacity=capacity), stages


def feed(engine, num_batches, evaluate_every=0):
    """Trains, keeping as many batches under way as the engine allows."""
    under_way, results = 0, []

    def read():
        engine.await_result()
        results.append(engine.get())
        return under_way - 1

    for n in range(num_batches):
        kinds = [Kind.TRAIN]
        if evaluate_every and n % evaluate_every == 0:
            kinds.append(Kind.EVALUATE)
        for kind in kinds:
            while under_way >= engine.window:
                under_way = read()
            engine.await_room()
            engine.put(Message(kind, n, Activation(n)), Message(kind, n, n))
            under_way += 1
    while under_way:
        under_way = read()
    engine.await_room()
    engine.put(Message(Kind.STOP, num_batches))
    engine.await_result()
    return results, tuple(stage.state for stage in engine.get().payload.stages)


def no_stage_thread_is_left():
    return not own_threads.left()


staleness_tuples = st.lists(st.integers(0, 7), min_size=0, max_size=3).map(
    lambda values: (*sorted(values, reverse=True), 0)
)


@pytest.mark.timeout(120)
@settings(max_examples=60)
@given(
    staleness_tuples,
    st.integers(1, 3),
    st.integers(1, 30),
    st.booleans(),
    st.integers(0, 5),
)
def test_no_schedule_deadlocks_and_all_apply_every_update(
    staleness, capacity, num_batches, threaded, drain_every
):
    engine, stages = start(
        ThreadsEngine if threaded else SerialEngine,
        staleness,
        capacity,
        drain_every,
        pause=0.002 if threaded else 0.0,
    )
    results, states = feed(engine, num_batches, evaluate_every=4)
    batches = [m.batch for m in results if m.kind is Kind.TRAIN]
    assert batches == list(range(num_batches))
    assert states == (num_batches,) * len(stages)
    for channel in engine._wiring.channels:
        assert channel.most_held <= channel.capacity
    for stage in stages:
        # The schedule says how many updates lie between a batch's forward and its
        # gradient's use; the first batches, also after a drain, find fewer done.
        period = drain_every or num_batches
        expected = [min(n % period, stage.staleness) for n in range(num_batches)]
        assert stage.measured == expected
        assert stage.most_stashed <= min(stage.staleness + 1, period)
    assert no_stage_thread_is_left()


@pytest.mark.timeout(120)
@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 17))
def test_gpipe_runs_all_forwards_of_a_batch_before_its_backwards(
    num_stages, micro_batches, capacity, num_batches
):
    schedule = methods.get("gpipe").arguments(num_stages, accumulation=micro_batches)
    schedule = schedule["schedule"]
    engine, stages = start(
        ThreadsEngine, schedule.staleness, capacity, schedule.drain_every, pause=0.002
    )
    orders = [[] for _ in stages]
    for stage, order in zip(stages, orders, strict=True):
        for kind in ("forward", "backward"):
            _record(stage, kind, order)
    results, states = feed(engine, num_batches, evaluate_every=3)
    batches = [m.batch for m in results if m.kind is Kind.TRAIN]
    assert batches == list(range(num_batches))
    assert states == (num_batches,) * num_stages
    for stage, order in zip(stages[:-1], orders, strict=False):
        assert stage.most_stashed == min(micro_batches, num_batches)
        whole, rest = divmod(num_batches, micro_batches)
        sizes = [micro_batches] * whole + [rest] * bool(rest)
        assert order == [
            kind for m in sizes for kind in ["forward"] * m + ["backward"] * m
        ]


def _record(stage, kind, order):
    call = getattr(stage, kind)

    def recorded(*arguments):
        order.append(kind)
        return call(*arguments)

    setattr(stage, kind, recorded)


@pytest.mark.timeout(120)
@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.integers(1, 20))
def test_stages_with_losses_of_their_own_wait_for_no_cotangent(
    num_stages, capacity, drain_every, num_batches
):
    engine, stages = start(
        ThreadsEngine, (0,) * num_stages, capacity, drain_every, pause=0.002, local=True
    )
    results, states = feed(engine, num_batches, evaluate_every=4)
    batches = [m.batch for m in results if m.kind is Kind.TRAIN]
    assert batches == list(range(num_batches))
    assert states == (num_batches,) * num_stages
    assert all(stage.measured == [0] * num_batches for stage in stages)
    assert no_stage_thread_is_left()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_that_raises_in_a_drained_schedule_ends_the_run(stage):
    kind = "loss_step" if stage == 2 else "backward"
    engine, stages = start(ThreadsEngine, (3, 3, 0), 1, 4)
    stages[stage]._fail = (kind, 6)
    with pytest.raises(OSError, match="broken on purpose") as caught:
        feed(engine, 40)
    assert caught.value.__notes__ == [f"raised in stage {stage}, batch 6"]
    assert no_stage_thread_is_left()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("stage", "kind"),
    [(k, kind) for k in (0, 1) for kind in ("forward", "backward", "update")]
    + [(2, "loss_step"), (2, "update")],
)
def test_a_stage_that_raises_ends_the_run_within_a_second(stage, kind):
    seconds = []
    # A busy machine may hold up one of the runs, a rule that is broken holds up each.
    while not seconds or (min(seconds) >= 1.0 and len(seconds) < 5):
        engine, stages = start(ThreadsEngine, (3, 1, 0), 2)
        stages[stage]._fail = (kind, 12)
        started = time.monotonic()
        with pytest.raises(OSError, match="broken on purpose") as caught:
            feed(engine, 100)
        seconds.append(time.monotonic() - started)
        assert caught.value.__notes__ == [f"raised in stage {stage}, batch 12"]
        # The original traceback: the line that raised is in it.
        assert caught.traceback[-1].name == "_work"
        assert no_stage_thread_is_left()
    assert min(seconds) < 1.0


def test_the_serial_engine_names_the_stage_and_the_batch():
    engine, stages = start(SerialEngine, (3, 1, 0), 2)
    stages[1]._fail = ("backward", 5)
    with pytest.raises(OSError) as caught:
        feed(engine, 100)
    assert caught.value.__notes__ == ["raised in stage 1, batch 5"]


@pytest.mark.timeout(60)
def test_a_stage_that_raises_while_draining_is_reported():
    engine, stages = start(ThreadsEngine, (4, 2, 0), 2)
    stages[0]._fail = ("backward", 19)  # the last of 20, due only when draining
    with pytest.raises(OSError):
        feed(engine, 20)
    assert no_stage_thread_is_left()


@pytest.mark.timeout(60)
def test_abort_ends_threads_that_wait():
    engine, _ = start(ThreadsEngine, (4, 2, 0), 1)
    engine.put(Message(Kind.TRAIN, 0, Activation(0)), Message(Kind.TRAIN, 0, 0))
    engine.abort()
    assert no_stage_thread_is_left()
    with pytest.raises(RuntimeError, match="stopped"):
        engine.await_result()


@pytest.fixture
def interruptible():
    """A process that a shell started in the background ignores SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_reaches_a_caller_that_waits_for_a_slow_stage():
    engine, _ = start(ThreadsEngine, (1, 0), 1, pause=0.5)
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        feed(engine, 1000)
    engine.abort()
    assert no_stage_thread_is_left()
