"""The fused engine: equal to serial to tolerance, in any grouping of batches."""

import jax
import numpy as np
import optax
import pytest

import fdg_jax as fdg
import oracle
from fdg_jax.engines import fused

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CUTS = {1: (), 2: (2,), 3: (1, 3), 4: (1, 2, 3)}


def train(engine, schedule, batches, calls=(None,)):
    pipeline = fdg.Pipeline(
        oracle.make_network(),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1, momentum=0.9),
        num_stages=len(schedule),
        cuts=CUTS[len(schedule)],
        schedule=schedule,
        shrink=0.5,
        engine=engine,
    )
    losses, start = [], 0
    with pipeline:
        for stop in calls:
            losses += [m["loss"] for m in pipeline.train(batches[start:stop])]
            start = stop
        metrics = pipeline.evaluate_metrics(batches[:3])
    return losses, metrics, oracle.values(pipeline.network)


@pytest.mark.parametrize("schedule", [(0,), (1, 0), (5, 3, 1, 0), (4, 4, 0), (3, 0, 0)])
@pytest.mark.parametrize("num_batches", [3, 20])
def test_fused_equals_serial(schedule, num_batches):
    batches = oracle.make_batches(num_batches)
    losses, metrics, values = train("serial", schedule, batches)
    fused_losses, fused_metrics, fused_values = train("fused", schedule, batches)
    assert fused_losses == pytest.approx(losses, rel=1e-10)
    assert fused_metrics == pytest.approx(metrics, rel=1e-10)
    assert oracle.relative_error(fused_values, values) < 1e-10


def test_how_batches_are_grouped_into_calls_changes_nothing():
    batches = oracle.make_batches(2 * fused.STEPS_PER_CALL + 3)
    whole = train("fused", (2, 0), batches)
    pieces = train("fused", (2, 0), batches, calls=(1, 4, 13, None))
    assert pieces[0] == whole[0]
    jax.tree.map(np.testing.assert_array_equal, pieces[2], whole[2])


def test_a_batch_of_another_shape_is_refused():
    batches = [*oracle.make_batches(3), *oracle.make_batches(1, batch_size=5)]
    with pytest.raises(ValueError, match=r"one shape; got .*\[5,6\].* after .*\[8,6\]"):
        train("fused", (1, 0), batches)
