"""Our BatchNorm against Flax's, whose backward JAX derives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax.models.normalization import BatchNorm, normalize

CHANNELS = 6


def _layer(kind, dtype):
    layer = kind(CHANNELS, momentum=0.9, param_dtype=dtype, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    layer.scale[...] = jnp.asarray(random.uniform(0.5, 2, CHANNELS), dtype)
    layer.bias[...] = jnp.asarray(random.normal(size=CHANNELS), dtype)
    layer.mean = nnx.BatchStat(jnp.zeros(CHANNELS, dtype))
    layer.var = nnx.BatchStat(jnp.ones(CHANNELS, dtype))
    return layer


def _run(kind, x, dtype):
    """Output, gradients of parameters and input, and the new running averages."""
    graphdef, params, stats = nnx.split(_layer(kind, dtype), nnx.Param, ...)

    def apply(params, x):
        layer = nnx.merge(graphdef, params, stats, copy=True)
        y = layer(x)
        return y, (layer.mean[...], layer.var[...])

    y, vjp, averages = jax.vjp(apply, params, x, has_aux=True)
    cotangent = np.random.default_rng(2).normal(size=y.shape)
    params, dx = vjp(jnp.asarray(cotangent, y.dtype))
    return y, dict(nnx.to_pure_dict(params)), dx, averages


@pytest.mark.parametrize("shape", [(4, 5, 3, CHANNELS), (16, CHANNELS)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_training_is_that_of_flax(shape, offset):
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape) + offset)
    ours, flax = (_run(kind, x, jnp.float64) for kind in (BatchNorm, nnx.BatchNorm))
    chex.assert_trees_all_close(ours, flax, rtol=1e-9, atol=1e-10)


def test_evaluation_is_that_of_flax():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, CHANNELS)))
    ours, flax = (_layer(kind, jnp.float64) for kind in (BatchNorm, nnx.BatchNorm))
    ours.eval(), flax.eval()
    chex.assert_trees_all_equal(ours(x), flax(x))


def test_bfloat16_is_summed_in_float32():
    x = np.random.default_rng(1).normal(size=(4096, CHANNELS)) + 3
    x = jnp.asarray(x, jnp.bfloat16)
    y, _, dx, (mean, _) = _run(BatchNorm, x, jnp.float32)
    exact, _, exact_dx, (exact_mean, _) = _run(nnx.BatchNorm, x.astype("float64"), "f8")
    assert y.dtype == dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-5)
    np.testing.assert_allclose(y.astype("float64"), exact, atol=0.05)
    np.testing.assert_allclose(dx.astype("float64"), exact_dx, atol=0.05)


def test_the_backward_keeps_the_input_and_nothing_else_as_large():
    x = jnp.ones((8, 4, CHANNELS))
    ones = jnp.ones(CHANNELS)
    _, vjp = jax.vjp(lambda x: normalize(x, ones, ones, 1e-5), x)
    large = [a for a in jax.tree.leaves(vjp) if a.size == x.size]
    assert len(large) == 1 and large[0] is x
