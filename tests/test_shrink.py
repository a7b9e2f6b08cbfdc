import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdg_jax import shrink


def _gradients(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(3, 2)), dtype),
        "b": [jnp.asarray(rng.normal(size=2), dtype)],
    }


@pytest.mark.parametrize("power", range(4))
@pytest.mark.parametrize("beta", [0.2, 0.7, 1.0])
def test_gradients_are_scaled_by_beta_to_the_power(beta, power):
    gradients = _gradients()
    transform = shrink.shrink_gradients(beta, power)
    updates, _ = transform.update(gradients, transform.init(gradients))
    # In float64 the factor, a Python float, is not rounded once more.
    expected = jax.tree.map(lambda g: np.asarray(g) * beta**power, gradients)
    chex.assert_trees_all_equal(updates, expected)


def test_a_schedule_is_read_at_the_number_of_updates_so_far():
    gradients = _gradients()
    transform = shrink.shrink_gradients(lambda count: 1 / (1 + count), power=2)
    state = transform.init(gradients)
    for count in range(4):
        assert state.count == count
        updates, state = jax.jit(transform.update)(gradients, state)
        expected = jax.tree.map(lambda g, c=count: g / (1 + c) ** 2, gradients)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_an_optax_schedule_changes_beta_at_its_boundary():
    beta = optax.piecewise_constant_schedule(1.0, {2: 0.5})
    transform = shrink.shrink_gradients(beta, power=3)
    gradient, state, factors = jnp.ones(()), transform.init(None), []
    for _ in range(4):
        update, state = transform.update(gradient, state)
        factors.append(float(update))
    assert factors == [1.0, 1.0, 0.125, 0.125]


@pytest.mark.parametrize(
    "beta",
    [0.5, lambda count: jnp.full_like(count, 0.5, jnp.float64)],
    ids=["constant", "schedule"],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_type_of_a_gradient_is_kept(dtype, beta):
    gradients = _gradients(dtype)
    transform = shrink.shrink_gradients(beta, 2)
    updates, state = transform.update(gradients, transform.init(gradients))
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)
    assert state.count.dtype == jnp.int32


def test_the_state_keeps_its_structure_under_scan():
    transform = shrink.shrink_gradients(0.5, 1)
    state = transform.init(None)

    def step(state, gradient):
        update, state = transform.update(gradient, state)
        return state, update

    state, updates = jax.lax.scan(step, state, jnp.ones(5))
    assert state.count == 5
    np.testing.assert_array_equal(updates, 0.5)


def test_scaling_gradients_equals_shrinking_the_cotangent_at_every_cut():
    beta, num_stages = 0.3, 3
    rng = np.random.default_rng(1)
    weights = [jnp.asarray(rng.normal(size=(4, 4))) for _ in range(num_stages)]
    x = jnp.asarray(rng.normal(size=(5, 4)))

    def stage(w, x):
        return jnp.tanh(x @ w) + x**2

    def network(weights):
        y = x
        for w in weights:
            y = stage(w, y)
        return jnp.sum(jnp.sin(y))

    vjps, y = [], x
    for w in weights:
        y, vjp = jax.vjp(stage, w, y)
        vjps.append(vjp)
    cotangent, by_cotangents = jnp.cos(y), []
    for vjp in reversed(vjps):
        gradient, cotangent = vjp(cotangent)
        by_cotangents.insert(0, gradient)
        cotangent = beta * cotangent

    for k, gradient in enumerate(jax.grad(network)(weights)):
        transform = shrink.shrink_gradients(beta, num_stages - 1 - k)
        update, _ = transform.update(gradient, transform.init(weights[k]))
        np.testing.assert_allclose(update, by_cotangents[k], rtol=1e-12, atol=1e-14)


def test_weight_decay_chained_after_is_not_shrunk():
    params, gradients = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 0.25])
    transform = optax.chain(
        shrink.shrink_gradients(0.5, 3),
        optax.add_decayed_weights(0.1),
        optax.sgd(0.01),
    )
    updates, _ = transform.update(gradients, transform.init(params), params)
    expected = -0.01 * (0.5**3 * gradients + 0.1 * params)
    np.testing.assert_allclose(updates, expected, rtol=1e-14)


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_beta_outside_its_range_is_refused_with_rule_and_value(beta):
    with pytest.raises(ValueError, match=rf"in \(0, 1\]; got {beta};"):
        shrink.shrink_gradients(beta, 1)


def test_a_negative_power_is_refused_with_its_value():
    with pytest.raises(ValueError, match="cannot be negative; got -1"):
        shrink.shrink_gradients(0.5, -1)
