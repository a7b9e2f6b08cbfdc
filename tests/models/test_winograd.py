"""Winograd's convolution against the definition, and where it is used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax.models import winograd
from fdg_jax.models.convolution import convolve


def _direct(x, kernel):
    """y[n, h, w] = sum_ij x[n, h + i - 1, w + j - 1] kernel[i, j], in NumPy."""
    _, height, width, _ = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )


def _direct_kernel_gradient(x, cotangent):
    _, height, width, _ = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [
        [x[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)
    ]
    return np.einsum("ijnhwc,nhwo->ijco", np.array(windows), cotangent)


def _arguments(batch, height, width, inputs, outputs):
    random = np.random.default_rng(3)
    x = random.normal(size=(batch, height, width, inputs))
    kernel = random.normal(size=(3, 3, inputs, outputs))
    cotangent = random.normal(size=(batch, height, width, outputs))
    return x, kernel, cotangent


# The last one is in more chunks than one, of 12 and of 8 images.
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 1, 1), (3, 4, 6, 5, 7), (2, 8, 2, 3, 2), (24, 16, 16, 65, 70)]
)
def test_values_and_gradients_are_those_of_the_definition(shape):
    x, kernel, cotangent = _arguments(*shape)
    y = jax.jit(winograd.convolve)(x, kernel)
    chex.assert_trees_all_close(y, _direct(x, kernel), rtol=1e-11, atol=1e-10)
    gradient = jax.jit(winograd.kernel_gradient)(x, cotangent)
    expected = _direct_kernel_gradient(x, cotangent)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-11, atol=1e-10)


def test_float32_rounds_like_the_direct_convolution():
    x, kernel, cotangent = _arguments(32, 16, 16, 128, 64)
    narrow = [jnp.asarray(a, jnp.float32) for a in (x, kernel, cotangent)]
    for got, expected in [
        (winograd.convolve(*narrow[:2]), _direct(x, kernel)),
        (
            winograd.kernel_gradient(narrow[0], narrow[2]),
            _direct_kernel_gradient(x, cotangent),
        ),
    ]:
        assert got.dtype == jnp.float32
        error = np.abs(got - expected).max()
        assert error <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    "why, x_shape, kernel_shape, stride, suits",
    [
        ("wide and large", (32, 32, 32, 64), (3, 3, 64, 64), 1, True),
        ("a stride", (32, 32, 32, 64), (3, 3, 64, 64), 2, False),
        ("another size", (32, 32, 32, 64), (5, 5, 64, 64), 1, False),
        ("odd pixels", (32, 31, 32, 64), (3, 3, 64, 64), 1, False),
        ("few channels", (128, 32, 32, 64), (3, 3, 64, 32), 1, False),
        ("little work", (128, 8, 8, 64), (3, 3, 64, 64), 1, False),
        ("few tiles", (4, 8, 8, 1024), (3, 3, 1024, 1024), 1, False),
    ],
)
def test_it_is_used_where_it_is_faster(why, x_shape, kernel_shape, stride, suits):
    assert winograd.suits(x_shape, kernel_shape, stride) == suits, why


@pytest.mark.parametrize(
    "platform, dtype, convolutions",
    [("cpu", "float32", 0), ("cpu", "bfloat16", 2), ("cuda", "float32", 3)],
)
def test_convolve_uses_it_on_a_cpu_for_types_with_digits_enough(
    platform, dtype, convolutions
):
    def step(x, kernel):
        y, vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, 1), x, kernel)
        return vjp(y)

    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in [(32, 32, 32, 64), (3, 3, 64, 64)]
    ]
    program = jax.export.export(jax.jit(step), platforms=[platform])(*arguments)
    assert program.mlir_module().count("stablehlo.convolution(") == convolutions


def test_convolve_has_the_gradients_of_the_definition():
    x, kernel, cotangent = _arguments(16, 16, 16, 256, 128)
    assert winograd.suits(x.shape, kernel.shape, 1)
    _, vjp = jax.vjp(lambda x, kernel: convolve(x, kernel, 1), x, kernel)
    gradients = jax.jit(vjp)(cotangent)
    flipped = np.flip(kernel, (0, 1)).swapaxes(2, 3)
    expected = _direct(cotangent, flipped), _direct_kernel_gradient(x, cotangent)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-10, atol=1e-9)
