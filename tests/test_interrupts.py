"""Nothing that was trained is lost, whatever ends training: what is there is exact."""

import itertools
import math
import os
import random
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_threads
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from fdg_jax.interrupts import HeldInterrupts
from fdg_jax.stage import Stage

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BATCHES = oracle.make_batches(40)
ENGINES = ["serial", "threads", "fused"]
STALENESS = (4, 2, 0)


def make_pipeline(network=None, **options):
    options = {
        "loss_fn": fdg.softmax_cross_entropy,
        "optimizer": optax.adam(0.01),
        "num_stages": 3,
        "cuts": (1, 3),
        "schedule": "paper",
        "engine": "serial",
        **options,
    }
    return fdg.Pipeline(network or oracle.make_network(), **options)


def train(batches, **options):
    with make_pipeline(**options) as pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(batches)]
    return losses, oracle.values(pipeline.network)


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


class Failure(Exception):
    pass


def failing(batches, error):
    yield from batches
    raise error


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Failure])
def test_an_error_in_the_loop_leaves_what_was_trained(engine, error):
    """The loop's body raises: the batches that have gone in are applied."""
    with pytest.raises(error) as raised, make_pipeline(engine=engine) as pipeline:
        for metrics in pipeline.train(BATCHES):
            if metrics["batch"] == 5:
                raise error
    count = pipeline.num_batches
    assert 6 <= count < len(BATCHES)
    assert pipeline.batches_applied == [count] * 3
    assert f"the first {count} batches;" in raised.value.__notes__[-1]
    assert_same(
        oracle.values(pipeline.network), train(BATCHES[:count], engine=engine)[1]
    )
    assert not own_threads.left()
    # And it goes on, as after any block that was left; what it owed comes first.
    expected = make_pipeline(engine=engine)
    for part in (BATCHES[:count], BATCHES[count:]):
        with expected:
            list(expected.train(part))
    with pipeline:
        numbers = [m["batch"] for m in pipeline.train(BATCHES[count:])]
    assert numbers == list(range(6, len(BATCHES)))
    assert_same(oracle.values(pipeline.network), oracle.values(expected.network))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_source_of_batches_that_fails_costs_nothing(engine):
    with pytest.raises(Failure), make_pipeline(engine=engine) as pipeline:
        list(pipeline.train(failing(BATCHES[:7], Failure)))
    assert pipeline.batches_applied == [7, 7, 7]
    assert_same(oracle.values(pipeline.network), train(BATCHES[:7], engine=engine)[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_block_an_error_does_not_even_stop_the_pipeline(engine):
    expected, values = train(BATCHES[:12], engine=engine)
    pipeline, losses = make_pipeline(engine=engine), []

    def collect(batches):
        for metrics in pipeline.train(batches):
            assert metrics["batch"] == len(losses)
            losses.append(metrics["loss"])

    with pytest.raises(Failure):
        collect(failing(BATCHES[:7], Failure))
    assert pipeline.num_batches == 7
    # Filled as it was: stage k has done the updates of the batches before 7 - s_k.
    assert pipeline.batches_applied == [7 - s for s in STALENESS]
    pipeline.evaluate(BATCHES[:1])
    collect(BATCHES[7:12])  # the metrics that the first call owed come first
    pipeline.close()
    assert losses == expected
    assert_same(oracle.values(pipeline.network), values)


class Interrupts:
    """Sends Ctrl-C to this process at random moments; it hits only where it is armed.

    Elsewhere it would be a Ctrl-C for pytest.
    """

    def __init__(self, seed):
        self.count = 0
        self._draw = random.Random(seed)
        self._stop = threading.Event()
        self._is_armed = False
        self._sender = threading.Thread(target=self._send)

    def __enter__(self):
        self._before = signal.signal(signal.SIGINT, self._handle)
        self._sender.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._sender.join()
        assert signal.getsignal(signal.SIGINT) == self._handle
        signal.signal(signal.SIGINT, self._before)

    def _send(self):
        while not self._stop.wait(self._draw.uniform(0.0, 0.02)):
            os.kill(os.getpid(), signal.SIGINT)

    def _handle(self, number, frame):
        if self._is_armed:
            self._is_armed = False
            self.count += 1
            raise KeyboardInterrupt

    def during(self, work):
        """Calls ``work``, which one interrupt may end."""
        try:
            self._is_armed = True
            work()
            self._is_armed = False
        except KeyboardInterrupt:
            pass


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("stall_timeout", [None, 200.0])
def test_interrupts_at_any_moment_change_nothing(engine, stall_timeout):
    """Many Ctrl-C, wherever they hit: the same losses and parameters."""
    expected, values = train(BATCHES, engine=engine)
    pipeline = make_pipeline(engine=engine, stall_timeout=stall_timeout)
    next(pipeline.train(BATCHES[:1]))  # compiled by now
    losses = {}

    def work():
        rest = itertools.islice(BATCHES, pipeline.num_batches, None)
        for metrics in pipeline.train(rest):
            losses[metrics["batch"]] = metrics["loss"]
            time.sleep(0.001)

    with Interrupts(engine) as interrupts:
        ended = time.monotonic() + 100
        while pipeline.num_batches < len(BATCHES) or interrupts.count < 4:
            assert time.monotonic() < ended, (pipeline.num_batches, interrupts.count)
            interrupts.during(work)
            interrupts.during(lambda: pipeline.evaluate(BATCHES[:1]))
    work()
    pipeline.close()
    assert all(loss == expected[batch] for batch, loss in losses.items())
    assert len(losses) > len(BATCHES) - 2 * interrupts.count
    assert_same(oracle.values(pipeline.network), values)
    assert not own_threads.left()


def test_interrupts_are_held_back_and_passed_on_once():
    seen = []
    with pytest.raises(KeyboardInterrupt):
        with HeldInterrupts():
            with HeldInterrupts():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                seen.append("inner")
            seen.append("outer")
    assert seen == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Root(nnx.Module):
    """Adds a number whose gradient is NaN where its value, 0, is finite."""

    def __init__(self):
        self.factor = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return x + jnp.sqrt(jnp.abs(self.factor[...] * x.sum()))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backward", ["stored", "replay"])
def test_a_nan_leaves_the_values_from_before_its_update(engine, backward):
    options = {"engine": engine, "backward": backward}
    poisoned = [dict(batch) for batch in BATCHES]
    poisoned[9]["image"] = np.full_like(poisoned[9]["image"], np.nan)
    pipeline = make_pipeline(**options)
    losses = []
    with pytest.raises(fdg.NonFiniteLossError, match="batch 9 is nan") as raised:
        for metrics in pipeline.train(poisoned):
            losses.append(metrics["loss"])
    assert (raised.value.batch, raised.value.stage) == (9, 0)
    assert pipeline.batches_applied == [9, 9, 9]
    assert not own_threads.left()
    with make_pipeline(**options) as untouched:
        expected = [m["loss"] for m in untouched.train(BATCHES[:9])]
    assert losses == expected
    params, stats = oracle.values(pipeline.network)
    assert_same(params, oracle.values(untouched.network)[0])
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(stats))
    for _ in range(2):  # running and closed, as often as one likes
        assert math.isfinite(pipeline.evaluate_metrics(BATCHES[:2])["loss"])
        assert pipeline.batches_applied == [9, 9, 9]
        pipeline.close()
    # It may be trained on from there, also while it is running for an evaluation.
    pipeline.evaluate(BATCHES[:1])
    assert len(list(pipeline.train(BATCHES[:5]))) == 5
    pipeline.close()
    assert pipeline.batches_applied == [pipeline.num_batches] * 3
    moved = oracle.values(pipeline.network)[0]
    assert all(
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (moved, params)), strict=True)
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at", [5, 11])
@pytest.mark.parametrize("cuts", [(), (1, 3)])
def test_a_gradient_that_is_not_finite_is_an_error_though_the_loss_is(engine, at, cuts):
    """Plain training would have NaN parameters next; here it may be the last batch."""
    network = [Root(), *oracle.make_network()]
    batches = [dict(batch) for batch in BATCHES[:12]]
    batches[at]["image"] = np.zeros_like(batches[at]["image"])
    pipeline = make_pipeline(
        network, num_stages=len(cuts) + 1, cuts=cuts, engine=engine, schedule="minimal"
    )
    message = f"gradient of batch {at} is not finite in stage 0"
    with pytest.raises(fdg.NonFiniteLossError, match=message) as raised:
        with pipeline:
            list(pipeline.train(batches))
    assert (raised.value.batch, raised.value.stage) == (at, 0)
    # Stages after it halt at the first batch whose forward came after its halt.
    num_stages = len(cuts) + 1
    later = min(at + num_stages, len(batches))
    assert pipeline.batches_applied == [at] + [later] * len(cuts)
    for array in jax.tree.leaves(oracle.values(pipeline.network)):
        assert np.isfinite(array).all()


class ToLogits(nnx.Module):
    """Makes of a mask of zeros and ones what is added to scores."""

    def __call__(self, inputs):
        x, mask = inputs
        return x + jnp.maximum(jnp.log(mask), -1e3)


class Masked(nnx.Module):
    def __call__(self, x):
        return x, (x > 0).astype(x.dtype)


@pytest.mark.parametrize("skip_nonfinite", [0, 2])
def test_a_cotangent_that_reaches_no_parameter_may_be_anything(skip_nonfinite):
    """That of a mask which is 0 is NaN here, and nothing depends on it."""
    blocks = oracle.make_network()
    network = [blocks[0], Masked(), ToLogits(), *blocks[1:]]
    results = []
    for options in ({"num_stages": 1, "cuts": ()}, {"num_stages": 2, "cuts": (2,)}):
        options["skip_nonfinite"] = skip_nonfinite
        with make_pipeline(network, schedule="bp", **options) as pipeline:
            losses = [m["loss"] for m in pipeline.train(BATCHES[:6])]
        assert pipeline.skipped_updates == [0] * options["num_stages"]
        results.append((losses, oracle.values(pipeline.network)))
    assert oracle.relative_error(*results) < 1e-10


def test_a_schedule_that_drains_does_not_go_on_out_of_step():
    poisoned = [dict(batch) for batch in BATCHES[:12]]
    poisoned[5]["image"] = np.full_like(poisoned[5]["image"], np.nan)
    arguments = fdg.methods.get("gpipe").arguments(num_stages=2)
    options = {"num_stages": 2, "cuts": (3,), **arguments}
    pipeline = make_pipeline(**options)
    with pytest.raises(fdg.NonFiniteLossError, match="batch 5 is nan"):
        list(pipeline.train(poisoned[:6]))
    with pytest.raises(RuntimeError, match="goes on at a multiple of them"):
        list(pipeline.train(BATCHES[:8]))
    assert pipeline.batches_applied == [5, 5]


@pytest.mark.parametrize("engine", ["serial", "threads"])
def test_a_stage_that_raises_leaves_what_each_stage_has_trained(engine, monkeypatch):
    def broken(stage, state, entry, cotangent, original=Stage.backward):
        if stage.index == 1 and int(state.batch.number) == 9:
            raise Failure
        return original(stage, state, entry, cotangent)

    monkeypatch.setattr(Stage, "backward", broken)
    with pytest.raises(Failure) as raised, make_pipeline(engine=engine) as pipeline:
        list(pipeline.train(BATCHES))
    applied = pipeline.batches_applied
    assert applied[1] == 6 and applied[2] >= 6 >= applied[0] >= 1
    assert f"the first {', '.join(map(str, applied))} batches by stage" in "".join(
        raised.value.__notes__
    )
    monkeypatch.undo()
    # Each stage's parameters are those of a run that nothing has happened to.
    got, _ = oracle.values(pipeline.network)
    for stage, cut in enumerate([(0, 1), (1, 3), (3, 5)]):
        other = make_pipeline()
        list(other.train(BATCHES[: applied[stage] + STALENESS[stage]]))
        assert other.batches_applied[stage] == applied[stage]
        expected, _ = oracle.values(other.network)
        assert_same(got[slice(*cut)], expected[slice(*cut)])
    assert math.isfinite(pipeline.evaluate_metrics(BATCHES[:2])["loss"])
    assert pipeline.batches_applied == applied
    assert pipeline.snapshot().result().batch == pipeline.num_batches
    with pytest.raises(RuntimeError, match="cannot train on; make a new one"):
        next(pipeline.train(BATCHES))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_that_cannot_be_placed_leaves_nothing_behind(engine):
    """Else its labels would meet the images of the next one."""
    gone = {name: jnp.asarray(array) for name, array in BATCHES[0].items()}
    gone["image"].delete()
    with make_pipeline(engine=engine) as pipeline:
        list(pipeline.train(BATCHES[:3]))
        before = pipeline.evaluate_metrics(BATCHES[1:3])
        with pytest.raises(RuntimeError, match="deleted"):
            pipeline.evaluate([gone])
        assert pipeline.evaluate_metrics(BATCHES[1:3]) == before
        with pytest.raises(RuntimeError, match="deleted"):
            next(pipeline.train([gone]))
        list(pipeline.train(BATCHES[3:6]))
    _, values = train(BATCHES[:6], engine=engine)
    assert_same(oracle.values(pipeline.network), values)


@pytest.mark.parametrize("engine", ["serial", "threads"])
def test_a_forward_that_fails_at_work_leaves_what_was_trained(engine):
    calls = []

    class Failing(nnx.Module):
        def __call__(self, x):
            def call(x):
                calls.append(None)
                if len(calls) == 9:
                    raise OSError("the host has failed")
                return x

            y = jax.pure_callback(
                call, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x)
            )
            return x + 0 * y

    network = [*oracle.make_network()[:2], Failing(), *oracle.make_network()[2:]]
    with pytest.raises(Exception, match="the host has failed") as raised:
        with make_pipeline(network, engine=engine, cuts=(2, 4)) as pipeline:
            list(pipeline.train(BATCHES))
    notes = "".join(raised.value.__notes__)
    # A result that is not there yet when more is built on it takes that along.
    if "is lost: its arrays are results of what failed" in notes:
        with pytest.raises(RuntimeError, match="could not be kept; make a new one"):
            _ = pipeline.network
        return
    assert all(0 <= n <= 9 for n in pipeline.batches_applied)
    for array in jax.tree.leaves(oracle.values(pipeline.network)):
        assert np.isfinite(array).all()


def test_what_a_stall_leaves_is_not_taken_back_by_a_stage_that_wakes_up(monkeypatch):
    woken = threading.Event()

    def slow(stage, state, gradient, original=Stage.update):
        if stage.index == 0 and int(state.batch.number) == 9:
            time.sleep(4.0)
            result = original(stage, state, gradient)
            woken.set()
            return result
        return original(stage, state, gradient)

    pipeline = make_pipeline(engine="threads", stall_timeout=1000.0)
    with pytest.raises(fdg.StalledError) as stalled, pipeline:
        list(pipeline.train(BATCHES[:8]))
        monkeypatch.setattr(Stage, "update", slow)
        with pipeline.stall_limit(1.0):
            list(pipeline.train(BATCHES[8:]))
    assert (
        "its network, evaluate and snapshot still work" in stalled.value.__notes__[-1]
    )
    applied = pipeline.batches_applied
    assert woken.wait(60)
    assert pipeline.batches_applied == applied
    assert math.isfinite(pipeline.evaluate_metrics(BATCHES[:2])["loss"])


def test_a_snapshot_of_a_pipeline_that_has_halted_can_be_trained_on():
    poisoned = [dict(batch) for batch in BATCHES[:8]]
    poisoned[5]["image"] = np.full_like(poisoned[5]["image"], np.nan)
    pipeline = make_pipeline()
    with pytest.raises(fdg.NonFiniteLossError):
        list(pipeline.train(poisoned))
    other = make_pipeline()
    other.build(BATCHES[0])
    other.restore(pipeline.snapshot().result())
    assert other.batches_applied == [5, 5, 5]
    with other:
        assert len(list(other.train(BATCHES[:6]))) == 6
