"""Convolution, BatchNorm, dropout and head against their definitions in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax.models import layers

FLOAT64 = layers.Options(dtype="float64", param_dtype="float64")


def _normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


def _convolve(x, kernel, stride):
    """A convolution by its definition: a sum over the window of each output pixel."""
    size = kernel.shape[0]
    pad = (size - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    rows = range(0, x.shape[1] + 2 * pad - size + 1, stride)
    columns = range(0, x.shape[2] + 2 * pad - size + 1, stride)
    window = lambda r, c: padded[:, r : r + size, c : c + size]  # noqa: E731
    pixels = [
        [np.einsum("bhwi,hwio->bo", window(r, c), kernel) for c in columns]
        for r in rows
    ]
    return np.moveaxis(np.asarray(pixels), 2, 0)


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1), (1, 2)])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("height, width", [(8, 8), (7, 6)])
def test_conv_is_the_sum_over_windows(size, stride, use_bias, height, width):
    conv = layers.Conv(
        3,
        4,
        kernel_size=size,
        stride=stride,
        use_bias=use_bias,
        options=FLOAT64,
        rngs=nnx.Rngs(0),
    )
    x = _normal(0, (2, height, width, 3))
    expected = _convolve(x, np.asarray(conv.kernel[...]), stride)
    if use_bias:
        expected = expected + np.asarray(conv.bias[...])
    y = conv(jnp.asarray(x))
    assert y.shape == (2, -(-height // stride), -(-width // stride), 4)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def _parameters(init, fan_in_channels=64):
    options = layers.Options(init=init)
    rngs = nnx.Rngs(0)
    conv = layers.Conv(fan_in_channels, 256, use_bias=True, options=options, rngs=rngs)
    head = layers.Head(fan_in_channels * 9, 256, options=options, rngs=rngs)
    return 9 * fan_in_channels, (conv, head.linear)


def test_torch_init_is_uniform_within_the_bound():
    fan_in, modules = _parameters("torch")
    bound = 1 / np.sqrt(fan_in)
    for module in modules:
        for values in (module.kernel[...], module.bias[...]):
            values = np.asarray(values)
            assert 0.97 * bound < np.abs(values).max() <= bound * (1 + 1e-6)
            # The mean of n uniform draws has standard deviation bound / sqrt(3 n).
            assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)
        assert np.std(module.kernel[...]) == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_he_normal_init():
    fan_in, modules = _parameters("he_normal")
    for module in modules:
        kernel = np.asarray(module.kernel[...])
        deviation = np.sqrt(2 / fan_in)
        assert kernel.std() == pytest.approx(deviation, rel=0.02)
        # A normal distribution, not a truncated or a uniform one: kurtosis 3.
        assert np.mean((kernel / deviation) ** 4) == pytest.approx(3, rel=0.05)
        assert not np.any(module.bias[...])


def test_batch_norm_keeps_nine_tenths():
    norm = layers.batch_norm(4, FLOAT64, rngs=nnx.Rngs(0))
    x = 2 + 3 * _normal(0, (5, 6, 7, 4))
    mean, var = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    y = norm(jnp.asarray(x))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-9)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-9)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var, rtol=1e-9)
    norm(jnp.asarray(x))
    np.testing.assert_allclose(norm.mean[...], 0.19 * mean, rtol=1e-9)
    norm.eval()
    averages = 0.19 * mean, 0.81 + 0.19 * var
    expected = (x - averages[0]) / np.sqrt(averages[1] + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-9)
    np.testing.assert_allclose(norm.mean[...], averages[0], rtol=1e-9)


def test_batch_norm_is_constant_at_first():
    norm = layers.batch_norm(3, layers.Options(), rngs=nnx.Rngs(0))
    assert np.all(norm.scale[...] == 1) and np.all(norm.var[...] == 1)
    assert not np.any(norm.bias[...]) and not np.any(norm.mean[...])


@pytest.mark.parametrize("evaluating", [False, True])
def test_batch_norm_of_bfloat16_rounds_only_its_ends(evaluating):
    """Averages of 256.5 and 1000.3 are not bfloat16 numbers; they stay exact."""
    norm = layers.batch_norm(1, layers.Options(dtype="bfloat16"), rngs=nnx.Rngs(0))
    norm.mean.set_value(jnp.full((1,), 256.5, jnp.float32))
    norm.var.set_value(jnp.full((1,), 1000.3, jnp.float32))
    if evaluating:
        norm.eval()
    x = jnp.asarray(256 + 32 * _normal(0, (64, 1, 1, 1)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    mean, var = (256.5, 1000.3) if evaluating else (exact.mean(), exact.var())
    expected = (exact - mean) / np.sqrt(var + 1e-5)
    y = norm(x)
    assert y.dtype == jnp.bfloat16 and norm.mean[...].dtype == jnp.float32
    # Half a unit in the last of bfloat16's 8 significant bits, and float32's own error.
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-4
    )


def test_dropout_zeroes_the_share_and_keeps_the_mean():
    drop = layers.dropout(layers.Options(dropout_rate=0.25), rngs=nnx.Rngs(0))
    y = np.asarray(drop(jnp.ones((100, 100), jnp.float32)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 1e4))
    drop.eval()
    assert np.all(drop(jnp.ones((3, 3), jnp.float32)) == 1)


def test_head_is_the_linear_map_of_the_pixels_mean():
    head = layers.Head(5, 3, options=FLOAT64, rngs=nnx.Rngs(0))
    x = _normal(0, (2, 4, 6, 5))
    weights, bias = (
        np.asarray(head.linear.kernel[...]),
        np.asarray(head.linear.bias[...]),
    )
    expected = x.mean(axis=(1, 2)) @ weights + bias
    np.testing.assert_allclose(head(jnp.asarray(x)), expected, rtol=1e-12)
