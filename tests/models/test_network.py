"""A network behaves as a Python sequence and as an nnx.Module."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax import models
from fdg_jax.models.normalization import BatchNorm

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def _linear_blocks(widths=(3, 5, 2)):
    rngs = nnx.Rngs(0)
    return [
        nnx.Linear(a, b, rngs=rngs, param_dtype=jnp.float32)
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]


def test_is_a_sequence_of_its_blocks():
    blocks = [*_linear_blocks(), nnx.relu]
    network = models.Network("mine", blocks)
    assert isinstance(network, Sequence) and isinstance(network, nnx.Module)
    assert len(network) == 3 and list(network) == blocks
    assert network[0] is blocks[0] and network[-1] is blocks[-1]
    assert network[np.int64(1)] is blocks[1]
    assert network[1:] == blocks[1:] and isinstance(network[1:], list)
    assert network.index(blocks[1]) == 1 and blocks[2] in network
    assert list(reversed(network)) == blocks[::-1]
    with pytest.raises(IndexError):
        network[3]


def test_call_is_the_blocks_in_order():
    first, second = blocks = _linear_blocks()
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    expected = (np.asarray(x) @ first.kernel[...]) @ second.kernel[...]
    np.testing.assert_allclose(models.Network("m", blocks)(x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "blocks, message", [([], "got none"), ([3], "int at position 0")]
)
def test_refuses_what_cannot_be_called(blocks, message):
    with pytest.raises(ValueError, match=message):
        models.Network("mine", blocks)


def test_split_and_merge_give_the_same_network():
    network = models.create("resnet8")
    graphdef, state = nnx.split(network)
    again = nnx.merge(graphdef, state)
    assert again.name == "resnet8" and len(again) == len(network)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), state)


def test_train_and_eval_reach_every_layer():
    network = nnx.eval_shape(lambda: models.create("wrn10_1", dropout_rate=0.5))
    layers = [
        layer
        for _, layer in nnx.iter_modules(network)
        if isinstance(layer, BatchNorm | nnx.Dropout)
    ]
    flags = {BatchNorm: "use_running_average", nnx.Dropout: "deterministic"}
    assert len(layers) == 3 * 2 + 1 + 3
    for mode, evaluating in ((network.eval, True), (network.train, False)):
        mode()
        assert {getattr(layer, flags[type(layer)]) for layer in layers} == {evaluating}


def test_count_leaves_batch_statistics_out():
    norm = nnx.BatchNorm(7, rngs=nnx.Rngs(0))
    assert models.count_parameters(models.Network("m", [norm])) == 14
