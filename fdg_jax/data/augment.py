"""Augmentation of training images as traceable functions, compiled with the batch.

Crops and flips move raw uint8 pixels, and `normalize` comes last, so padding is black
before normalisation, as in torchvision's usual CIFAR recipe and the authors' program.
"""

import jax
import jax.numpy as jnp


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads with zeros and cuts a window of the original size, per image.

    Args:
      key: a random key.
      images: uint8 [B, H, W, C].
      padding: pixels added on every side; both offsets of a window are uniform over
        0 to 2 * padding.

    Returns:
      uint8 [B, H, W, C].
    """
    batch_size, *shape = images.shape
    offsets = jax.random.randint(
        key, (batch_size, 2), 0, 2 * padding + 1, dtype=jnp.int32
    )
    border = (padding, padding)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))

    def window(image, offset):
        first_channel = jnp.zeros((), jnp.int32)
        return jax.lax.dynamic_slice(image, (*offset, first_channel), shape)

    return jax.vmap(window)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half.

    Args:
      key: a random key.
      images: uint8 [B, H, W, C].

    Returns:
      uint8 [B, H, W, C].
    """
    # Integers, because the width of bernoulli's floats depends on jax_enable_x64.
    coins = jax.random.randint(key, (len(images), 1, 1, 1), 0, 2, dtype=jnp.int32)
    return jnp.where(coins == 1, images[:, :, ::-1], images)


def normalize(
    images: jax.Array, mean: jax.Array, std: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Computes (images / 255 - mean) / std per channel.

    Args:
      images: uint8 [B, H, W, C].
      mean: [C] in the units of [0, 1], of the float type to compute in.
      std: [C], as ``mean``.
      dtype: of the result.

    Returns:
      dtype [B, H, W, C].
    """
    per_channel = (1, 1, 1, -1)
    scaled = images.astype(mean.dtype) / 255
    centred = scaled - mean.reshape(per_channel)
    return (centred / std.reshape(per_channel)).astype(dtype)
