import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax.remedies import nesterov_lookahead, stage_momentum
from fdg_jax.stage import StageInfo


def follow(transform, gradients, params):
    """The parameters before and after every update."""
    state, history = transform.init(params), [params]
    for gradient in gradients:
        updates, state = transform.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return [float(p) for p in history]


GRADIENTS = st.lists(st.floats(-3, 3), min_size=1, max_size=8)


@settings(max_examples=15)
@given(st.floats(0, 0.999), GRADIENTS, st.booleans())
def test_the_parameters_are_the_look_ahead_point_of_two_sequences(
    gamma, gradients, scheduled
):
    def rate(count):
        return 0.5 / (1 + count) if scheduled else 0.5

    w = before = 2.0
    ahead = []
    for t, g in enumerate(gradients):
        y = w + gamma * (w - before)
        ahead.append(y)
        before, w = w, y - rate(t) * (1 - gamma) * g
    ahead.append(w + gamma * (w - before))
    transform = nesterov_lookahead(rate if scheduled else 0.5, gamma)
    got = follow(transform, gradients, jnp.asarray(2.0))
    np.testing.assert_allclose(got, ahead, rtol=1e-12, atol=1e-13)


@settings(max_examples=10)
@given(st.floats(0, 0.999), GRADIENTS)
def test_at_a_constant_learning_rate_it_is_optax_sgd(gamma, gradients):
    sgd = optax.sgd(0.5 * (1 - gamma), momentum=gamma, nesterov=True)
    np.testing.assert_allclose(
        follow(nesterov_lookahead(0.5, gamma), gradients, jnp.asarray(2.0)),
        follow(sgd, gradients, jnp.asarray(2.0)),
        rtol=1e-12,
        atol=1e-13,
    )


def test_the_momentum_of_a_stage_grows_with_its_distance_from_the_last():
    momenta = [stage_momentum(StageInfo(k, 4, 0), 0.9, 0.98) for k in range(4)]
    assert momenta == pytest.approx([0.96, 0.94, 0.92, 0.9], rel=1e-14)


def test_a_momentum_outside_its_range_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"in \[0, 1\); got 1.0"):
        nesterov_lookahead(0.1, 1.0)
