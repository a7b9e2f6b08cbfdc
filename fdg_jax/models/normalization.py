"""BatchNorm whose backward keeps its input and nothing else as large.

Differentiating the textbook formula keeps ``x - mean`` of every layer beside ``x``, an
array as large as the activation that is written, stashed and read again. The gradient
of Ioffe and Szegedy (arXiv 1502.03167, section 3), written with sums of ``g`` and
``g x`` per channel, needs only ``x``.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel to mean ``bias`` and deviation ``scale`` over the batch.

    ``y = (x - mean) / sqrt(var + epsilon) * scale + bias``

    It has a gradient of its own, hence reverse mode only (``jax.vjp``, ``jax.grad``);
    forward mode (``jax.jvp``, ``jax.jacfwd``) raises a ``TypeError``.

    Args:
      x: [batch, ..., channels]; sums are taken in float32 or wider.
      scale: [channels].
      bias: [channels].
      epsilon: added to the variance.

    Returns:
      y, of the type of `x`; and the mean and the biased variance of each channel,
      which are taken as constants by the gradient.
    """
    return _normalize_fwd(x, scale, bias, epsilon)[0]


def _normalize_fwd(x, scale, bias, epsilon):
    axes = tuple(range(x.ndim - 1))
    wide = _widen(x)
    mean = wide.mean(axes)
    var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0)
    factor = scale * lax.rsqrt(var + epsilon)
    y = (wide - _row(mean, x)) * _row(factor, x) + _row(bias, x)
    return (y.astype(x.dtype), mean, var), (x, scale, mean, var)


def _normalize_bwd(epsilon, residuals, cotangents):
    x, scale, mean, var = residuals
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    g, wide = _widen(cotangents[0]), _widen(x)
    rstd = lax.rsqrt(var + epsilon)
    dbias = g.sum(axes)
    dscale = ((g * wide).sum(axes) - mean * dbias) * rstd
    slope = dscale * rstd / count
    offset = dbias / count - slope * mean
    dx = (g - wide * _row(slope, x) - _row(offset, x)) * _row(scale * rstd, x)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(scale.dtype)


normalize.defvjp(_normalize_fwd, _normalize_bwd)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row(values, x):
    """Shapes values per channel to be broadcast against `x`."""
    return values.astype(_widen(x).dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class BatchNorm(nnx.BatchNorm):
    """Flax's BatchNorm with ``normalize`` in training."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x`, [batch, ..., channels]."""
        if self.use_running_average:
            return super().__call__(x)
        x = jnp.asarray(x, self.dtype)
        y, mean, var = normalize(x, self.scale[...], self.bias[...], self.epsilon)
        for average, new in ((self.mean, mean), (self.var, var)):
            kept = self.momentum * average[...]
            average[...] = (kept + (1 - self.momentum) * new).astype(average.dtype)
        return y
