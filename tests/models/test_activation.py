"""ReLU against JAX's own, and what its backward keeps."""

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.models.activation import relu


def test_values_and_gradients_are_those_of_jax():
    x = jnp.asarray([-2.0, -0.0, 0.0, 3.0])
    cotangent = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    for ours, own in zip(jax.vjp(relu, x), jax.vjp(jax.nn.relu, x), strict=True):
        if callable(ours):
            ours, own = ours(cotangent)[0], own(cotangent)[0]
        np.testing.assert_array_equal(ours, own)


def test_the_backward_keeps_one_array_the_output():
    x = jnp.linspace(-1, 1, 8)
    y, vjp = jax.vjp(relu, x)
    (kept,) = jax.tree.leaves(vjp)
    assert kept is y
