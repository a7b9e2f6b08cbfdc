"""Runs that meet in one program: each trains as it would alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdg_jax as fdg
import oracle
from fdg_jax.engines.together import Together

TIMEOUT = 120  # seconds


def _at_once(together, runs):
    """Calls every function in a thread of its own; returns what they return."""

    def call(run):
        try:
            return run()
        finally:
            together.leave()

    with ThreadPoolExecutor(len(runs)) as pool:
        return [f.result(TIMEOUT) for f in [pool.submit(call, run) for run in runs]]


def _train(seed, num_batches, jit=jax.jit, schedule=(2, 1, 0)):
    """Data, parameters and dropout of a seed; evaluation and a snapshot on the way."""
    batches = oracle.make_batches(num_batches, seed=seed)
    pipeline = fdg.Pipeline(
        oracle.make_network(seed=100 * seed),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1, momentum=0.9),
        num_stages=3,
        cuts=(1, 3),
        schedule=schedule,
        shrink=0.5,
        seed=seed,
        engine="fused",
        jit=jit,
    )
    with pipeline:
        losses = [m["loss"] for m in pipeline.train(batches[:5])]
        losses.append(pipeline.evaluate_metrics(batches[:2])["loss"])
        held = fdg.snapshot.to_arrays(pipeline.snapshot().result())
        losses += [m["loss"] for m in pipeline.train(batches[5:])]
    return losses, jax.device_get(held), oracle.values(pipeline.network)


# The second has a longer and the third a shorter way to go than the first.
@pytest.mark.parametrize(
    "lengths", [pytest.param((20, 20, 20), marks=pytest.mark.slow), (6, 9, 4)]
)
def test_runs_come_out_as_they_do_alone(lengths):
    seeds = [0, 1, 4_000_000_000][: len(lengths)]
    alone = [_train(*pair) for pair in zip(seeds, lengths, strict=True)]
    together = Together(len(seeds))
    runs = [
        lambda pair=pair: _train(*pair, together.jit)
        for pair in zip(seeds, lengths, strict=True)
    ]
    for one, other in zip(_at_once(together, runs), alone, strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-9)
        assert one[1].keys() == other[1].keys()
        for name in one[1]:
            np.testing.assert_allclose(one[1][name], other[1][name], 1e-8, 1e-12)
        assert oracle.relative_error(one[2], other[2]) < 1e-9
    assert len({losses[0] for losses, *_ in alone}) == len(seeds)


def test_calls_that_are_alike_are_made_as_one():
    together, seen = Together(3), []

    def double(x):
        seen.append(jnp.shape(x))
        return 2 * x

    def run(number, size):
        return np.asarray(together.jit(double)(jnp.full(size, number)))

    shapes = [(0, 4), (1, 4), (2, 5)]
    results = _at_once(together, [lambda pair=pair: run(*pair) for pair in shapes])
    for result, (number, size) in zip(results, shapes, strict=True):
        np.testing.assert_array_equal(result, np.full(size, 2 * number))
    assert sorted(seen) == [(4,), (5,)]  # traced once for the two of a shape


def test_nobody_waits_for_a_run_that_has_ended():
    together = Together(2)
    add = together.jit(lambda x: x + 1)
    # Two calls of one run, none of the other.
    results = _at_once(together, [lambda: add(add(jnp.zeros(()))), lambda: None])
    assert results == [2.0, None]


def test_an_error_reaches_every_run_of_the_call():
    together, met = Together(3), threading.Barrier(3)

    def broken(x):
        raise FloatingPointError("no such function")

    def run():
        with pytest.raises(FloatingPointError, match="no such function"):
            together.jit(broken)(jnp.zeros(()))
        met.wait(TIMEOUT)
        return together.jit(jnp.negative)(jnp.ones(()))  # and they can go on

    assert _at_once(together, [run] * 3) == [-1.0] * 3
