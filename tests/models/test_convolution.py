"""The fast convolution for CPU against XLA's own, and who gets which."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdg_jax.models.convolution import convolve


def _own(x, kernel, stride):
    low = (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(low, low)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _value_and_gradients(function, x, kernel, stride):
    y, vjp = jax.vjp(lambda x, kernel: function(x, kernel, stride), x, kernel)
    cotangent = np.random.default_rng(2).normal(size=y.shape)
    return y, *vjp(jnp.asarray(cotangent, y.dtype))


def _arguments(batch, height, width, size, channels, dtype):
    random = np.random.default_rng(1)
    x = random.normal(size=(batch, height, width, channels[0]))
    kernel = random.normal(size=(size, size, *channels))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [(3, 16), (20, 7), (16, 20)])
@pytest.mark.parametrize("height, width", [(8, 8), (7, 9)])
def test_values_and_gradients_are_those_of_xla(size, stride, channels, height, width):
    arguments = _arguments(3, height, width, size, channels, "float64")
    ours = jax.jit(lambda *a: _value_and_gradients(convolve, *a, stride))(*arguments)
    own = _value_and_gradients(_own, *arguments, stride)
    chex.assert_trees_all_close(ours, own, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("channels, extent", [(16, 32), (64, 8)])
def test_rounding_is_that_of_the_type(dtype, tolerance, channels, extent):
    arguments = _arguments(32, extent, extent, 3, (channels, channels), dtype)
    ours = jax.jit(lambda *a: _value_and_gradients(convolve, *a, 1))(*arguments)
    exact = _value_and_gradients(_own, *(a.astype("float64") for a in arguments), 1)
    for got, expected in zip(ours, exact, strict=True):
        assert got.dtype == dtype
        error = np.linalg.norm(got.astype("float64") - expected)
        assert error <= tolerance * np.linalg.norm(expected)


def test_gradients_are_the_same_inside_a_loop():
    x, kernel = _arguments(4, 8, 8, 3, (5, 5), "float64")
    kernels = jnp.stack([kernel, kernel / 2, kernel / 3])

    def looped(kernels):
        return lax.scan(lambda x, k: (convolve(x, k, 1), None), x, kernels)[0].sum()

    def unrolled(kernels):
        y = x
        for k in kernels:
            y = _own(y, k, 1)
        return y.sum()

    chex.assert_trees_all_close(
        jax.grad(looped)(kernels), jax.grad(unrolled)(kernels), rtol=1e-11
    )


def _program(platform, channels, extent=(8, 8)):
    """The text of a convolution with its gradients, as a platform compiles it."""
    arguments = _arguments(2, *extent, 3, (channels, channels), "float32")
    step = jax.jit(lambda *a: _value_and_gradients(convolve, *a, 1))
    return jax.export.export(step, platforms=[platform])(*arguments).mlir_module()


@pytest.mark.parametrize(
    "channels, extent, in_pairs",
    [(16, (8, 8), True), (16, (8, 7), False), (20, (8, 8), False)],
)
def test_a_cpu_sums_kernel_gradients_in_a_loop(channels, extent, in_pairs):
    module = _program("cpu", channels, extent)
    convolutions = [
        line for line in module.splitlines() if "stablehlo.convolution(" in line
    ]
    # The value and the input's gradient; XLA's kernel gradient has the images' channels
    # for its batch.
    assert len(convolutions) == 2
    assert all("dim_numbers = [b, 0, 1, f]x" in line for line in convolutions)
    assert [("stride = [1, 2]" in line) for line in convolutions] == [in_pairs] * 2
    assert module.count("stablehlo.while") == 1
    assert "stablehlo.dot_general" in module


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_accelerator_runs_three_convolutions_and_no_loop(platform):
    module = _program(platform, 4)
    assert module.count("stablehlo.convolution(") == 3
    assert "stablehlo.while" not in module
    # Of these, the kernel's gradient is the one that the test above does not find.
    assert module.count("dim_numbers = [f, 0, 1, b]x") == 1
