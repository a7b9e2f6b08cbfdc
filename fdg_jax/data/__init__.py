"""Data sets, and batches of them that are made on the device.

`load` gives a `Dataset` by its name; `TrainBatches` and `test_batches` turn any
`Dataset` into batches, dicts with `image` and `label`.
"""

import difflib
import functools
import os
from collections.abc import Callable

from fdg_jax.data import digits, synthetic, tfds
from fdg_jax.data.batches import BatchState, TrainBatches, test_batches
from fdg_jax.data.dataset import Dataset, Split

__all__ = [
    "BatchState",
    "Dataset",
    "Split",
    "TrainBatches",
    "load",
    "names",
    "test_batches",
]

_LOADERS: dict[str, Callable[[str | os.PathLike | None], Dataset]] = {
    "cifar10": functools.partial(tfds.load, "cifar10"),
    "cifar100": functools.partial(tfds.load, "cifar100"),
    "digits": lambda data_dir: digits.load(),
    "synthetic": lambda data_dir: synthetic.load(),
}


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows."""
    return tuple(_LOADERS)


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
    if name not in _LOADERS:
        (nearest,) = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.0)
        raise ValueError(
            f"unknown data set {name!r}: valid names are {', '.join(names())}; "
            f"did you mean {nearest!r}?"
        )
    return _LOADERS[name](data_dir)
