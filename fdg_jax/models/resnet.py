"""Residual networks for small images (He et al., arXiv 1512.03385).

Two families. The small ones have depth 6n+2, n basic blocks at each of 16, 32 and 64
channels, and shortcuts without parameters (option A). ResNet-18, 50 and 101 are the
ImageNet networks with a 3x3 stride-1 stem instead of 7x7 and pooling, and with
projected shortcuts; the bottlenecks stride in the 3x3 convolution. ResNet-50, though
50 = 6*8+2, is the bottleneck network.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.models.activation import relu
from fdg_jax.models.layers import ConvNorm, Head, Options, dropout


class Stem(ConvNorm):
    """The first block: 3x3 convolution, BatchNorm, ReLU."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images [batch, height, width, in_channels] to features."""
        return relu(super().__call__(x))


class PadShortcut(nnx.Module):
    """Option A of the paper: subsamples, and pads new channels with zeros.

    The zeros are shared out equally before and after the input's channels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int):
        """Notes the shapes; `stride` is in pixels."""
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns every stride-th pixel of `x`, padded to the branch's channels."""
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (self.padding, self.padding)))


def _basic(width, stride):
    return (3, width, stride), (3, width, 1)


def _bottleneck(width, stride):
    return (1, width, 1), (3, width, stride), (1, 4 * width, 1)


class ResidualBlock(nnx.Module):
    """`relu(branch(x) + shortcut(x))`, then dropout of whole channels."""

    def __init__(
        self,
        in_channels: int,
        convs: tuple[tuple[int, int, int], ...],
        projected: bool,
        *,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Builds the branch and the shortcut.

        Args:
          in_channels: channels of the input.
          convs: the branch's convolutions, each (kernel size, channels, stride);
            BatchNorm follows every one, and ReLU every one but the last.
          projected: whether a shortcut that changes shape is a 1x1 convolution with
            BatchNorm, or is padded with zeros.
          options: the network's dtypes, initialisation and dropout rate.
          rngs: where the parameters are drawn from.
        """
        self.branch = nnx.List()
        channels, total_stride = in_channels, 1
        for kernel_size, width, stride in convs:
            layer = ConvNorm(
                channels,
                width,
                kernel_size=kernel_size,
                stride=stride,
                options=options,
                rngs=rngs,
            )
            self.branch.append(layer)
            channels, total_stride = width, total_stride * stride
        if channels == in_channels and total_stride == 1:
            self.shortcut = nnx.identity
        elif projected:
            self.shortcut = ConvNorm(
                in_channels,
                channels,
                kernel_size=1,
                stride=total_stride,
                options=options,
                rngs=rngs,
            )
        else:
            self.shortcut = PadShortcut(in_channels, channels, stride=total_stride)
        # Last, so that the parameters drawn do not depend on the dropout rate.
        self.dropout = dropout(options, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, in_channels] to the next block's input."""
        y = x
        for layer in self.branch[:-1]:
            y = relu(layer(y))
        y = self.branch[-1](y)
        return self.dropout(relu(y + self.shortcut(x)))


# Depth -> blocks at each of 64, 128, 256 and 512 channels, and their convolutions.
LARGE = {
    18: ((2, 2, 2, 2), _basic),
    50: ((3, 4, 6, 3), _bottleneck),
    101: ((3, 4, 23, 3), _bottleneck),
}


def is_valid_depth(depth: int) -> bool:
    """Returns whether there is a network of this depth: 6n+2, 18 or 101."""
    return depth in LARGE or (depth > 2 and depth % 6 == 2)


def layout(depth: int, in_channels: int, num_classes: int) -> list[tuple]:
    """Lists the blocks of a ResNet, each as (class, positional arguments ...).

    Args:
      depth: a valid depth, see `is_valid_depth`.
      in_channels: channels of the images.
      num_classes: number of logits.
    """
    if depth in LARGE:
        first_width, (counts, convs_of) = 64, LARGE[depth]
    else:
        first_width, (counts, convs_of) = 16, (3 * ((depth - 2) // 6,), _basic)
    channels = first_width
    blocks = [(Stem, in_channels, channels)]
    for group, count in enumerate(counts):
        for position in range(count):
            stride = 2 if group > 0 and position == 0 else 1
            convs = convs_of(first_width * 2**group, stride)
            blocks.append((ResidualBlock, channels, convs, depth in LARGE))
            channels = convs[-1][1]
    return [*blocks, (Head, channels, num_classes)]
