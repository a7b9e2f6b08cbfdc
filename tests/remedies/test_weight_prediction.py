import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax.remedies import actual_params, predict_weights

PARAMS = {"w": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5)}


def follow(optimizer, gradients, params=PARAMS):
    """Parameters after 0, 1, ... updates, and the states."""
    state = optimizer.init(params)
    history = [(params, state)]
    for g in gradients:
        g = jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params)
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_at_a_constant_velocity_the_prediction_comes_true(staleness):
    sgd, gradients = optax.sgd(0.25), [0.5] * 12
    actual = [params for params, _ in follow(sgd, gradients)]
    predicted = [
        params for params, _ in follow(predict_weights(sgd, staleness), gradients)
    ]
    # Before the first update there is no velocity, hence no prediction.
    chex.assert_trees_all_equal(predicted[0], actual[0])
    for t in range(1, len(gradients) + 1 - staleness):
        chex.assert_trees_all_close(
            predicted[t], actual[t + staleness], rtol=1e-14, atol=1e-14
        )


@settings(max_examples=10)
@given(
    st.integers(1, 6),
    st.lists(st.floats(-2, 2), min_size=1, max_size=6),
    st.sampled_from(
        [
            optax.sgd(0.1, momentum=0.9, nesterov=True),
            optax.adamw(0.1, weight_decay=0.1),
            optax.sgd(lambda count: 0.1 / (1 + count)),
        ]
    ),
)
def test_the_optimizer_works_on_the_actual_weights(staleness, gradients, optimizer):
    alone = follow(optimizer, gradients)
    ahead = follow(predict_weights(optimizer, staleness), gradients)
    for t, ((params, state), (expected, _)) in enumerate(
        zip(ahead, alone, strict=True)
    ):
        actual = actual_params(params, state, staleness)
        chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-12)
        before = alone[max(0, t - 1)][0]
        predicted = jax.tree.map(lambda w, b: w + staleness * (w - b), expected, before)
        chex.assert_trees_all_close(params, predicted, rtol=1e-12, atol=1e-12)


def test_arguments_for_the_optimizer_are_passed_on():
    def update(updates, state, params=None, *, factor):
        del params
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    transform = predict_weights(inner, 1)
    params = jnp.ones(2)
    updates, _ = transform.update(params, transform.init(params), params, factor=3.0)
    np.testing.assert_array_equal(updates, 2 * 3.0 * params)


def test_without_parameters_it_says_what_it_needs():
    transform = predict_weights(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match="got params=None; call update"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
