"""Batches for training and for evaluation, made where the images lie: on the device.

The uint8 data set is placed on the device once. From then on a training batch is one
compiled call, in which even the position in the data is an array on the device, so the
loop copies nothing between host and device and waits for nothing.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.data import augment
from fdg_jax.data.dataset import Dataset

Batch = dict[str, jax.Array]


class BatchState(NamedTuple):
    """The position in an endless sequence of training batches; plain arrays.

    Attributes:
      key: uint32, the data of the key that all randomness comes from.
      epoch: int32 [], the epoch of the next batch.
      step: int32 [], the next batch within the epoch.
      permutation: int32 [N], the order of this epoch; drawn when its step 0 is made.
    """

    key: jax.Array
    epoch: jax.Array
    step: jax.Array
    permutation: jax.Array


class Statistics(NamedTuple):
    """Mean and standard deviation per channel, [C] each, as `normalize` wants them."""

    mean: jax.Array
    std: jax.Array


def steps_per_epoch(name: str, num_train: int, batch_size: int) -> int:
    """Returns the number of whole batches in an epoch; the remainder is left out.

    Args:
      name: the data set's name, for the message.
      num_train: its training images.
      batch_size: images per batch.

    Raises:
      ValueError: batch_size is below 1 or exceeds the training images.
    """
    _check_batch_size(batch_size)
    if batch_size > num_train:
        raise ValueError(
            f"batch_size {batch_size} exceeds the {num_train} training images of "
            f"{name}, so no batch can be filled; use a batch_size of at most "
            f"{num_train}"
        )
    return num_train // batch_size


class TrainBatches:
    """Endless training batches: shuffled every epoch, augmented, normalised.

    Epoch e visits the images in a permutation drawn from fold_in(key(seed), e); the
    remainder that fills no update is left out, other images in each epoch. Batch b of
    the epoch draws its crops and flips from a key folded with e and b. So a batch
    depends on seed, e and b only, and `state` is all it takes to go on.

    Attributes:
      batch_size: images per batch.
      steps_per_epoch: batches in an epoch.
      digest: of the data set.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        accumulation: int = 1,
        device: jax.Device | None = None,
        label_device: jax.Device | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        """Places the training split on the device.

        Args:
          dataset: the data set; its `padding` and `flip` say how to augment.
          batch_size: images per batch, B.
          seed: of shuffling and augmentation.
          accumulation: batches that make an update, of which an epoch has whole ones.
          device: where the data set lies and images are made; None is JAX's default.
          label_device: where labels go (the last stage's device); None leaves them
            beside the images.
          dtype: float type of the images.

        Raises:
          ValueError: batch_size is below 1, the training split does not fill the
            batches of an update, or dtype is no float type that JAX has enabled.
        """
        _check_batch_size(batch_size)
        num_train = len(dataset.train)
        self.batch_size = batch_size
        updates = steps_per_epoch(dataset.name, num_train, accumulation * batch_size)
        self.steps_per_epoch = updates * accumulation
        self._device = device
        self._label_device = label_device
        self._dtype = _check_dtype(dtype)
        self.digest = dataset.digest
        self._padding = int(dataset.padding)
        self._flip = bool(dataset.flip)
        self._images = jax.device_put(dataset.train.images, device)
        self._labels = jax.device_put(dataset.train.labels, device)
        self._statistics = _place_statistics(dataset, self._dtype, device)
        self.state = BatchState(
            key=jax.random.key_data(jax.random.key(seed)),
            epoch=np.zeros((), np.int32),
            step=np.zeros((), np.int32),
            permutation=np.arange(num_train, dtype=np.int32),
        )

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself: a second loop goes on where the first one stopped."""
        return self

    def __next__(self) -> Batch:
        """Returns {"image": [B, H, W, C], "label": int32 [B]}; never stops."""
        self._state, batch = next_batch(
            self._images,
            self._labels,
            self._statistics,
            self._state,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            padding=self._padding,
            flip=self._flip,
            dtype=self._dtype,
        )
        if self._label_device is not None:
            batch["label"] = jax.device_put(batch["label"], self._label_device)
        return batch

    @property
    def state(self) -> BatchState:
        """The position of the next batch, a copy; assign it to go on from there."""
        return jax.tree.map(jnp.copy, self._state)

    @state.setter
    def state(self, state: BatchState) -> None:
        state = BatchState(*jax.device_get(tuple(state)))
        size, step = len(state.permutation), int(state.step)
        if size != len(self._labels) or not 0 <= step < self.steps_per_epoch:
            raise ValueError(
                f"a state of these batches orders {len(self._labels)} images and has "
                f"a step in [0, {self.steps_per_epoch}), got one of {size} images at "
                f"step {step}; use the data set and batch size that it was saved with"
            )
        # next_batch donates the state, so it must not share memory with the caller's.
        self._state = jax.device_put(state, self._device, may_alias=False)


@functools.partial(
    jax.jit,
    static_argnames=("batch_size", "steps_per_epoch", "padding", "flip", "dtype"),
    donate_argnames="state",
)
def next_batch(
    images: jax.Array,
    labels: jax.Array,
    statistics: Statistics,
    state: BatchState,
    *,
    batch_size: int,
    steps_per_epoch: int,
    padding: int,
    flip: bool,
    dtype: jnp.dtype,
) -> tuple[BatchState, Batch]:
    """Makes one training batch, in one compiled call.

    Args:
      images: uint8 [N, H, W, C].
      labels: int32 [N].
      statistics: of the training images.
      state: which batch to make; donated.
      batch_size: images per batch, B.
      steps_per_epoch: batches in an epoch.
      padding: of the random crop, in pixels; 0 is no crop.
      flip: whether to mirror images at random.
      dtype: of the batch's images.

    Returns:
      The state of the batch after this one, and {"image": dtype [B, H, W, C],
      "label": int32 [B]}.
    """
    key = jax.random.wrap_key_data(state.key)
    shuffle_key, augment_key = jax.random.split(jax.random.fold_in(key, state.epoch))
    permutation = jax.lax.cond(
        state.step == 0,
        lambda old: jax.random.permutation(
            shuffle_key, jnp.arange(len(old), dtype=jnp.int32)
        ),
        lambda old: old,
        state.permutation,
    )
    indices = jax.lax.dynamic_slice(
        permutation, (state.step * batch_size,), (batch_size,)
    )
    batch_images = images[indices]
    crop_key, flip_key = jax.random.split(jax.random.fold_in(augment_key, state.step))
    if padding:
        batch_images = augment.random_crop(crop_key, batch_images, padding)
    if flip:
        batch_images = augment.random_flip(flip_key, batch_images)

    epoch_ends = state.step + 1 == steps_per_epoch
    following = BatchState(
        key=state.key,
        epoch=state.epoch + epoch_ends.astype(jnp.int32),
        step=jnp.where(epoch_ends, 0, state.step + 1),
        permutation=permutation,
    )
    image = augment.normalize(batch_images, *statistics, dtype)
    return following, {"image": image, "label": labels[indices]}


class EvaluationBatches:
    """The test split in its order, each image once; can be iterated again and again.

    The batches of uint8 images and their labels stay on the devices, and are normalised
    when they are asked for. The last batch holds what is left.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        device: jax.Device | None = None,
        label_device: jax.Device | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        """Places the test split on the devices; arguments as in `test_batches`."""
        _check_batch_size(batch_size)
        self._dtype = _check_dtype(dtype)
        self._statistics = _place_statistics(dataset, self._dtype, device)
        test = dataset.test
        label_device = device if label_device is None else label_device
        parts = [
            slice(start, start + batch_size)
            for start in range(0, len(test), batch_size)
        ]
        self._images = [jax.device_put(test.images[part], device) for part in parts]
        self._labels = [
            jax.device_put(test.labels[part], label_device) for part in parts
        ]

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self._images)

    def __iter__(self) -> Iterator[Batch]:
        """Yields {"image": [B, H, W, C], "label": int32 [B]} from the beginning."""
        for images, labels in zip(self._images, self._labels, strict=True):
            image = _normalize(images, *self._statistics, dtype=self._dtype)
            yield {"image": image, "label": labels}


def test_batches(
    dataset: Dataset,
    batch_size: int,
    *,
    device: jax.Device | None = None,
    label_device: jax.Device | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> EvaluationBatches:
    """Makes the batches to evaluate on: each test image once, none augmented.

    Args:
      dataset: the data set; normalised by the statistics of its training images.
      batch_size: images per batch; the last batch may be smaller.
      device: where the images go; None is JAX's default.
      label_device: where the labels go; None is beside the images.
      dtype: float type of the images.

    Returns:
      An iterable of {"image": dtype [B, H, W, C], "label": int32 [B]} that has a length
      and can be iterated again.

    Raises:
      ValueError: batch_size is below 1, or dtype is no float type that JAX has enabled.
    """
    return EvaluationBatches(
        dataset, batch_size, device=device, label_device=label_device, dtype=dtype
    )


_normalize = jax.jit(augment.normalize, static_argnames="dtype")


def _place_statistics(
    dataset: Dataset, dtype: jnp.dtype, device: jax.Device | None
) -> Statistics:
    # Half precision is for the result only: the statistics themselves need float32.
    width = jnp.promote_types(dtype, jnp.float32)
    statistics = Statistics(dataset.mean.astype(width), dataset.std.astype(width))
    return jax.device_put(statistics, device)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")


def _check_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            "dtype of the images must be a float type such as float32, bfloat16 or "
            f"float64, got {dtype}"
        )
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError(
            "dtype float64 needs JAX's 64-bit mode: set "
            "jax.config.update('jax_enable_x64', True), or use float32"
        )
    return dtype
