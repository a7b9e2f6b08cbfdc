"""Methods stopped between two updates go on bit for bit, in either exact engine."""

import functools

import jax
import method_oracles
import numpy as np
import optax
import pytest

import fdg_jax as fdg
import oracle
from configs import digits
from fdg_jax import checkpoint, training
from fdg_jax import snapshot as snapshots
from fdg_jax.stopping import Stopped, Stopping

BATCHES = oracle.make_batches(11)
IMAGES = method_oracles.make_image_batches(11)

# Where batches make an update by fours, 4 and 8 are its ends; 6 lies amidst one.
NUMBERS = (4, 5, 6, 7)
METHODS = ["gpipe", "adl", "dgl", "dp"]


def batches_of(method):
    return IMAGES if method == "dgl" else BATCHES


def make_pipeline(method, engine):
    arguments = fdg.methods.get(method).arguments(2 if method in ("dgl", "dp") else 3)
    images = method == "dgl"
    network = method_oracles.make_image_network if images else oracle.make_network
    pipeline = fdg.Pipeline(
        network(num_blocks=3),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.chain(optax.add_decayed_weights(1e-3), optax.adam(1e-2)),
        cuts=tuple(range(1, arguments["num_stages"])),
        engine=engine,
        seed=3,
        **arguments,
    )
    pipeline.build(batches_of(method)[0])
    return pipeline


def states_of(pipeline):
    """All that the stages carry in the end, heads and accumulated gradients too."""
    return jax.device_get([s.state for s in pipeline.snapshot().result().stages])


@functools.cache
def uninterrupted(method, engine):
    """(losses, states at the end, {n: snapshot before batch n, as arrays})."""
    batches, losses, taken, start = batches_of(method), [], {}, 0
    with make_pipeline(method, engine) as pipeline:
        for stop in (*NUMBERS, len(batches)):
            losses += [m["loss"] for m in pipeline.train(batches[start:stop])]
            if stop in NUMBERS:
                snapshot = pipeline.snapshot().result()
                arrays = snapshots.to_arrays(snapshot)
                copies = {name: np.array(array) for name, array in arrays.items()}
                taken[stop] = (copies, snapshot.lengths())
            start = stop
    return losses, states_of(pipeline), taken


def go_on(method, engine, number, arrays, lengths):
    pipeline, batches = make_pipeline(method, engine), batches_of(method)
    like = pipeline.abstract_snapshot(batches[0], number, lengths)
    pipeline.restore(snapshots.from_arrays(arrays, like))
    with pipeline:
        losses = [m["loss"] for m in pipeline.train(batches[number:])]
    return losses, states_of(pipeline)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("first", "second", "number"),
    [
        ("serial", "threads", 5),
        ("threads", "serial", 6),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("serial", "serial", 7),
                ("threads", "threads", 6),
                ("threads", "serial", 4),
            ]
        ),
    ],
)
def test_a_stopped_method_goes_on_bit_for_bit(method, first, second, number):
    losses, states, _ = uninterrupted(method, "serial")
    *_, taken = uninterrupted(method, first)
    got = go_on(method, second, number, *taken[number])
    assert got[0] == losses[number:]
    jax.tree.map(np.testing.assert_array_equal, got[1], states)


def test_a_snapshot_amidst_a_window_of_gpipe_holds_the_window():
    *_, taken = uninterrupted("gpipe", "threads")
    for number in NUMBERS:
        held = number % 4
        # Of stages 0 and 1 the stash, of stage 2 the cotangents, for nothing else.
        assert taken[number][1] == [[held, 0], [held, 0], [0, held]]


@pytest.mark.parametrize("engine", ["serial", "threads"])
def test_a_window_of_gpipe_that_was_cut_short_may_be_gone_on_with(engine):
    """Closing applies no update early: the next batches complete the window."""
    with make_pipeline("gpipe", engine) as pipeline:
        losses = [m["loss"] for m in pipeline.train(BATCHES[:6])]
        pipeline.close()
        losses += [m["loss"] for m in pipeline.train(BATCHES[6:])]
    expected, states, _ = uninterrupted("gpipe", "serial")
    assert losses == expected
    jax.tree.map(np.testing.assert_array_equal, states_of(pipeline), states)


# --- from a config -----------------------------------------------------------------


class StopAt(Stopping):
    """Asks to stop once so many batches have been drawn."""

    def __init__(self, count):
        super().__init__(seconds=60)
        self._left = count

    @property
    def signal(self):
        self._left -= 1
        return 15 if self._left < 0 else None

    @signal.setter
    def signal(self, value):
        pass


def config_of(method):
    config = digits.get_config()
    config.update(
        method=method,
        num_epochs=1,
        learning_rate_milestones=(),
        progress=False,
        batch_size=128,
        log_every_steps=5,
        snapshot_every_minutes=0.0,
    )
    return config


@pytest.mark.parametrize(
    "method",
    ["gpipe", *(pytest.param(m, marks=pytest.mark.slow) for m in ("dp", "dgl"))],
)
def test_a_run_of_a_method_is_stopped_and_gone_on_with(tmp_path, method):
    config = config_of(method)
    with pytest.raises(Stopped) as stopped:
        training.run(training.prepare(config, tmp_path / "parts"), StopAt(6))
    # Batches are pieces of 32 in GPipe, so the sixth lies amidst the second window.
    assert stopped.value.step == 6
    got = training.train_and_evaluate(config, tmp_path / "parts")
    expected = training.train_and_evaluate(config, tmp_path / "whole")
    assert got["method"] == method
    piece = 32 if method == "gpipe" else 128
    assert got["steps"] == expected["steps"] == 1437 // piece
    assert got["final_test_accuracy"] == expected["final_test_accuracy"]
    networks = [
        checkpoint.network_arrays(fdg.load(tmp_path / name)[0])
        for name in ("parts", "whole")
    ]
    assert networks[0].keys() == networks[1].keys()
    for name, array in networks[0].items():
        np.testing.assert_array_equal(array, networks[1][name])
