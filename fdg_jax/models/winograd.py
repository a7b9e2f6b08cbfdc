"""A 3 x 3 convolution with 4 multiplications where the definition has 9, for CPU.

Winograd's minimal filtering F(2 x 2, 3 x 3), as in Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks" (CVPR 2016, arXiv 1509.09308). With d the 4 x 4 pixels of
the input that a tile y of 2 x 2 pixels of the output meets, and g the kernel,

    y = A^T [(G g G^T) * (B^T d B)] A,

where * multiplies element by element. Over tiles and channels, that is one product of
matrices for each of the 16 elements, [tiles, in_channels] by [in_channels,
out_channels]; the kernel's gradient is the transpose of all this. XLA:CPU's direct
convolution already multiplies about as fast as a core can, so only fewer
multiplications can be faster.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fdg_jax.models.chunks import images_per_chunk

_B_T = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A_T = ((1, 1, 1, 0), (0, 1, -1, -1))
_A, _G_T = (tuple(zip(*matrix, strict=True)) for matrix in (_A_T, _G))

_LEAST_CHANNELS = 64  # with fewer, transforming takes as long as multiplying
_LEAST_PRODUCTS = 2**25  # with fewer, compiling takes longer than a hundred calls save
# Bytes of matrices at a time. Less would leave cores idle, since only one product at a
# time is shared out among them; a kernel's gradient also adds to all of the sum so far.
_CONVOLVE_BYTES = 2**24
_GRADIENT_BYTES = 2**22


def suits(x_shape: Sequence[int], kernel_shape: Sequence[int], stride: int) -> bool:
    """Whether this way is the faster one.

    Args:
      x_shape: [batch, height, width, in_channels].
      kernel_shape: [k, k, in_channels, out_channels].
      stride: step in pixels, along height and width.
    """
    batch, height, width, _ = x_shape
    size, _, *channels = kernel_shape
    tiles = batch * height * width // 4
    return (
        (size, stride, height % 2, width % 2) == (3, 1, 0, 0)
        and min(channels) >= _LEAST_CHANNELS
        and 4 * tiles >= max(channels)  # else it is the kernel whose transform is slow
        and tiles * math.prod(channels) >= _LEAST_PRODUCTS
    )


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves images, padded by a pixel on all sides.

    Args:
      x: [batch, height, width, in_channels], height and width even.
      kernel: [3, 3, in_channels, out_channels], of the same type as `x`.

    Returns:
      [batch, height, width, out_channels].
    """
    _, height, width, _ = x.shape
    channels = kernel.shape[-1]
    factors = _transform(_G, [list(row) for row in kernel])

    def convolve_chunk(x):
        products = jax.tree.map(jnp.matmul, _input_tiles(x), factors)
        products = lax.optimization_barrier(products)
        shape = (-1, height // 2, width // 2, channels)
        y = _transform(_A_T, jax.tree.map(lambda p: p.reshape(shape), products))
        rows = [jnp.stack(row, axis=3) for row in y]
        return jnp.stack(rows, axis=2).reshape(-1, height, width, channels)

    chunks = _chunk(x, x.shape[-1] + channels, _CONVOLVE_BYTES)
    return lax.map(convolve_chunk, chunks).reshape(*x.shape[:3], channels)


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The kernel's gradient of ``convolve``.

    Args:
      x: [batch, height, width, in_channels], height and width even.
      cotangent: [batch, height, width, out_channels], of the same type as `x`.

    Returns:
      [3, 3, in_channels, out_channels].
    """
    channels = x.shape[-1] + cotangent.shape[-1]

    def add_chunk(totals, chunk):
        x, g = chunk
        products = jax.tree.map(
            lambda d, g: jnp.matmul(d.T, g), _input_tiles(x), _output_tiles(g)
        )
        return jax.tree.map(jnp.add, totals, products), None

    chunks = [_chunk(a, channels, _GRADIENT_BYTES) for a in (x, cotangent)]
    zeros = jnp.zeros((x.shape[-1], cotangent.shape[-1]), x.dtype)
    totals, _ = lax.scan(add_chunk, [[zeros] * 4] * 4, chunks)
    return jnp.stack([jnp.stack(row) for row in _transform(_G_T, totals)])


def _transform(matrix, grid):
    """M D M^T for a matrix of numbers and a grid, row by row, of arrays."""
    columns = [_combine(matrix, column) for column in zip(*grid, strict=True)]
    return [_combine(matrix, row) for row in zip(*columns, strict=True)]


def _combine(matrix, arrays):
    """The sums that a matrix's rows make of as many arrays, without what is zero."""
    return [
        sum(
            a if factor == 1 else -a if factor == -1 else factor * a
            for factor, a in zip(row, arrays, strict=True)
            if factor
        )
        for row in matrix
    ]


def _input_tiles(x):
    """B^T d B of all tiles: a grid of 4 x 4 matrices [tiles, channels]."""
    _, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pixels = [
        [x[:, i : i + height : 2, j : j + width : 2] for j in range(4)]
        for i in range(4)
    ]
    return _matrices(_transform(_B_T, pixels))


def _output_tiles(cotangent):
    """A g A^T of all tiles: a grid of 4 x 4 matrices [tiles, channels]."""
    pixels = [[cotangent[:, i::2, j::2] for j in range(2)] for i in range(2)]
    return _matrices(_transform(_A, pixels))


def _matrices(grid):
    """Each array's pixels as rows, in memory as a product of matrices wants them."""
    grid = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), grid)
    return lax.optimization_barrier(grid)


def _chunk(a, channels, most):
    """[batch, ...] as [chunks, images, ...]; an image's tiles have ``channels``."""
    batch, height, width, _ = a.shape
    tiles = height * width // 4
    images = images_per_chunk(batch, tiles, 16 * channels * a.dtype.itemsize, most)
    return a.reshape(-1, images, *a.shape[1:])
