"""Data sets, and batches of them that are made on the device.

`load` gives a `Dataset` by its name; `TrainBatches` and `test_batches` turn any
`Dataset` into batches, dicts with `image` and `label`.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

from fdg_jax.data import digits, synthetic, tfds
from fdg_jax.data.batches import (
    BatchState,
    TrainBatches,
    steps_per_epoch,
    test_batches,
)
from fdg_jax.data.dataset import Dataset, Split
from fdg_jax.data.subset import resolve_num_train, take
from fdg_jax.words import did_you_mean

__all__ = [
    "BatchState",
    "Dataset",
    "Spec",
    "Split",
    "TrainBatches",
    "load",
    "names",
    "resolve_num_train",
    "spec",
    "steps_per_epoch",
    "take",
    "test_batches",
]


@dataclass(frozen=True)
class Spec:
    """What is known of a data set without loading it.

    Attributes:
      num_train: training images.
      num_classes: labels are in [0, num_classes).
      image_shape: (height, width, channels).
      load: makes the data set, given TFDS's directory or None.
    """

    num_train: int
    num_classes: int
    image_shape: tuple[int, int, int]
    load: Callable[[str | os.PathLike | None], Dataset]


_CIFAR = (32, 32, 3)
_SPECS = {
    "cifar10": Spec(50_000, 10, _CIFAR, functools.partial(tfds.load, "cifar10")),
    "cifar100": Spec(50_000, 100, _CIFAR, functools.partial(tfds.load, "cifar100")),
    "digits": Spec(1437, 10, (8, 8, 1), lambda data_dir: digits.load()),
    "synthetic": Spec(50_000, 10, _CIFAR, lambda data_dir: synthetic.load()),
}


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows."""
    return tuple(_SPECS)


def spec(name: str) -> Spec:
    """Returns what is known of a data set by its name, loading nothing.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in _SPECS:
        raise ValueError(
            f"unknown data set {name!r}: valid names are {', '.join(names())}"
            f"{did_you_mean(name, names())}"
        )
    return _SPECS[name]


def load(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """Loads a data set into memory.

    Args:
      name: one of `names()`. `digits` and `synthetic` need no files; `cifar10` and
        `cifar100` are downloaded and prepared by TFDS when first used.
      data_dir: where TFDS keeps its data sets; None is TFDS's default place. Not used
        by the data sets that need no files.

    Returns:
      The data set, validated.

    Raises:
      ValueError: the name is unknown, or the data set is neither there nor can be
        downloaded.
    """
    return spec(name).load(data_dir)
