"""Random images with a learnable signal, for benchmarks and for tests."""

import numpy as np

from fdg_jax.data.dataset import Dataset, Split

_CELLS = 4  # A class's pattern is _CELLS x _CELLS patches of one colour.


def load(
    num_train: int = 50_000,
    num_test: int = 10_000,
    *,
    num_classes: int = 10,
    image_size: int = 32,
    seed: int = 0,
) -> Dataset:
    """Draws a data set of CIFAR's shape; the same arguments give the same images.

    Every class has a fixed coarse pattern of colours. An image is three parts uniform
    noise and one part the pattern of its class. Classes are equally frequent.

    Args:
      num_train: number of training images.
      num_test: number of test images.
      num_classes: number of classes.
      image_size: height and width in pixels, a multiple of 4.
      seed: of the random numbers.

    Returns:
      The data set `synthetic`, images [N, image_size, image_size, 3], with CIFAR's
      augmentation.

    Raises:
      ValueError: image_size is not a positive multiple of 4.
    """
    if image_size < _CELLS or image_size % _CELLS:
        raise ValueError(
            f"image_size must be a positive multiple of {_CELLS}, got {image_size}"
        )
    rng = np.random.default_rng(seed)
    cells = (num_classes, _CELLS, _CELLS, 3)
    patterns = rng.integers(0, 64, cells, dtype=np.uint8)
    scale = image_size // _CELLS
    patterns = patterns.repeat(scale, axis=1).repeat(scale, axis=2)
    return Dataset(
        name="synthetic",
        train=_draw(rng, patterns, num_train),
        test=_draw(rng, patterns, num_test),
        num_classes=num_classes,
        padding=4,
        flip=True,
    )


def _draw(rng: np.random.Generator, patterns: np.ndarray, count: int) -> Split:
    labels = rng.permutation(np.arange(count, dtype=np.int32) % len(patterns))
    images = rng.integers(0, 192, (count, *patterns.shape[1:]), dtype=np.uint8)
    for label, pattern in enumerate(patterns):
        images[labels == label] += pattern
    return Split(images, labels)
