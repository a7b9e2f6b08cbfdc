"""The JAX methods compute what they are called after."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import fdg_jax as fdg
import oracle
from benchmarks import jax_bp, jax_dp
from fdg_jax.blocks import split_network
from fdg_jax.models import layers, resnet

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def train(network, batches, *, num_devices=1):
    """Losses, and the state after all batches, by BP or by data parallelism."""
    blocks, params, batch_stats = split_network(network)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("batch",))
    if num_devices == 1:
        step = jax_bp.make_step(blocks, OPTIMIZER)
    else:
        step = jax_dp.make_parallel_step(blocks, OPTIMIZER, mesh)
    step = jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(mesh, PartitionSpec())
    shared_out = NamedSharding(mesh, PartitionSpec("batch"))
    state = jax_bp.init_state(params, batch_stats, OPTIMIZER, everywhere)
    losses = []
    for batch in batches:
        state, loss = step(state, jax.device_put(batch, shared_out))
        losses.append(float(loss))
    return losses, jax.device_get(state)


def linear_network():
    rngs = nnx.Rngs(0)
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64, "rngs": rngs}
    return [nnx.Linear(6, 8, **options), nnx.Linear(8, 3, **options)]


@pytest.mark.parametrize("num_devices", [2, 4])
def test_data_parallel_without_batch_norm_is_back_propagation(num_devices):
    batches = oracle.make_batches(4)
    expected = train(linear_network(), batches)
    got = train(linear_network(), batches, num_devices=num_devices)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-12)
    assert oracle.relative_error(got[1].params, expected[1].params) < 1e-12


def test_data_parallel_averages_what_each_device_finds():
    network = oracle.make_network(rate=0.0)
    (batch,) = oracle.make_batches(1)
    losses, state = train(network, [batch], num_devices=2)
    halves = [
        train(network, [jax.tree.map(lambda a, i=i: a[4 * i : 4 * i + 4], batch)])
        for i in range(2)
    ]
    # One step of SGD is linear in the gradient, so the average of the halves' results
    # is the result of their average; and the halves normalise apart.
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(half[1] for half in halves))
    whole = train(network, [batch])[1]
    assert losses[0] == pytest.approx((halves[0][0][0] + halves[1][0][0]) / 2)
    assert oracle.relative_error(state.params, mean.params) < 1e-12
    assert oracle.relative_error(state.batch_stats, mean.batch_stats) < 1e-12
    assert oracle.relative_error(state.params, whole.params) > 1e-4


def test_back_propagation_is_the_pipelines_with_one_stage():
    batches = oracle.make_batches(4)
    pipeline = fdg.Pipeline(
        oracle.make_network(rate=0.0),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=OPTIMIZER,
        num_stages=1,
        engine="serial",
    )
    with pipeline:
        expected = [metrics["loss"] for metrics in pipeline.train(batches)]
    losses, state = train(oracle.make_network(rate=0.0), batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    params, batch_stats = oracle.values(pipeline.network)
    assert oracle.relative_error(state.params, params) < 1e-12
    assert oracle.relative_error(state.batch_stats, batch_stats) < 1e-12


def test_plain_layers_compute_the_same_without_rules_of_our_own():
    options = layers.Options(dtype=jnp.float64, param_dtype=jnp.float64)
    convs = ((3, 16, 1), (3, 16, 1))
    block = resnet.ResidualBlock(16, convs, False, options=options, rngs=nnx.Rngs(0))
    (block,), (params,), (batch_stats,) = split_network([block])
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 16), jnp.float64)

    def make_loss():
        # A function of its own for each, since JAX remembers what it has traced.
        def loss(params, x):
            y, stats = block.apply(params, batch_stats, x, train=True)
            return jnp.sin(y).sum(), stats

        return loss

    programs, results = [], []
    for context in (contextlib.nullcontext, jax_bp.plain_layers):
        with context():
            loss = make_loss()
            programs.append(str(jax.make_jaxpr(loss)(params, x)))
            gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
            results.append(jax.jit(gradient)(params, x))
    assert "custom_vjp" in programs[0]
    assert "custom_vjp" not in programs[1]
    assert "conv_general_dilated" in programs[1]
    assert oracle.relative_error(*results) < 1e-8
