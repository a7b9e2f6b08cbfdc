"""Data sets by name: what `load` gives and what it says when it cannot."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from fdg_jax import data


def test_names_can_be_listed():
    assert data.names() == ("cifar10", "cifar100", "digits", "synthetic")


@pytest.mark.parametrize("name", ["cifar11", "CIFAR10", "c10", None])
def test_unknown_name_lists_the_valid_ones(name):
    with pytest.raises(ValueError, match="cifar10, cifar100, digits, synthetic") as e:
        data.load(name)
    assert repr(name) in str(e.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("cifar101", "cifar10"), ("digit", "digits"), ("syntetic", "synthetic")],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        data.load(name)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    original = load_digits()
    assert digits.image_shape == (8, 8, 1)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.num_classes, digits.padding, digits.flip) == (10, 1, False)
    # Both splits together are the original images with their labels, each once.
    images = np.concatenate([digits.train.images, digits.test.images])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    ours = sorted(
        (image.tobytes(), label) for image, label in zip(images, labels, strict=True)
    )
    scaled = (original.images * 15).astype(np.uint8)
    theirs = sorted(
        (image.tobytes(), label)
        for image, label in zip(scaled, original.target, strict=True)
    )
    assert ours == theirs
    assert images.max() == 240


def test_digits_split_is_stratified_and_fixed():
    one, two = data.load("digits"), data.load("digits")
    np.testing.assert_array_equal(one.test.images, two.test.images)
    in_train = np.bincount(one.train.labels) / len(one.train)
    in_test = np.bincount(one.test.labels) / len(one.test)
    np.testing.assert_allclose(in_train, in_test, atol=1 / 360)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        data.load("digits")


def test_synthetic_has_the_asked_size_and_cifars_augmentation():
    dataset = data.synthetic.load(70, 30, num_classes=7, image_size=8)
    assert (len(dataset.train), len(dataset.test)) == (70, 30)
    assert dataset.image_shape == (8, 8, 3)
    assert (dataset.padding, dataset.flip) == (4, True)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), np.full(7, 10))


def test_synthetic_depends_on_its_seed_only():
    one, same, other = (data.synthetic.load(64, 16, seed=seed) for seed in (0, 0, 1))
    for split in ("train", "test"):
        a, b, c = (getattr(d, split) for d in (one, same, other))
        np.testing.assert_array_equal(a.images, b.images)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert (a.images != c.images).any()
    assert (one.train.images[:16] != one.test.images).any()


def test_synthetic_can_be_learned_and_is_noisy():
    dataset = data.synthetic.load(2000, 500)
    train = dataset.train.images.reshape(2000, -1).astype(np.float64)
    test = dataset.test.images.reshape(500, -1).astype(np.float64)
    means = np.stack([train[dataset.train.labels == c].mean(axis=0) for c in range(10)])
    scores = test @ means.T - np.square(means).sum(axis=1) / 2
    assert (scores.argmax(axis=1) == dataset.test.labels).mean() > 0.95
    assert (train - means[dataset.train.labels]).std() > 40


def test_synthetic_image_size_must_fit_the_pattern():
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        data.synthetic.load(10, 10, image_size=30)


def test_import_starts_no_device_and_needs_no_data_packages():
    code = (
        "import sys\n"
        "for name in ('tensorflow_datasets', 'sklearn', 'PIL', 'array_record'):\n"
        "    sys.modules[name] = None\n"
        "from fdg_jax import data\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # An error once started.
        "assert jax.device_count() == 3\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=pathlib.Path(data.__file__).parents[2],
    )


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_a_spec_tells_beforehand_what_is_loaded(name):
    spec, dataset = data.spec(name), data.load(name)
    assert spec.num_train == len(dataset.train)
    assert spec.num_classes == dataset.num_classes
    assert spec.image_shape == dataset.image_shape
