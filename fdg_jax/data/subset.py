"""Part of the training images, for studies that must not take long."""

import dataclasses

import numpy as np

from fdg_jax.data.dataset import Dataset, Split


def resolve_num_train(name: str, available: int, num_train: int) -> int:
    """Returns how many training images a request for so many means.

    Args:
      name: the data set's name, for the message.
      available: its training images.
      num_train: images asked for; 0 asks for all.

    Raises:
      ValueError: there are fewer images.
    """
    if not 0 <= num_train <= available:
        raise ValueError(
            f"num_train must lie in [0, {available}], the training images of {name} "
            f"(0: all); got {num_train}"
        )
    return num_train or available


def take(dataset: Dataset, num_train: int) -> Dataset:
    """Keeps some training images, as many of each class as there are, and all to test.

    The images of every class are put in a fixed random order, and taken in turns: one
    of each class, a second one of each, and so on. So a smaller choice lies within a
    larger one, and none depends on the seed of a run.

    Args:
      dataset: the whole data set.
      num_train: images to keep, in the order in which they were; 0 keeps all.

    Returns:
      The data set; its statistics are those of the images kept.

    Raises:
      ValueError: there are fewer images.
    """
    labels = dataset.train.labels
    if resolve_num_train(dataset.name, len(labels), num_train) == len(labels):
        return dataset
    # Unlike those of a Generator, these numbers are the same in every NumPy.
    order = np.random.RandomState(0).permutation(len(labels))
    turn = np.empty(len(labels), np.int64)
    for label in range(dataset.num_classes):
        of_class = order[labels[order] == label]
        turn[of_class] = np.arange(len(of_class))
    # By turn, and within a turn by class; lexsort's last key comes first.
    chosen = np.sort(np.lexsort((labels, turn))[:num_train])
    train = Split(dataset.train.images[chosen], labels[chosen])
    return dataclasses.replace(dataset, train=train)
