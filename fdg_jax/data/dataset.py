"""What a data set is: raw images with labels, in two splits, in host memory."""

import dataclasses
import functools
import hashlib

import numpy as np

_CHUNK = 500  # Images whose moments are summed at a time; sums fit int32.


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Labelled images.

    Attributes:
      images: uint8 [N, H, W, C], values 0 to 255.
      labels: int32 [N], classes counted from 0.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        """Raises ValueError unless dtypes and shapes are as documented."""
        _check_array("images", self.images, np.uint8, "[N, H, W, C]", 4)
        _check_array("labels", self.labels, np.int32, "[N]", 1)
        if len(self.images) != len(self.labels):
            raise ValueError(
                "a split has one label per image, got "
                f"{len(self.images)} images and {len(self.labels)} labels"
            )
        if self.images.size == 0:
            raise ValueError(
                "a split holds at least one image of at least one pixel, got images "
                f"of shape {self.images.shape}"
            )

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set and the augmentation that suits it.

    Attributes:
      name: what messages call it.
      train: the split to train on.
      test: the split to evaluate on, images of the same shape.
      num_classes: labels lie in [0, num_classes).
      padding: zero pixels added on every side before the random crop back to the
        original size; 0 is no crop.
      flip: whether training mirrors images left to right with probability one half.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    padding: int = 0
    flip: bool = False

    def __post_init__(self):
        """Raises ValueError unless the splits, labels and padding agree."""
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise ValueError(
                f"{self.name}: train and test images must have one shape, got "
                f"{self.train.images.shape[1:]} and {self.test.images.shape[1:]}"
            )
        for split in ("train", "test"):
            self._check_labels(split, getattr(self, split).labels)
        if self.padding < 0:
            raise ValueError(
                f"{self.name}: padding counts pixels and is 0 or more, "
                f"got {self.padding}"
            )

    def _check_labels(self, split: str, labels: np.ndarray) -> None:
        outside = (labels < 0) | (labels >= self.num_classes)
        if outside.any():
            position = int(np.argmax(outside))
            raise ValueError(
                f"{self.name}: labels of the {split} split must lie in "
                f"[0, {self.num_classes}), got {labels[position]} at position "
                f"{position}; correct the labels or num_classes"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (H, W, C)."""
        return self.train.images.shape[1:]

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of all images and labels, in their order."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for array in (split.images, split.labels):
                digest.update(str(array.shape).encode())
                digest.update(np.ascontiguousarray(array))
        return digest.hexdigest()

    @property
    def mean(self) -> np.ndarray:
        """The mean per channel over the training images, float64 [C] in [0, 1]."""
        return self._moments[0]

    @property
    def std(self) -> np.ndarray:
        """The population standard deviation per channel, float64 [C] in [0, 1].

        Raises:
          ValueError: a channel is constant, so that nothing can be divided by it.
        """
        std = self._moments[1]
        if (std == 0).any():
            raise ValueError(
                f"{self.name}: every channel of the training images must vary, but "
                f"channel {int(np.argmax(std == 0))} is constant; drop that channel"
            )
        return std

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation from exact integer sums, chunk by chunk."""
        images = self.train.images
        total = np.zeros(images.shape[1:], np.int64)
        squares = np.zeros_like(total)
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK].astype(np.int32)
            total += chunk.sum(axis=0)
            squares += np.square(chunk).sum(axis=0)
        total, squares = total.sum(axis=(0, 1)), squares.sum(axis=(0, 1))
        count = images[..., 0].size
        # Python's integers, since count * squares - total**2 outgrows 64 bits.
        variance = [
            (count * int(s) - int(t) ** 2) / count**2
            for s, t in zip(squares, total, strict=True)
        ]
        mean = total / count
        return mean / 255, np.sqrt(variance) / 255


def _check_array(
    what: str, array: np.ndarray, dtype: type, shape: str, ndim: int
) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        got = (
            f"{array.dtype} of shape {array.shape}"
            if isinstance(array, np.ndarray)
            else type(array).__name__
        )
        raise ValueError(
            f"{what} of a split must be a NumPy array {np.dtype(dtype)} {shape}, "
            f"got {got}"
        )
