"""Every schedule, backward mode and engine against the float64 oracle."""

import itertools

import optax
import pytest

import fdg_jax as fdg
import oracle

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CUTS = {1: (), 2: (2,), 3: (1, 3), 4: (1, 2, 3)}
SCHEDULES = ["bp", "minimal", "reference", "paper"]
CUSTOM = {1: (0,), 2: (4, 0), 3: (3, 3, 0), 4: (5, 2, 2, 0)}
BATCHES = oracle.make_batches(20)


def make_pipeline(num_stages, schedule, shrink, backward, engine, **options):
    return fdg.Pipeline(
        oracle.make_network(),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.chain(
            optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)
        ),
        num_stages=num_stages,
        cuts=CUTS[num_stages],
        schedule=schedule,
        shrink=shrink,
        backward=backward,
        engine=engine,
        **options,
    )


def check(num_stages, schedule, shrink, backward, engine):
    with make_pipeline(num_stages, schedule, shrink, backward, engine) as pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(BATCHES)]
    expected_losses, *expected = oracle.simulate(
        oracle.make_network(),
        BATCHES,
        cuts=CUTS[num_stages],
        staleness=pipeline.schedule.staleness,
        shrink=shrink,
        backward=backward,
    )
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    got = oracle.values(pipeline.network)
    assert oracle.relative_error(got, tuple(expected)) < 1e-10


CASES = [
    pytest.param(num_stages, schedule, shrink, backward, marks=marks)
    for num_stages, shrink, backward in itertools.product(
        CUTS, (1.0, 0.5), ("stored", "recompute", "replay")
    )
    for schedule in [*SCHEDULES, CUSTOM[num_stages]]
    # A beta of 1 tells less than another one.
    for marks in [[pytest.mark.slow] if shrink == 1.0 else []]
]


@pytest.mark.parametrize(("num_stages", "schedule", "shrink", "backward"), CASES)
def test_serial_equals_the_oracle(num_stages, schedule, shrink, backward):
    check(num_stages, schedule, shrink, backward, "serial")


@pytest.mark.parametrize("engine", ["threads", "fused"])
@pytest.mark.parametrize(
    ("num_stages", "schedule", "backward"),
    [
        (1, "bp", "stored"),
        (2, "reference", "recompute"),
        (3, "paper", "stored"),
        (3, (3, 3, 0), "replay"),
        (4, "minimal", "replay"),
        (4, (5, 2, 2, 0), "recompute"),
        *(
            pytest.param(4, schedule, "stored", marks=pytest.mark.slow)
            for schedule in ("reference", "bp")
        ),
    ],
)
def test_the_other_engines_equal_the_oracle(engine, num_stages, schedule, backward):
    check(num_stages, schedule, 0.5, backward, engine)


@pytest.mark.parametrize("engine", ["serial", "fused"])
def test_the_running_pipeline_shows_the_weights_of_its_next_forward(engine):
    with make_pipeline(3, "paper", 0.5, "stored", engine) as pipeline:
        list(pipeline.train(BATCHES[:13]))
        running = oracle.values(pipeline.network)
    _, *expected = oracle.simulate(
        oracle.make_network(),
        BATCHES[:13],
        cuts=CUTS[3],
        staleness=(4, 2, 0),
        shrink=0.5,
        num_snapshot=13,
    )
    assert oracle.relative_error(running, tuple(expected)) < 1e-10
