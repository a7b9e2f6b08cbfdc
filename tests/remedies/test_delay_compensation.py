import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax.remedies import compensate_delay, compensate_delay_adaptively

BOTH = pytest.mark.parametrize(
    "compensate", [compensate_delay, compensate_delay_adaptively]
)


@pytest.mark.parametrize("staleness", [1, 3])
def test_a_quadratic_whose_hessian_is_the_estimate_is_compensated_exactly(staleness):
    curvature = 0.8
    minimum = jnp.asarray([1.0, -2.0, 0.5])
    # As far from the minimum everywhere, so that g * g is the same everywhere.
    forward = minimum + jnp.asarray([0.3, -0.3, 0.3])
    gradient = curvature * (forward - minimum)
    transform = compensate_delay(staleness, curvature / 0.24**2)
    state = transform.init(forward)
    today = forward
    for _ in range(staleness):
        today = today + 0.1
        # Gradients of other batches come in meanwhile.
        _, state = transform.update(jnp.zeros(3), state, today)
    # The ring's oldest entry is now that of the first call.
    compensated, _ = transform.update(gradient, state, today + 0.25)
    moved = today + 0.25 - (forward + 0.1)
    np.testing.assert_allclose(compensated, gradient + curvature * moved, rtol=1e-12)
    expected = curvature * (forward + moved - minimum)
    np.testing.assert_allclose(compensated, expected, rtol=1e-12)


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 99))
def test_the_forwards_weights_are_those_of_so_many_calls_ago(staleness, calls, seed):
    rng = np.random.default_rng(seed)
    history = rng.normal(size=(calls, 2))
    transform = compensate_delay(staleness, 1.0)
    state = transform.init(jnp.asarray(history[0]))
    for t, params in enumerate(history):
        got, state = transform.update(jnp.ones(2), state, jnp.asarray(params))
        expected = 1.0 + params - history[max(0, t - staleness)]
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)


def test_adaptive_strength_forgets_the_size_of_gradients():
    # Where the mean is only of this gradient, strength / |g| * g * g = strength * |g|.
    transform = compensate_delay_adaptively(1, strength=0.5, decay=0.0, eps=1e-30)
    state = transform.init(jnp.zeros(3))
    gradient = jnp.asarray([-3.0, 0.5, 2.0])
    got, _ = transform.update(gradient, state, jnp.asarray([1.0, -2.0, 3.0]))
    np.testing.assert_allclose(got, [-1.5, 0.0, 5.0], rtol=1e-12, atol=1e-13)


@BOTH
def test_strength_zero_changes_nothing(compensate):
    params, gradient = {"w": jnp.asarray([1.0, 2.0])}, {"w": jnp.asarray([-3.0, 0.1])}
    transform = compensate(2, 0.0)
    state = transform.init(jax.tree.map(jnp.zeros_like, params))
    updates, _ = transform.update(gradient, state, params)
    chex.assert_trees_all_equal(updates, gradient)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_types_and_structure_are_kept(compensate, dtype):
    params = [{"w": jnp.ones((2, 3), dtype)}, jnp.ones((), dtype)]
    transform = compensate(3)
    state = transform.init(params)
    updates, new = jax.jit(transform.update)(params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@BOTH
@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan")])
def test_a_strength_outside_its_range_is_refused_with_its_value(compensate, strength):
    with pytest.raises(ValueError, match=f">= 0; got {strength}; 0 compensates"):
        compensate(1, strength)


def test_numbers_of_the_moving_mean_are_refused_with_their_values():
    with pytest.raises(ValueError, match="got decay=1.0, eps=1e-07"):
        compensate_delay_adaptively(1, decay=1.0)


@BOTH
def test_without_parameters_it_says_what_it_needs(compensate):
    transform = compensate(1)
    with pytest.raises(ValueError, match="got params=None; call update"):
        transform.update(jnp.ones(2), transform.init(jnp.ones(2)))
