import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from fdg_jax import data, from_config
from fdg_jax.data.dataset import Dataset, Split


def _numbered(labels, num_classes):
    """Image i holds the number i."""
    count = len(labels)
    images = np.arange(count, dtype=np.uint16).view(np.uint8).reshape(count, 1, 1, 2)
    train = Split(images, np.asarray(labels, np.int32))
    test = Split(images[:1], np.zeros(1, np.int32))
    return Dataset("numbered", train, test, num_classes)


def _numbers(dataset):
    return np.ascontiguousarray(dataset.train.images).view(np.uint16).ravel()


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=60).flatmap(
        lambda labels: st.tuples(
            st.just(labels), st.integers(1, len(labels)), st.integers(1, len(labels))
        )
    )
)
def test_choices_are_balanced_nested_and_keep_labels_and_order(drawn):
    labels, small, large = drawn
    small, large = sorted((small, large))
    dataset = _numbered(labels, 4)
    chosen, more = (_numbers(data.take(dataset, n)) for n in (small, large))
    assert len(chosen) == small and set(chosen) <= set(more)
    assert (np.diff(chosen.astype(int)) > 0).all()
    taken = data.take(dataset, small).train.labels
    np.testing.assert_array_equal(taken, np.asarray(labels)[chosen])
    # A class has fewer than another only where it has no more, or by one.
    counts = np.bincount(taken, minlength=4)
    exhausted = counts == np.bincount(labels, minlength=4)
    assert (counts[~exhausted] >= counts.max() - 1).all()


def test_all_images_are_the_data_set_itself():
    digits = data.load("digits")
    assert data.take(digits, 0) is digits
    assert data.take(digits, 1437) is digits


def test_the_choice_is_random_within_a_class():
    chosen = _numbers(data.take(_numbered([0] * 1000, 1), 100))
    assert chosen.max() > 900 and chosen.min() < 100


@pytest.mark.parametrize("num_train", [-1, 1438])
def test_what_there_is_not_is_refused(num_train):
    with pytest.raises(ValueError, match=rf"\[0, 1437\].*digits.*got {num_train}"):
        data.take(data.load("digits"), num_train)


def test_a_config_asks_for_part_of_the_images():
    config = default.get_config()
    config.dataset, config.num_train = "digits", 100
    assert from_config.num_train(config) == 100
    taken = from_config.load_data(config)
    assert len(taken.train) == 100 and len(taken.test) == 360
    assert (np.bincount(taken.train.labels) == 10).all()
    config.num_train = 1438
    with pytest.raises(ValueError, match="got 1438"):
        from_config.num_train(config)
