"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146).

Depth 6n+4: n pre-activation blocks at each of 16, 32 and 64 times `width` channels.
As in the FDG authors' program, every convolution has a bias, a block strides in its
second convolution, and its shortcut takes the raw input. The last BatchNorm and ReLU,
which no block after them would apply, belong to the head.
"""

import functools

import jax
from flax import nnx

from fdg_jax.models.activation import relu
from fdg_jax.models.layers import Conv, Head, Options, batch_norm, dropout

_conv = functools.partial(Conv, use_bias=True)


class WideBlock(nnx.Module):
    """`x + branch(x)`: BatchNorm, ReLU, 3x3, dropout, BatchNorm, ReLU, strided 3x3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Builds the branch and the shortcut.

        Args:
          in_channels: channels of the input.
          out_channels: channels of the output; where they differ from `in_channels`,
            or the stride is not 1, the shortcut is a 1x1 convolution.
          stride: of the second convolution and the shortcut, in pixels.
          options: the network's dtypes, initialisation and dropout rate.
          rngs: where the parameters are drawn from.
        """
        conv = functools.partial(_conv, options=options, rngs=rngs)
        self.norm1 = batch_norm(in_channels, options, rngs=rngs)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = batch_norm(out_channels, options, rngs=rngs)
        self.conv2 = conv(out_channels, out_channels, stride=stride)
        if in_channels == out_channels and stride == 1:
            self.shortcut = nnx.identity
        else:
            self.shortcut = conv(
                in_channels, out_channels, kernel_size=1, stride=stride
            )
        # Last, so that the parameters drawn do not depend on the dropout rate.
        self.dropout = dropout(options, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, in_channels] to the next block's input."""
        y = self.conv1(relu(self.norm1(x)))
        y = self.conv2(relu(self.norm2(self.dropout(y))))
        return y + self.shortcut(x)


class WideHead(Head):
    """BatchNorm, ReLU, global average pooling, then a linear layer."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Builds the layers; arguments as for `Head`."""
        super().__init__(in_channels, num_classes, options=options, rngs=rngs)
        self.norm = batch_norm(in_channels, options, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, height, width, channels] to logits, [batch, num_classes]."""
        return super().__call__(relu(self.norm(x)))


def is_valid_depth(depth: int) -> bool:
    """Returns whether there is a network of this depth: 6n+4 with n >= 1."""
    return depth > 4 and depth % 6 == 4


def layout(depth: int, width: int, in_channels: int, num_classes: int) -> list[tuple]:
    """Lists the blocks of a wide ResNet, each as (class, positional arguments ...).

    Args:
      depth: a valid depth, see `is_valid_depth`.
      width: factor of the channels, at least 1.
      in_channels: channels of the images.
      num_classes: number of logits.
    """
    channels = 16
    blocks = [(_conv, in_channels, channels)]
    for group in range(3):
        for position in range((depth - 4) // 6):
            stride = 2 if group > 0 and position == 0 else 1
            blocks.append((WideBlock, channels, 16 * width * 2**group, stride))
            channels = 16 * width * 2**group
    return [*blocks, (WideHead, channels, num_classes)]
