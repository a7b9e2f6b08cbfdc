"""Bad days inside a pipeline: each ends in an error that says where, or in progress."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_threads
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from fdg_jax import stall
from fdg_jax.channel import WaitTimeout
from fdg_jax.stall import Patience

BATCHES = oracle.make_batches(12)
SIZE = 5


class Callback(nnx.Module):
    """A block that calls the host in the middle of its forward."""

    def __init__(self, function):
        self.scale = nnx.Param(jnp.ones((), jnp.float32))
        self._function = function

    def __call__(self, x):
        def call(x):
            self._function()
            return x

        y = jax.pure_callback(
            call, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x)
        )
        return (x + 0 * y) * self.scale[...]


def make_pipeline(callback=lambda: None, **options):
    def linear(width_in, width_out, seed):
        return nnx.Linear(
            width_in, width_out, param_dtype=jnp.float32, rngs=nnx.Rngs(seed)
        )

    options = {
        "num_stages": 3,
        "cuts": (1, 2),
        "engine": "threads",
        "loss_fn": fdg.softmax_cross_entropy,
        "optimizer": optax.sgd(0.1),
        **options,
    }
    blocks = [linear(SIZE, 6, 0), Callback(callback), linear(6, 4, 1)]
    return fdg.Pipeline(blocks, **options)


def make_batches(count):
    random = np.random.default_rng(0)
    image = random.standard_normal((count, 4, SIZE)).astype(np.float32)
    label = random.integers(0, 4, (count, 4)).astype(np.int32)
    return [{"image": i, "label": n} for i, n in zip(image, label, strict=True)]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.mark.timeout(120)
def test_a_stalled_device_is_an_error_that_says_who_waits_for_what():
    released, calls = threading.Event(), []

    def callback():
        calls.append(None)
        if len(calls) > 3:
            released.wait(60)

    pipeline = make_pipeline(callback, stall_timeout=6.0)
    pipeline.build(make_batches(1)[0])
    began = time.monotonic()
    try:
        with pytest.raises(fdg.StalledError) as stalled, pipeline:
            for _ in pipeline.train(make_batches(40)):
                pass
        assert time.monotonic() - began < 40
        first, *stages = str(stalled.value).splitlines()
        assert "for 6 seconds" in first and "still awaited: the result of" in first
        assert [line[:7] for line in stages] == ["stage 0", "stage 1", "stage 2"]
        assert "waits for the cotangent of batch" in stages[0]
        assert "its stash holds" in stages[0]
        assert "stage 1 works on batch" in stages[1]
        assert "stage 2 waits for an activation" in stages[2]
        with pytest.raises(RuntimeError, match="make a new one"):
            next(pipeline.train(make_batches(1)))
    finally:
        released.set()
    wait_until(lambda: not own_threads.left())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_does_not_wait_for_a_device_that_hangs(monkeypatch, error):
    monkeypatch.setattr(stall, "LEAVING_SECONDS", 1.0)
    released, calls = threading.Event(), []

    def callback():
        calls.append(None)
        if len(calls) > 3:
            released.wait(60)

    def batches():
        yield from make_batches(4)
        wait_until(lambda: len(calls) > 3)
        raise error

    pipeline = make_pipeline(callback)
    pipeline.build(make_batches(1)[0])
    try:
        with pytest.raises(error), pipeline:
            for _ in pipeline.train(batches()):
                pass
        assert not released.is_set() and own_threads.left()
    finally:
        released.set()
    wait_until(lambda: not own_threads.left())


@pytest.mark.timeout(120)
def test_an_interrupted_run_waits_for_stages_that_are_slow(monkeypatch):
    """All that is under way takes longer than a device that hangs is waited for."""
    monkeypatch.setattr(stall, "LEAVING_SECONDS", 0.3)
    pipeline = make_pipeline(lambda: time.sleep(0.2), schedule="paper")
    pipeline.build(make_batches(1)[0])
    with pytest.raises(KeyboardInterrupt), pipeline:
        for metrics in pipeline.train(make_batches(20)):
            if metrics["batch"] == 6:
                raise KeyboardInterrupt
    assert pipeline.batches_applied == [pipeline.num_batches] * 3
    with pipeline:
        assert len(list(pipeline.train(make_batches(2)))) > 2


@pytest.mark.timeout(60)
def test_a_device_that_never_answers_does_not_keep_its_reader():
    """What waits for arrays on behalf of all engines gives up in time."""
    released = threading.Event()

    class Hanging:
        def block_until_ready(self):
            released.wait(60)

    patience = Patience(0.5)
    patience.wait_for({"loss": jnp.ones(3)})
    try:
        with pytest.raises(WaitTimeout):
            patience.wait_for({"loss": Hanging()})
    finally:
        patience.end(seconds=0.0)
        released.set()
    wait_until(lambda: not own_threads.left())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("engine", ["serial", "fused", "threads"])
def test_no_engine_leaves_for_ever(monkeypatch, engine):
    """Nor do the threads that watch its arrays for ``stall_timeout``."""
    monkeypatch.setattr(stall, "LEAVING_SECONDS", 0.5)
    released = threading.Event()
    devices = 1 if engine == "fused" else 3
    options = {"engine": engine, "devices": jax.devices()[:devices]}
    pipeline = make_pipeline(stall_timeout=50.0, **options)
    next(pipeline.train(make_batches(20)))

    monkeypatch.setattr(jax, "block_until_ready", lambda arrays: released.wait(40))
    monkeypatch.setattr(stall, "is_ready", lambda array: False)
    began = time.monotonic()
    try:
        # As an interrupt leaves it that comes while the caller waits for metrics.
        pipeline._patience._asked.put((0, [jnp.ones(1)]))
        pipeline.abort()
        assert time.monotonic() - began < 20
    finally:
        released.set()
    wait_until(lambda: not own_threads.left())


@pytest.mark.timeout(60)
def test_patience_is_only_for_waiting_not_for_working():
    """Ticks that take long, but come, are no stall."""
    pipeline = make_pipeline(lambda: time.sleep(0.2), stall_timeout=60.0)
    with pipeline:
        assert len(list(pipeline.train(make_batches(8)))) == 8
    assert not own_threads.left()


def test_a_stall_timeout_is_a_positive_number():
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="stall_timeout must be a positive number"):
            make_pipeline(stall_timeout=wrong)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stall_timeout", [None, 30.0])
def test_an_error_of_a_device_ends_the_run(stall_timeout):
    calls = []

    def callback():
        calls.append(None)
        if len(calls) > 3:
            raise MemoryError("the device has no room")

    pipeline = make_pipeline(callback, stall_timeout=stall_timeout)
    with pytest.raises(Exception, match="no room") as raised, pipeline:
        for _ in pipeline.train(make_batches(20)):
            pass
    assert any("batch" in note for note in raised.value.__notes__)
    assert not own_threads.left()


@pytest.mark.timeout(60)
def test_a_stage_without_memory_is_named():
    class Huge(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones((), jnp.float32))

        def __call__(self, x):
            rows = jnp.broadcast_to(x[:, :1, None], (x.shape[0], 2**24, 2**24))
            return x * self.scale[...] + jnp.sin(rows * self.scale[...]).max()

    def linear(seed):
        return nnx.Linear(SIZE, SIZE, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))

    pipeline = fdg.Pipeline(
        [linear(0), Huge(), linear(1)],
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1),
        num_stages=3,
        cuts=(1, 2),
        engine="threads",
    )
    with pytest.raises(Exception, match="(?i)memory|allocat|exhausted") as raised:
        with pipeline:
            for _ in pipeline.train(make_batches(6)):
                pass
    assert any("batch" in note for note in raised.value.__notes__)
    assert not own_threads.left()


@pytest.mark.timeout(120)
def test_a_stage_a_hundred_times_slower_holds_the_others_up_and_no_more():
    drawn = []

    def batches():
        for batch in make_batches(12):
            drawn.append(None)
            yield batch

    pipeline = make_pipeline(lambda: time.sleep(0.1))
    with pipeline:
        window = None
        for read, _ in enumerate(pipeline.train(batches()), 1):
            window = window or pipeline._engine.window
            # What is drawn and not read is bounded, whatever the slow stage does.
            assert len(drawn) - read <= window
            for channel in pipeline._engine._wiring.channels:
                assert channel.most_held <= channel.capacity
    assert read == 12


@pytest.mark.timeout(60)
def test_a_consumer_that_stops_reading_stops_the_drawing():
    drawn = []

    def batches():
        while True:
            drawn.append(None)
            yield BATCHES[0]

    pipeline = fdg.Pipeline(
        oracle.make_network(),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1),
        num_stages=3,
        cuts=(1, 3),
        engine="threads",
    )
    with pipeline:
        metrics = pipeline.train(batches())
        next(metrics)
        count = len(drawn)
        time.sleep(0.5)
        assert len(drawn) == count <= pipeline._engine.window + 1
        next(metrics)
        assert len(drawn) <= count + 1
    assert not own_threads.left()


@pytest.mark.timeout(120)
def test_two_pipelines_in_one_process_do_not_meet():
    def train(seed):
        pipeline = fdg.Pipeline(
            oracle.make_network(seed=seed),
            loss_fn=fdg.softmax_cross_entropy,
            optimizer=optax.sgd(0.1, momentum=0.9),
            num_stages=3,
            cuts=(1, 3),
            engine="threads",
        )
        with pipeline:
            losses = [metrics["loss"] for metrics in pipeline.train(BATCHES)]
        return losses, oracle.values(pipeline.network)

    alone = [train(seed) for seed in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, (0, 1)))
    assert alone[0][0] != alone[1][0]
    for one, other in zip(alone, together, strict=True):
        assert one[0] == other[0]
        for a, b in zip(*map(jax.tree.leaves, (one[1], other[1])), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "engine", ["threads", pytest.param("serial", marks=pytest.mark.slow)]
)
def test_time_in_which_the_process_was_suspended_is_no_stall(engine):
    script = f"""
        import time, jax, test_faults
        jax.config.update("jax_num_cpu_devices", 3)
        pipeline = test_faults.make_pipeline(
            lambda: time.sleep(0.2), engine={engine!r}, stall_timeout=1000.0)
        with pipeline:
            list(pipeline.train(test_faults.make_batches(4)))  # compiled by now
            with pipeline.stall_limit(5.0):
                for metrics in pipeline.train(test_faults.make_batches(20)):
                    print(metrics["batch"], flush=True)
        print("done", flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(8.0)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=150)
    assert (process.returncode, out.split()[-1], err) == (0, "done", "")


def test_a_pipeline_that_nobody_closed_lets_python_end():
    script = """
        import jax, test_faults
        jax.config.update("jax_num_cpu_devices", 3)
        pipeline = test_faults.make_pipeline()
        next(pipeline.train(test_faults.make_batches(20)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
