"""What a Dataset accepts, and its statistics."""

import numpy as np
import pytest

from fdg_jax.data import Dataset, Split


def make_split(num=6, shape=(4, 4, 3), labels=None, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)
    labels = np.arange(num) % 3 if labels is None else labels
    return Split(images, np.asarray(labels, np.int32))


def make_dataset(**overrides):
    arguments = {
        "name": "mine",
        "train": make_split(),
        "test": make_split(4),
        "num_classes": 3,
    }
    return Dataset(**(arguments | overrides))


def test_a_valid_dataset_is_accepted():
    dataset = make_dataset(padding=2, flip=True)
    assert dataset.image_shape == (4, 4, 3)
    assert len(dataset.train) == 6


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3)), np.zeros(2, np.int32), "uint8.*got float64"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), r"got .*\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2), "int32.*got float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 0], "labels.*got list"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 1), np.int32), r"\(2, 1\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32), "2 images and 3"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, np.int32), "at least one"),
    ],
)
def test_a_split_says_what_is_wrong_with_it(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, labels)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", [-1, 3, 99])
def test_a_label_out_of_range_is_named(split, label):
    bad = make_split(labels=[0, 1, 2, label, 0, 1])
    with pytest.raises(ValueError) as error:
        make_dataset(**{split: bad})
    message = str(error.value)
    for part in ("mine", f"{split} split", "[0, 3)", f"got {label} at position 3"):
        assert part in message


def test_splits_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 4, 3\) and \(5, 4, 3\)"):
        make_dataset(test=make_split(shape=(5, 4, 3)))


def test_negative_padding_is_refused():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        make_dataset(padding=-1)


# More images than are summed at a time, and not a multiple of that.
@pytest.mark.parametrize("num", [1, 7, 1203])
def test_mean_and_std_are_numpys(num):
    dataset = make_dataset(
        train=make_split(num, (3, 5, 2)), test=make_split(1, (3, 5, 2))
    )
    unit = dataset.train.images.astype(np.float64) / 255
    assert dataset.mean.dtype == dataset.std.dtype == np.float64
    np.testing.assert_allclose(dataset.mean, unit.mean(axis=(0, 1, 2)), rtol=1e-13)
    np.testing.assert_allclose(dataset.std, unit.std(axis=(0, 1, 2)), rtol=1e-12)


def test_std_does_not_cancel_for_nearly_constant_bright_images():
    images = np.full((1100, 16, 16, 1), 255, np.uint8)
    images[0, 0, 0, 0] = 254
    bright = Split(images, np.zeros(1100, np.int32))
    p = 1 / images.size
    dataset = make_dataset(train=bright, test=bright)
    np.testing.assert_allclose(dataset.std, [np.sqrt(p * (1 - p)) / 255], rtol=1e-12)


def test_a_constant_channel_has_no_std_to_divide_by():
    images = make_split().images.copy()
    images[..., 1] = 7
    constant = Split(images, np.zeros(6, np.int32))
    with pytest.raises(ValueError, match="channel 1 is constant"):
        _ = make_dataset(train=constant).std
