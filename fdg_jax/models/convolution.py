"""The convolution of all networks, with gradients that are fast on CPU too.

GPU and TPU keep XLA's own convolution and its own gradients. XLA:CPU has a fast
convolution as well, but it

- transposes whole batches of images before it computes a kernel's gradient, and inside
  loops falls back to a naive program for both gradients. Here the kernel's gradient is
  a sum of matrix products, one per image (``_sum_of_products``), and the input's is a
  convolution like any other (``_input_gradient``);
- leaves out its fast program where neither side has more than 16 channels. Here two
  neighbouring pixels are computed as one of twice the channels (``_forward_pairs``);
- multiplies as often as the definition says. Here wide layers do with fewer products
  (``winograd``).

All give the same numbers as XLA's own to rounding.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fdg_jax.models import winograd
from fdg_jax.models.chunks import images_per_chunk

_NARROW = 16  # channels up to which XLA:CPU does without its fast program
_CHUNK_BYTES = 2**20  # of matrices at a time: in cache, and work enough for two threads


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves images, padded by (k - 1) // 2 pixels on all sides as in PyTorch.

    It has a gradient of its own, hence reverse mode only (``jax.vjp``, ``jax.grad``);
    forward mode (``jax.jvp``, ``jax.jacfwd``) raises a ``TypeError``.

    Args:
      x: [batch, height, width, in_channels].
      kernel: [k, k, in_channels, out_channels] with odd k, of the same type as `x`.
      stride: step in pixels, along height and width.

    Returns:
      [batch, ceil(height / stride), ceil(width / stride), out_channels].
    """
    assert kernel.shape[0] == kernel.shape[1] and kernel.shape[0] % 2, kernel.shape
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_forward_cpu, stride=stride),
        default=functools.partial(_xla, stride=stride),
    )


def _convolve_fwd(x, kernel, stride):
    return convolve(x, kernel, stride), (x, kernel)


def _convolve_bwd(stride, residuals, cotangent):
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_gradients_cpu, stride=stride),
        default=functools.partial(_gradients_xla, stride=stride),
    )


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _xla(x, kernel, *, stride):
    low = (kernel.shape[0] - 1) // 2
    return _conv(x, kernel, (stride, stride), [(low, low)] * 2)


def _conv(x, kernel, strides, padding, lhs_dilation=(1, 1)):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _gradients_xla(x, kernel, cotangent, *, stride):
    _, vjp = jax.vjp(functools.partial(_xla, stride=stride), x, kernel)
    return vjp(cotangent)


def _gradients_cpu(x, kernel, cotangent, *, stride):
    return (
        _input_gradient(kernel, cotangent, x.shape, stride),
        _kernel_gradient(x, cotangent, kernel, stride),
    )


def _forward_cpu(x, kernel, *, stride):
    if _by_winograd(x, kernel.shape, stride):
        return winograd.convolve(x, kernel)
    size, _, *channels = kernel.shape
    if stride == 1 and size > 1 and max(channels) <= _NARROW and x.shape[2] % 2 == 0:
        return _forward_pairs(x, kernel)
    return _xla(x, kernel, stride=stride)


def _by_winograd(x, kernel_shape, stride):
    # Its sums of pixels need more digits than the shorter types have.
    exact = jnp.promote_types(x.dtype, jnp.float32) == x.dtype
    return exact and winograd.suits(x.shape, kernel_shape, stride)


def _forward_pairs(x, kernel):
    """Convolves with stride 1, two neighbouring pixels of a row at a time.

    A kernel one pixel wider, moved by two pixels, gives both as channels of one: the
    first pixel's kernel is padded on the right, the second one's on the left.
    """
    low = (kernel.shape[0] - 1) // 2
    first = jnp.pad(kernel, ((0, 0), (0, 1), (0, 0), (0, 0)))
    second = jnp.pad(kernel, ((0, 0), (1, 0), (0, 0), (0, 0)))
    pair = jnp.concatenate([first, second], axis=-1)
    return _conv(x, pair, (1, 2), [(low, low)] * 2).reshape(
        *x.shape[:3], kernel.shape[-1]
    )


def _input_gradient(kernel, cotangent, shape, stride):
    """The input's gradient: a convolution of the cotangent, spread by the stride."""
    size = kernel.shape[0]
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    if stride == 1:
        return _forward_cpu(cotangent, flipped, stride=1)
    low = (size - 1) // 2
    spread = [(extent - 1) * stride + 1 for extent in cotangent.shape[1:3]]
    padding = [
        (low, extent + low - s) for extent, s in zip(shape[1:3], spread, strict=True)
    ]
    return _conv(cotangent, flipped, (1, 1), padding, (stride, stride))


def _kernel_gradient(x, cotangent, kernel, stride):
    if _by_winograd(x, kernel.shape, stride):
        return winograd.kernel_gradient(x, cotangent)
    gradient = _sum_of_products(x, cotangent, kernel.shape[0], stride)
    return gradient.astype(kernel.dtype)


def _sum_of_products(x, cotangent, size, stride):
    """The kernel's gradient, sum_n X_n^T G_n over chunks n of the batch.

    The rows of X_n and G_n are the chunk's output pixels. X_n holds the input pixels
    that the kernel's rows meet, one beside the other, and G_n the cotangents that its
    columns meet: with x[h + i, w + j] g[h, w] = x[h + i, w] g[h, w - j] summed over all
    pixels, every product is one that the gradient needs, and nothing is ever written
    out ``size ** 2`` times. With a stride the columns stay with the input.
    """
    batch, height, width, channels = cotangent.shape
    low = (size - 1) // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def add_chunk(total, chunk):
        x, g = chunk
        x = _taps(x, 1, height, size, low, stride)
        if stride == 1:
            g = _taps(g, 2, width, size, low, 1, backwards=True)
        else:
            x = _taps(x, 2, width, size, low, stride)
        rows = g.shape[0] * height * width
        # Products of matrices that lie in memory, and in cache, are the fast ones.
        x, g = lax.optimization_barrier((x.reshape(rows, -1), g.reshape(rows, -1)))
        return total + jnp.matmul(x.T, g, preferred_element_type=wide), None

    inputs, outputs = x.shape[-1] * size, channels * size
    if stride > 1:
        inputs, outputs = inputs * size, channels
    row_bytes = (inputs + outputs) * x.dtype.itemsize
    images = images_per_chunk(batch, height * width, row_bytes, _CHUNK_BYTES)
    chunks = [a.reshape(-1, images, *a.shape[1:]) for a in (x, cotangent)]
    total, _ = lax.scan(add_chunk, jnp.zeros((inputs, outputs), wide), chunks)
    if stride > 1:
        return total.reshape(size, size, -1, channels).swapaxes(0, 1)
    return total.reshape(size, -1, size, channels).swapaxes(1, 2)


def _taps(a, axis, count, size, low, stride, *, backwards=False):
    """What a kernel's ``size`` taps along an axis meet, as further channels."""
    span = (count - 1) * stride + 1
    pads = [(0, 0)] * a.ndim
    pads[axis] = (low, max(0, span + size - 1 - low - a.shape[axis]))
    a = jnp.pad(a, pads)
    starts = range(size - 1, -1, -1) if backwards else range(size)
    return jnp.concatenate(
        [lax.slice_in_dim(a, i, i + span, stride, axis) for i in starts], axis=-1
    )
