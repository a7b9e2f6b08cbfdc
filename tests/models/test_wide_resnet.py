"""Wide residual networks: shapes, where they stride, and a block by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fdg_jax import models
from fdg_jax.models import wide_resnet
from fdg_jax.models.layers import Options

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def test_shapes_of_every_block():
    def run(x):
        outputs = []
        for block in models.create("wrn28_10", num_classes=100):
            outputs.append(x := block(x))
        return outputs

    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    stem, *features, logits = (y.shape for y in jax.eval_shape(run, images))
    assert stem == (2, 32, 32, 16)
    groups = [(32, 160), (16, 320), (8, 640)]
    expected = [(2, size, size, width) for size, width in groups for _ in range(4)]
    assert features == expected
    assert logits == (2, 100)


def test_every_convolution_has_a_bias_and_the_second_one_strides():
    network = nnx.eval_shape(lambda: models.create("wrn10_2"))
    assert network[0].bias.shape == (16,)
    for block, stride in zip(network[1:-1], (1, 2, 2), strict=True):
        convs = block.conv1, block.conv2, block.shortcut
        assert [conv.stride for conv in convs] == [1, stride, stride]
        assert [conv.kernel.shape[0] for conv in convs] == [3, 3, 1]
        assert all(conv.bias.shape == conv.kernel.shape[-1:] for conv in convs)
    assert network[-1].norm.scale.shape == (128,)


def _norm_relu(x, norm):
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    y = (x - mean) / np.sqrt(var + 1e-5)
    return np.maximum(y * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...]), 0)


def _conv(x, conv, stride):
    kernel = jnp.asarray(conv.kernel[...])
    pad = (kernel.shape[0] // 2,) * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        jnp.asarray(x), kernel, (stride, stride), (pad, pad), dimension_numbers=numbers
    )
    return np.asarray(y) + np.asarray(conv.bias[...])


@pytest.mark.parametrize("channels, width, stride", [(4, 8, 2), (4, 8, 1), (8, 8, 1)])
def test_block_by_its_definition(channels, width, stride):
    options = Options(dtype="float64", param_dtype="float64")
    rngs = nnx.Rngs(0)
    block = wide_resnet.WideBlock(channels, width, stride, options=options, rngs=rngs)
    random = np.random.default_rng(0)
    for norm in (block.norm1, block.norm2):
        for parameter in (norm.scale, norm.bias):
            parameter.set_value(jnp.asarray(random.normal(size=parameter.shape)))
    x = random.normal(size=(4, 6, 6, channels))
    branch = _conv(_norm_relu(x, block.norm1), block.conv1, 1)
    branch = _conv(_norm_relu(branch, block.norm2), block.conv2, stride)
    shortcut = x if channels == width else _conv(x, block.shortcut, stride)
    np.testing.assert_allclose(block(jnp.asarray(x)), branch + shortcut, rtol=1e-9)


def test_head_normalises_before_it_pools():
    options = Options(dtype="float64", param_dtype="float64")
    head = wide_resnet.WideHead(6, 3, options=options, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(4, 5, 5, 6))
    pooled = _norm_relu(x, head.norm).mean(axis=(1, 2))
    expected = (
        pooled @ np.asarray(head.linear.kernel[...]) + head.linear.bias[...][None]
    )
    np.testing.assert_allclose(head(jnp.asarray(x)), expected, rtol=1e-9)


def test_dropout_acts_between_the_convolutions():
    plain, dropped = (
        models.create("wrn10_1", dropout_rate=rate)[1] for rate in (0.0, 0.5)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 6, 16)), jnp.float32)
    # Without a second convolution nothing behind the dropout is left: only its bias.
    for block in (plain, dropped):
        block.conv2.kernel.set_value(jnp.zeros(block.conv2.kernel.shape, jnp.float32))
    np.testing.assert_array_equal(plain(x), dropped(x))
    np.testing.assert_array_equal(plain(x), x + plain.conv2.bias[...][None, None, None])
    after_first = np.asarray(dropped.dropout(jnp.ones((4, 6, 6, 16), jnp.float32)))
    shares = (after_first == 0).mean(axis=(1, 2))
    assert 0 < shares.min() and shares.max() < 1  # elements, not whole channels
