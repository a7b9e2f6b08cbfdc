import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax import residuals
from fdg_jax.models.activation import relu

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Every array has a shape of its own, so that a shape tells which array is kept.
BATCH, WIDTHS = 3, (5, 7, 11)


def _network(params, x):
    for layer in params:
        bias = jnp.broadcast_to(layer["b"], (len(x), len(layer["b"])))
        x = jnp.tanh(x @ layer["w"] + bias)
    return x


def _values():
    rng = np.random.default_rng(0)
    params = [
        {
            "w": jnp.asarray(rng.normal(size=(a, b))),
            "b": jnp.asarray(rng.normal(size=b)),
        }
        for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)
    ]
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[0])))
    cotangent = jnp.asarray(rng.normal(size=(BATCH, WIDTHS[-1])))
    return params, x, cotangent


@functools.partial(jax.jit, static_argnums=0)
def _forward(function, params, x):
    y, vjp = jax.vjp(function, params, x)
    return y, residuals.pack(vjp, (params, x))


@jax.jit
def _backward(kept, params, x, cotangent):
    return residuals.unpack(kept, jax.tree.leaves((params, x)))(cotangent)


@pytest.mark.parametrize(
    "function",
    [_network, jax.checkpoint(_network), lambda params, x: _network(params, x**2)],
    ids=["plain", "checkpointed", "computed_input"],
)
def test_two_compiled_functions_give_the_gradients_of_one_vjp(function):
    params, x, cotangent = _values()
    y, kept = _forward(function, params, x)
    expected_y, vjp = jax.vjp(function, params, x)
    chex.assert_trees_all_close(y, expected_y, rtol=1e-13)
    chex.assert_trees_all_close(
        _backward(kept, params, x, cotangent), vjp(cotangent), rtol=1e-12, atol=1e-15
    )


def test_gradients_pass_through_a_scan():
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=(4, 5, 5)))
    x, cotangent = (jnp.asarray(rng.normal(size=(BATCH, 5))) for _ in range(2))

    def function(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]

    _, kept = _forward(function, weights, x)
    _, vjp = jax.vjp(function, weights, x)
    chex.assert_trees_all_close(
        _backward(kept, weights, x, cotangent), vjp(cotangent), rtol=1e-12
    )


def test_weights_and_input_are_not_kept():
    params, x, _ = _values()
    _, kept = _forward(_network, params, x)
    inputs = {leaf.shape for leaf in jax.tree.leaves((params, x))}
    assert kept.kept
    assert inputs.isdisjoint({array.shape for array in kept.kept})


def test_without_the_inputs_to_hand_they_are_kept():
    params, x, _ = _values()

    @jax.jit
    def forward(params, x):
        return residuals.pack(jax.vjp(_network, params, x)[1], ())

    shapes = {array.shape for array in forward(params, x).kept}
    assert {x.shape, params[0]["w"].shape, params[1]["w"].shape} <= shapes


def test_positions_point_at_inputs_first_and_then_at_what_is_kept():
    a, b, c, d = (jnp.full(n, float(n)) for n in (1, 2, 3, 4))
    closure = jax.tree_util.Partial(lambda *arrays: arrays, c, a, d, b)
    packed = residuals.pack(closure, {"a": a, "b": b})
    assert packed.positions == (2, 0, 3, 1)
    assert packed.kept[0] is c
    assert packed.kept[1] is d


def test_an_array_that_the_closure_holds_twice_is_kept_once():
    a, b = jnp.ones(2), jnp.ones(3)
    closure = jax.tree_util.Partial(lambda *arrays: arrays, b, a, b, b)
    packed = residuals.pack(closure, a)
    assert len(packed.kept) == 1
    assert [array.shape for array in residuals.unpack(packed, [a])()] == [
        (3,),
        (2,),
        (3,),
        (3,),
    ]


@pytest.mark.parametrize("wanted", [True, False])
def test_an_output_that_the_backward_wants_is_not_kept(wanted):
    params, x, cotangent = _values()
    params, cotangent = params[0], cotangent[:, :7]

    def function(params, x):
        y = relu(x @ params["w"])
        return y if wanted else y + 1.0

    @jax.jit
    def forward(params, x):
        y, vjp = jax.vjp(function, params, x)
        return y, residuals.pack(vjp, (params, x, y))

    y, kept = forward(params, x)
    assert [array.shape for array in kept.kept] == ([] if wanted else [y.shape])
    at_hand = residuals.needed(kept, (params, x, y))
    assert (at_hand[-1] is y) if wanted else (at_hand[-1] is None)
    assert at_hand[-2] is x
    backward = jax.jit(lambda *args: residuals.unpack(*args)(cotangent))
    _, vjp = jax.vjp(function, params, x)
    chex.assert_trees_all_close(backward(kept, at_hand), vjp(cotangent), rtol=1e-12)


def test_unpack_takes_its_inputs_from_the_caller():
    params, x, cotangent = _values()
    _, kept = _forward(lambda params, x: x @ params["w"], params[0], x)
    zeros = jax.tree.map(jnp.zeros_like, params[0])
    _, x_gradient = _backward(kept, zeros, x, cotangent[:, :7])
    np.testing.assert_array_equal(x_gradient, 0.0)


def test_residuals_of_equal_forwards_do_not_recompile_the_backward():
    params, x, cotangent = _values()
    traces = []

    @jax.jit
    def backward(kept, params, x, cotangent):
        traces.append(None)
        return residuals.unpack(kept, jax.tree.leaves((params, x)))(cotangent)

    for scale in (1.0, 2.0, 3.0):
        _, kept = _forward(_network, params, scale * x)
        backward(kept, params, scale * x, cotangent)
    assert len(traces) == 1


def test_none_among_what_is_at_hand_takes_no_arrays_place():
    params, x, cotangent = _values()

    def function(params, inputs):
        x, nothing, scale = inputs
        y = jnp.exp(_network(params, x)) * scale
        return {"a": nothing, "b": y, "c": jnp.exp(-y)}

    @jax.jit
    def forward(params, inputs):
        y, vjp = jax.vjp(function, params, inputs)
        return y, residuals.pack(vjp, (params, inputs, y))

    inputs = (x, None, jnp.float64(3.0))
    y, kept = forward(params, inputs)
    at_hand = residuals.needed(kept, (params, inputs, y))
    _, vjp = jax.vjp(function, params, inputs)
    cotangents = {"a": None, "b": cotangent, "c": 2.0 * cotangent}
    chex.assert_trees_all_close(
        residuals.unpack(kept, at_hand)(cotangents), vjp(cotangents), rtol=1e-12
    )
