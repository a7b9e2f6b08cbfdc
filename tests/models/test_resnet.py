"""Residual networks: shapes, shortcuts, and a block by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from fdg_jax import models
from fdg_jax.models import resnet
from fdg_jax.models.layers import Options


def _shapes(name, size=32, **kwargs):
    """The shape of every block's output for two images of size x size x 3."""

    def run(x):
        outputs = []
        for block in models.create(name, **kwargs):
            outputs.append(x := block(x))
        return outputs

    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return [output.shape for output in jax.eval_shape(run, images)]


@pytest.mark.parametrize(
    "name, groups",
    [
        ("resnet20", [(4, 32, 16), (3, 16, 32), (3, 8, 64)]),
        ("resnet18", [(3, 32, 64), (2, 16, 128), (2, 8, 256), (2, 4, 512)]),
        ("resnet101", [(3, 32, 256), (4, 16, 512), (23, 8, 1024), (3, 4, 2048)]),
    ],
)
def test_shapes_of_every_block(name, groups):
    *features, logits = _shapes(name)
    expected = [
        (2, size, size, channels)
        for count, size, channels in groups
        for _ in range(count)
    ]
    if name == "resnet101":
        expected.insert(0, (2, 32, 32, 64))
    assert features == expected
    assert logits == (2, 10)


def test_odd_sizes():
    assert [shape[1] for shape in _shapes("resnet8", size=7)[:-1]] == [7, 7, 4, 2]


def test_bottlenecks_stride_in_the_middle_convolution():
    block = nnx.eval_shape(lambda: models.create("resnet50"))[4]
    assert [layer.conv.stride for layer in block.branch] == [1, 2, 1]
    assert [layer.conv.kernel.shape for layer in block.branch] == [
        (1, 1, 256, 128),
        (3, 3, 128, 128),
        (1, 1, 128, 512),
    ]
    assert block.shortcut.conv.kernel.shape == (1, 1, 256, 512)
    assert block.shortcut.conv.stride == 2


def test_option_a_keeps_every_other_pixel_between_zeros():
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4))
    y = resnet.PadShortcut(4, 8, stride=2)(jnp.asarray(x))
    expected = np.zeros((2, 3, 3, 8))
    for row in range(3):
        for column in range(3):
            expected[:, row, column, 2:6] = x[:, 2 * row, 2 * column]
    np.testing.assert_array_equal(y, expected)


def _basic_block(x, block, shortcut):
    """A basic block in float64, from the published equations."""

    def conv_norm(x, layer):
        kernel = np.asarray(layer.conv.kernel[...], np.float64)
        pad = (kernel.shape[0] // 2,) * 2
        y = lax.conv_general_dilated(
            jnp.asarray(x),
            jnp.asarray(kernel),
            (layer.conv.stride,) * 2,
            (pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = np.asarray(y)
        mean, var = y.mean(axis=(0, 1, 2)), y.var(axis=(0, 1, 2))
        scale, bias = (
            np.asarray(layer.norm.scale[...]),
            np.asarray(layer.norm.bias[...]),
        )
        return (y - mean) / np.sqrt(var + 1e-5) * scale + bias

    first, second = block.branch
    branch = conv_norm(np.maximum(conv_norm(x, first), 0), second)
    if shortcut == "identity":
        return np.maximum(branch + x, 0)
    if shortcut == "projection":
        return np.maximum(branch + conv_norm(x, block.shortcut), 0)
    assert shortcut == "zeros"
    added = x.shape[-1] // 2
    padded = np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (added, added)))
    return np.maximum(branch + padded, 0)


@pytest.mark.parametrize(
    "name, position, shortcut",
    [
        ("resnet8", 1, "identity"),
        ("resnet8", 2, "zeros"),
        ("resnet18", 3, "projection"),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4)])
def test_basic_block_by_its_definition(name, position, shortcut, dtype, tolerance):
    options = Options(dtype=dtype, param_dtype=dtype)
    depth = int(name.removeprefix("resnet"))
    _, *arguments = resnet.layout(depth, 3, 10)[position]
    block = resnet.ResidualBlock(*arguments, options=options, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    for layer in block.branch:
        for parameter in (layer.norm.scale, layer.norm.bias):
            parameter.set_value(jnp.asarray(random.normal(size=parameter.shape), dtype))
    x = random.normal(size=(4, 6, 6, arguments[0])).astype(dtype)
    y = block(jnp.asarray(x))
    assert y.dtype == dtype
    expected = _basic_block(x.astype(np.float64), block, shortcut)
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("projected", [False, True])
def test_dropout_takes_whole_channels_of_the_blocks_output(projected):
    block = resnet.ResidualBlock(
        16,
        ((3, 32, 2), (3, 32, 1)),
        projected,
        options=Options(dropout_rate=0.5),
        rngs=nnx.Rngs(0),
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8, 8, 16)), jnp.float32)
    dropped = np.asarray(block(x))
    block.dropout.eval()
    kept = np.asarray(block(x))
    assert kept.any(axis=(1, 2)).all()
    zero = ~dropped.any(axis=(1, 2), keepdims=True)
    # 512 channels, each dropped with probability 1/2: five standard deviations.
    assert zero.mean() == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(zero.size))
    np.testing.assert_allclose(dropped, np.where(zero, 0, kept / 0.5), rtol=1e-6)
