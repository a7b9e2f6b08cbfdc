import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax.remedies import scale_by_spike_compensation, spike_compensated_sgd


def respond(transform, gradients):
    """The updates to a sequence of scalar gradients."""
    state, updates = transform.init(jnp.zeros(())), []
    for gradient in gradients:
        update, state = transform.update(jnp.asarray(gradient), state)
        updates.append(float(update))
    return updates


@settings(max_examples=15)
@given(st.floats(0, 0.99), st.integers(0, 8))
def test_from_its_arrival_on_a_late_gradient_has_done_what_a_timely_one_has(m, late):
    length = late + 6
    timely = respond(optax.trace(m), [1.0] + [0.0] * (length - 1))
    gradients = [0.0] * late + [1.0] + [0.0] * (length - late - 1)
    compensated = respond(scale_by_spike_compensation(m, late), gradients)
    assert compensated[:late] == [0.0] * late
    np.testing.assert_allclose(
        list(itertools.accumulate(compensated))[late:],
        list(itertools.accumulate(timely))[late:],
        rtol=1e-12,
    )


def test_one_update_late_it_is_nesterovs_momentum():
    gradients = [1.0, -2.0, 0.5, 3.0]
    np.testing.assert_allclose(
        respond(scale_by_spike_compensation(0.7, 1), gradients),
        respond(optax.trace(0.7, nesterov=True), gradients),
        rtol=1e-14,
    )


def test_the_learning_rate_may_be_a_schedule():
    def rate(count):
        return 1.0 / (1 + count)

    gradients = [1.0, -2.0, 0.5]
    steps = respond(spike_compensated_sgd(rate, 0.7, 2), gradients)
    directions = respond(scale_by_spike_compensation(0.7, 2), gradients)
    expected = [-d / (1 + t) for t, d in enumerate(directions)]
    np.testing.assert_allclose(steps, expected, rtol=1e-12)


@pytest.mark.parametrize("momentum", [1.0, -0.1, float("nan")])
def test_a_momentum_outside_its_range_is_refused_with_its_value(momentum):
    with pytest.raises(ValueError, match=rf"in \[0, 1\); got {momentum}"):
        scale_by_spike_compensation(momentum, 1)
