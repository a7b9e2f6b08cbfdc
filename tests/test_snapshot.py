"""Snapshots of a moving pipeline: nothing is lost, and not one bit changes."""

import itertools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import fdg_jax as fdg
from fdg_jax import snapshot as snapshots
from fdg_jax.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NUM_BATCHES = 14


def _batch(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.standard_normal((6, 5)).astype(np.float32),
        "label": random.integers(0, 4, 6).astype(np.int32),
    }


BATCHES = [_batch(n) for n in range(NUM_BATCHES)]


class Dense(nnx.Module):
    """A block with statistics and with randomness of its own."""

    def __init__(self, width_in, width_out, seed):
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(
            width_in, width_out, param_dtype=np.float32, dtype=np.float32, rngs=rngs
        )
        self.norm = nnx.BatchNorm(
            width_out, dtype=np.float32, param_dtype=np.float32, rngs=rngs
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.linear(x))))


def _pipeline(engine="serial", schedule=(3, 1, 0), backward="stored"):
    sizes = [5, 7, 6, 6, 4]
    network = [Dense(a, b, i) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    pipeline = fdg.Pipeline(
        network,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.chain(optax.add_decayed_weights(1e-3), optax.adam(1e-2)),
        num_stages=len(schedule),
        cuts=tuple(range(1, len(schedule))),
        schedule=schedule,
        shrink=0.5,
        backward=backward,
        engine=engine,
        seed=3,
    )
    pipeline.build(BATCHES[0])
    return pipeline


def _values(pipeline):
    state = nnx.state(pipeline.network, nnx.Not(nnx.RngState))
    return jax.device_get(jax.tree.leaves(state))


def _assert_same(got, expected, tolerance=0.0):
    for a, b in zip(got, expected, strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def _uninterrupted(**options):
    with _pipeline(**options) as pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(BATCHES)]
    return losses, _values(pipeline)


def _interrupted(at, first, second, **options):
    """Trains, with a snapshot asked for in between, and goes on elsewhere from it."""
    pipeline = _pipeline(engine=first, **options)
    pending, losses = None, []
    for metrics in pipeline.train(BATCHES):
        losses.append(metrics["loss"])
        if pending is None and len(losses) > at:
            pending = pipeline.snapshot()
    snapshot = pending.result()
    arrays = {
        name: np.array(array) for name, array in snapshots.to_arrays(snapshot).items()
    }
    assert snapshot.batch == pending.batch
    number, lengths = snapshot.batch, snapshot.lengths()
    pipeline.abort()
    other = _pipeline(engine=second, **options)
    like = other.abstract_snapshot(BATCHES[0], number, lengths)
    other.restore(snapshots.from_arrays(arrays, like))
    losses = losses[:number]
    with other:
        losses += [metrics["loss"] for metrics in other.train(BATCHES[number:])]
    return losses, _values(other)


@pytest.mark.parametrize(
    ("schedule", "backward"),
    [
        ((3, 1, 0), "stored"),
        ((5, 2, 2, 0), "recompute"),
        *(
            pytest.param(schedule, backward, marks=pytest.mark.slow)
            for schedule in [(3, 1, 0), (4, 2, 0), (0, 0, 0), (5, 2, 2, 0)]
            for backward in ["stored", "recompute", "replay"]
        ),
    ],
)
def test_threads_go_on_bit_for_bit(schedule, backward):
    options = {"schedule": schedule, "backward": backward}
    expected = _uninterrupted(**options)
    for at in (0, 3):
        losses, values = _interrupted(at, "threads", "threads", **options)
        assert losses == expected[0]
        _assert_same(values, expected[1])


@pytest.mark.parametrize("engines", [("threads", "serial"), ("serial", "threads")])
def test_serial_and_threads_go_on_from_each_other(engines):
    expected = _uninterrupted(schedule=(4, 2, 0))
    losses, values = _interrupted(2, *engines, schedule=(4, 2, 0))
    assert losses == expected[0]
    _assert_same(values, expected[1])


@pytest.mark.parametrize(
    ("schedule", "engines", "at"),
    [
        ((3, 1, 0), ("fused", "threads"), 2),
        ((5, 2, 2, 0), ("serial", "fused"), 0),
        *(
            pytest.param(schedule, engines, at, marks=pytest.mark.slow)
            for schedule in [(3, 1, 0), (5, 2, 2, 0), (1, 1, 0), (2, 0)]
            for engines in [("fused", "threads"), ("serial", "fused")]
            for at in (0, 2)
        ),
    ],
)
def test_fused_goes_on_within_its_tolerance(schedule, engines, at):
    expected = _uninterrupted(schedule=schedule)
    losses, values = _interrupted(at, *engines, schedule=schedule)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-4)
    _assert_same(values, expected[1], tolerance=2e-4)


@pytest.mark.parametrize("engine", ["serial", "threads", "fused"])
def test_a_snapshot_before_the_first_batch_is_the_start(engine):
    expected = _uninterrupted(engine=engine)
    pipeline = _pipeline(engine=engine)
    snapshot = pipeline.snapshot().result()
    assert snapshot.batch == 0 and snapshot.lengths() == [[0, 0]] * 3
    arrays = jax.device_get(snapshots.to_arrays(snapshot))
    other = _pipeline(engine=engine)
    like = other.abstract_snapshot(BATCHES[0], 0, snapshot.lengths())
    other.restore(snapshots.from_arrays(arrays, like))
    with other:
        losses = [metrics["loss"] for metrics in other.train(BATCHES)]
    assert losses == expected[0]
    _assert_same(_values(other), expected[1])


@pytest.mark.parametrize("engine", ["serial", "threads", "fused"])
def test_a_restored_pipeline_can_be_closed_or_taken_again_at_once(engine):
    """What was in flight is applied, or is still there, without a further batch."""
    pipeline = _pipeline(engine=engine)
    for _ in pipeline.train(BATCHES[:5]):
        pass
    first = pipeline.snapshot().result()
    arrays = jax.device_get(snapshots.to_arrays(first))
    pipeline.close()
    other = _pipeline(engine=engine)
    like = other.abstract_snapshot(BATCHES[0], 5, first.lengths())
    other.restore(snapshots.from_arrays(arrays, like))
    again = jax.device_get(snapshots.to_arrays(other.snapshot().result()))
    assert arrays.keys() == again.keys()
    _assert_same([again[name] for name in arrays], arrays.values())
    for _ in other.train([]):
        pass
    other.evaluate_metrics(BATCHES[:1])  # starts the engine
    once_more = jax.device_get(snapshots.to_arrays(other.snapshot().result()))
    _assert_same([once_more[name] for name in arrays], arrays.values())
    other.close()
    _assert_same(_values(other), _values(pipeline))


@settings(max_examples=8)
@given(
    staleness=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    number=st.integers(0, 9),
    capacity=st.integers(1, 3),
)
def test_the_cut_is_where_the_schedule_says(staleness, number, capacity):
    """Lengths from the theory: min(n, s_k) in the stash, the rest on the way up."""
    schedule = (*sorted(staleness, reverse=True), 0)
    with _pipeline(engine="threads", schedule=schedule) as pipeline:
        pipeline._capacity = capacity
        for _ in pipeline.train(BATCHES[:number]):
            pass
        snapshot = pipeline.snapshot().result()
    assert snapshot.batch == number
    held = [min(number, s) for s in schedule]
    on_the_way = [0] + [a - b for a, b in zip(held, held[1:], strict=False)]
    assert snapshot.lengths() == [
        list(pair) for pair in zip(held, on_the_way, strict=True)
    ]
    for taken, s in zip(snapshot.stages, schedule, strict=True):
        assert int(taken.state.batch.number) == number
        count = optax.tree_utils.tree_get(taken.state.opt_state[0], "count")
        assert int(count) == max(0, number - s)


def test_snapshots_do_not_change_what_is_trained():
    expected = _uninterrupted(engine="threads")
    with _pipeline(engine="threads") as pipeline:
        losses = []
        for metrics in pipeline.train(BATCHES):
            losses.append(metrics["loss"])
            pipeline.snapshot()
    assert losses == expected[0]
    _assert_same(_values(pipeline), expected[1])


def test_a_snapshot_of_another_pipeline_is_refused():
    pipeline = _pipeline()
    snapshot = pipeline.snapshot().result()
    arrays = jax.device_get(snapshots.to_arrays(snapshot))
    like = pipeline.abstract_snapshot(BATCHES[0], 0, snapshot.lengths())
    name = next(name for name in arrays if name.endswith("kernel"))
    with pytest.raises(ValueError, match=f"it lacks {name}"):
        snapshots.from_arrays({n: a for n, a in arrays.items() if n != name}, like)
    with pytest.raises(ValueError, match="it has, which this pipeline has not, more"):
        snapshots.from_arrays({**arrays, "more": np.zeros(3)}, like)
    with pytest.raises(
        ValueError, match=r"float32\[2\] where float32\[5,7\] is needed"
    ):
        snapshots.from_arrays({**arrays, name: np.zeros(2, np.float32)}, like)


def test_arrays_without_elements_need_no_place_on_disk():
    pipeline = _pipeline()
    taken = pipeline.snapshot().result()
    stage = taken.stages[0]
    empty = stage._replace(sent=(np.zeros((0, 3), np.float32),))
    snapshot = Snapshot(0, (empty, *taken.stages[1:]))
    arrays = jax.device_get(snapshots.to_arrays(snapshot))
    assert all(array.size for array in arrays.values())
    back = snapshots.from_arrays(arrays, snapshot)
    assert back.stages[0].sent[0].shape == (0, 3)


def test_restoring_is_for_a_pipeline_that_has_not_begun():
    pipeline = _pipeline()
    snapshot = pipeline.snapshot().result()
    next(iter(pipeline.train(BATCHES)))
    with pytest.raises(RuntimeError, match="before it trains"):
        pipeline.restore(snapshot)
    pipeline.abort()
    pipeline.restore(snapshot)  # which is not for what was aborted, but for all of it
    assert len(list(pipeline.train(BATCHES))) == len(BATCHES)
    pipeline.close()


@pytest.mark.parametrize("engine", ["serial", "threads", "fused"])
def test_a_snapshot_of_an_idle_pipeline_outlives_what_follows(engine):
    pipeline = _pipeline(engine=engine)
    snapshot = pipeline.snapshot().result()
    before = jax.device_get(snapshots.to_arrays(snapshot))
    with pipeline:
        for _ in pipeline.train(BATCHES[:6]):
            pass
    after = jax.device_get(snapshots.to_arrays(snapshot))
    _assert_same([after[name] for name in before], before.values())
