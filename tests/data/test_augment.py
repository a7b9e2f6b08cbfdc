"""Crop, flip and normalisation against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax.data import augment


def random_images(shape, seed=0):
    # From 1, so that a zero in a crop can only come from the padding.
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def windows(image, padding):
    """All crops of an image, by their offsets."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return {
        (y, x): padded[y : y + height, x : x + width]
        for y in range(2 * padding + 1)
        for x in range(2 * padding + 1)
    }


def offsets_of(images, crops, padding):
    """The offsets of each crop; fails unless it is a window of its own image."""
    found = []
    for image, crop in zip(images, crops, strict=True):
        matches = [
            offset
            for offset, window in windows(image, padding).items()
            if np.array_equal(window, crop)
        ]
        assert len(matches) == 1
        found.append(matches[0])
    return found


@settings(max_examples=15)
@given(
    shape=st.sampled_from([(9, 5, 7, 3), (4, 8, 8, 1), (1, 4, 4, 2)]),
    padding=st.integers(1, 3),  # Less than a side, or windows could be all zeros.
    seed=st.integers(0, 2**31 - 1),
)
def test_a_crop_is_a_window_of_the_zero_padded_image(shape, padding, seed):
    images = random_images(shape)
    crops = augment.random_crop(jax.random.key(seed), jnp.asarray(images), padding)
    assert crops.dtype == jnp.uint8 and crops.shape == shape
    offsets_of(images, np.asarray(crops), padding)


def test_all_crop_offsets_occur_equally_often():
    images = random_images((2000, 4, 4, 2))
    crops = augment.random_crop(jax.random.key(3), jnp.asarray(images), 1)
    offsets = offsets_of(images, np.asarray(crops), 1)
    counts = np.array([offsets.count((y, x)) for y in range(3) for x in range(3)])
    # Chi-squared with 8 degrees of freedom: 26.1 is exceeded once in a thousand.
    assert (np.square(counts - 2000 / 9) / (2000 / 9)).sum() < 26.1


def test_a_flip_is_the_exact_mirror_image_of_about_half():
    images = random_images((1000, 3, 5, 2))
    flipped = np.asarray(augment.random_flip(jax.random.key(0), jnp.asarray(images)))
    assert flipped.dtype == np.uint8
    kept = (flipped == images).all(axis=(1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 420 < mirrored.sum() < 580  # Five standard deviations.


@pytest.mark.parametrize(
    ("dtype", "compute", "rtol"),
    [
        (jnp.float32, np.float32, 1e-5),
        (jnp.float64, np.float64, 1e-14),
        (jnp.bfloat16, np.float32, 2**-8),
    ],
)
def test_normalisation_is_numpys(dtype, compute, rtol):
    images = random_images((5, 4, 3, 3))
    mean, std = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.25, 0.3])
    result = augment.normalize(
        jnp.asarray(images),
        jnp.asarray(mean, compute),
        jnp.asarray(std, compute),
        dtype,
    )
    assert result.dtype == dtype
    expected = (images / 255 - mean) / std
    np.testing.assert_allclose(
        np.asarray(result, np.float64), expected, rtol=rtol, atol=rtol / 10
    )
