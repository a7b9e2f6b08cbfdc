"""The threads engine with real stages: bitwise equal to serial, however it is timed."""

import random
import time

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fdg_jax as fdg
import oracle
from fdg_jax.stage import Stage

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BATCHES = oracle.make_batches(12, dtype=np.float32)


@pytest.fixture
def sleepy_stages(monkeypatch):
    """Makes every compiled function of every stage start at a random time."""
    for name in ("forward", "backward", "update", "loss_step", "evaluate"):
        original = getattr(Stage, name)

        def sleepy(*args, original=original):
            time.sleep(random.random() * 0.004)
            return original(*args)

        monkeypatch.setattr(Stage, name, sleepy)


def train(engine, num_stages, schedule, capacity, backward="stored"):
    pipeline = fdg.Pipeline(
        oracle.make_network(dtype=np.float32),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1, momentum=0.9),
        num_stages=num_stages,
        cuts=tuple(range(1, num_stages)),
        schedule=schedule,
        shrink=0.7,
        backward=backward,
        engine=engine,
        channel_capacity=capacity,
    )
    with pipeline:
        metrics = list(pipeline.train(BATCHES[:8]))
        metrics.append(pipeline.evaluate_metrics(BATCHES[:2]))
        metrics += pipeline.train(BATCHES[8:])
    return metrics, jax.tree.leaves(oracle.values(pipeline.network))


def assert_same_bits(one, other):
    assert one[0] == other[0]
    for a, b in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(a, b)


staleness_tuples = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(
    lambda values: (*sorted(values, reverse=True), 0)
)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("sleepy_stages")
@settings(max_examples=6)
@given(
    staleness_tuples,
    st.integers(1, 3),
    st.sampled_from(["stored", "recompute", "replay"]),
)
def test_threads_equal_serial_bit_for_bit(schedule, capacity, backward):
    arguments = (len(schedule), schedule, capacity, backward)
    assert_same_bits(train("threads", *arguments), train("serial", *arguments))


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("sleepy_stages")
@pytest.mark.parametrize("schedule", ["bp", "minimal", "reference", "paper"])
def test_named_schedules_are_bitwise_equal_on_every_run(schedule):
    reference = train("serial", 4, schedule, 2)
    for _ in range(3):
        assert_same_bits(train("threads", 4, schedule, 2), reference)


def test_stages_work_on_devices_of_their_own():
    pipeline = fdg.Pipeline(
        oracle.make_network(),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1),
        num_stages=4,
        cuts=(1, 2, 3),
        engine="threads",
    )
    seen = {}
    original = Stage.update

    def spy(stage, state, grads):
        arrays = jax.tree.leaves((state, grads))
        seen.setdefault(stage.index, set()).update(*(a.devices() for a in arrays))
        return original(stage, state, grads)

    with pytest.MonkeyPatch.context() as patch, pipeline:
        patch.setattr(Stage, "update", spy)
        list(pipeline.train(oracle.make_batches(6)))
    assert seen == {k: {jax.devices()[k]} for k in range(4)}
