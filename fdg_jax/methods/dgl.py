"""DGL: decoupled greedy learning, in which every stage has a loss of its own.

Belilovsky, Eickenberg, Oyallon: "Decoupled Greedy Learning of CNNs", ICML 2020, arXiv
1901.08164.

Stage k learns to classify with a small head ``a_k`` on its output, and passes that
output on; no cotangent crosses a cut::

    s_k = 0
    h_k = f_k(w_k, h_{k-1})      with no gradient to h_{k-1}
    (w_k, a_k) <- (w_k, a_k) - lr * grad loss(a_k(h_k), label)

The last stage has the network's own head. What was chosen: of the heads in the
authors' program its default, MLP-SR: the image is reduced to a quarter of
its height and width by averaging, three 1x1 convolutions, an average of 2x2 areas, and
a perceptron with three hidden layers as wide as its input. Heads have the stage's
optimizer and are not part of the trained network.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.methods.method import Method
from fdg_jax.models.activation import relu
from fdg_jax.models.layers import ConvNorm, Options, batch_norm, linear


class MlpSr(nnx.Module):
    """The head MLP-SR (multi-layer perceptron with spatial reduction)."""

    def __init__(self, x: Any, outputs: Any, rngs: nnx.Rngs):
        """Builds the head.

        Args:
            x: what it takes, abstract: [batch, height, width, channels].
            outputs: the network's logits, abstract: [batch, num_classes].
            rngs: where the parameters are drawn from.

        Raises:
            ValueError: these are no images or no logits.
        """
        shapes = [getattr(a, "shape", None) for a in (x, outputs)]
        if [shape and len(shape) for shape in shapes] != [4, 2]:
            raise ValueError(
                f"the head of method 'dgl' goes from images [batch, height, width, "
                f"channels] to logits [batch, num_classes]; got {shapes[0]} and "
                f"{shapes[1]}; give Pipeline a local_head of your own"
            )
        _, height, width, channels = shapes[0]
        options = Options(dtype=x.dtype, param_dtype=_wide(x.dtype))
        self.reduced = (-(-height // 4), -(-width // 4))
        self.convs = nnx.List(
            ConvNorm(channels, channels, kernel_size=1, options=options, rngs=rngs)
            for _ in range(3)
        )
        features = 4 * channels
        self.linears = nnx.List(
            linear(features, features, options=options, rngs=rngs) for _ in range(3)
        )
        self.norms = nnx.List(
            batch_norm(features, options, rngs=rngs) for _ in range(3)
        )
        self.logits = linear(features, shapes[1][1], options=options, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to logits [batch, num_classes]."""
        x = average_areas(x, self.reduced)
        for conv in self.convs:
            x = relu(conv(x))
        x = average_areas(x, (2, 2))
        x = x.reshape(x.shape[0], -1)
        for dense, norm in zip(self.linears, self.norms, strict=True):
            x = relu(norm(dense(x)))
        logits = self.logits(x)
        return logits.astype(_wide(logits.dtype))


def average_areas(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Averages an image over areas, as PyTorch's ``adaptive_avg_pool2d`` does.

    Row i of n is the mean of the rows from ``floor(i h / n)`` up to, but not including,
    ``ceil((i + 1) h / n)``; areas overlap where n does not divide h.

    Args:
        x: [batch, height, width, channels].
        shape: height and width of the result.

    Returns:
        [batch, *shape, channels].
    """
    for axis, (size, count) in enumerate(zip(x.shape[1:3], shape, strict=True), 1):
        rows = [
            jax.lax.slice_in_dim(
                x, i * size // count, -(-(i + 1) * size // count), axis=axis
            ).mean(axis, keepdims=True)
            for i in range(count)
        ]
        x = jnp.concatenate(rows, axis)
    return x


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


METHOD = Method("dgl", schedule="bp", local_head=MlpSr, leaves_open=("accumulation",))
