"""Batches: every image once per epoch, reproducible, and nothing copied on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax import data
from fdg_jax.data import Dataset, Split, TrainBatches


def numbered(num_train=23, num_test=10, shape=(4, 6, 2), **augmentation):
    """A data set whose labels are the positions of its images."""
    rng = np.random.default_rng(0)
    num_classes = max(num_train, num_test)
    splits = [
        Split(
            rng.integers(1, 256, (num, *shape), dtype=np.uint8),
            np.arange(num, dtype=np.int32),
        )
        for num in (num_train, num_test)
    ]
    return Dataset("numbered", *splits, num_classes=num_classes, **augmentation)


def take(batches, count):
    return [jax.device_get(next(batches)) for _ in range(count)]


def take_order(batches, epochs=1):
    """The positions visited, one array per epoch."""
    return [
        np.concatenate([b["label"] for b in take(batches, batches.steps_per_epoch)])
        for _ in range(epochs)
    ]


def to_pixels(dataset, image):
    """Undoes the normalisation."""
    return np.rint((image.astype(np.float64) * dataset.std + dataset.mean) * 255)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 22, 23])
def test_an_epoch_visits_different_images_and_drops_the_remainder(batch_size):
    batches = TrainBatches(numbered(), batch_size, seed=0)
    assert batches.steps_per_epoch == 23 // batch_size
    for order in take_order(batches, epochs=3):
        assert len(order) == 23 // batch_size * batch_size
        assert len(set(order)) == len(order)


def test_an_epoch_of_accumulated_batches_has_whole_updates():
    batches = TrainBatches(numbered(), 3, seed=0, accumulation=3)
    assert batches.steps_per_epoch == 2 * 3  # not the 7 batches of 3 in 23 images
    for order in take_order(batches, epochs=3):
        assert len(set(order)) == len(order) == 18


def test_without_remainder_an_epoch_visits_every_image_once():
    batches = TrainBatches(numbered(24), 6, seed=0)
    for order in take_order(batches, epochs=3):
        np.testing.assert_array_equal(np.sort(order), np.arange(24))


def test_every_epoch_and_every_seed_has_its_own_order():
    one, same = (TrainBatches(numbered(), 5, seed=0) for _ in range(2))
    other = TrainBatches(numbered(), 5, seed=1)
    first, second, third = take_order(one, epochs=3)
    assert (first != second).any() and (second != third).any()
    np.testing.assert_array_equal(take_order(same, epochs=3), [first, second, third])
    assert (take_order(other)[0] != first).any()


def test_the_remainder_changes_from_epoch_to_epoch():
    batches = TrainBatches(numbered(), 20, seed=0)
    left_out = {tuple(sorted(set(range(23)) - set(o))) for o in take_order(batches, 5)}
    assert len(left_out) > 1


def test_images_match_their_labels_and_numpys_normalisation():
    dataset = numbered()
    for batch in take(TrainBatches(dataset, 5, seed=0), 6):
        raw = dataset.train.images[batch["label"]]
        expected = (raw / 255 - dataset.mean) / dataset.std
        assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32
        np.testing.assert_allclose(batch["image"], expected, rtol=1e-4, atol=1e-6)


def test_augmentation_mirrors_windows_of_the_padded_raw_image():
    dataset = numbered(padding=2, flip=True)
    seen = set()
    for batch in take(TrainBatches(dataset, 11, seed=0, dtype=jnp.float64), 20):
        for image, label in zip(batch["image"], batch["label"], strict=True):
            pixels = to_pixels(dataset, image)
            raw = dataset.train.images[label]
            padded = np.pad(raw, ((2, 2), (2, 2), (0, 0)))
            matches = [
                (y, x, flip)
                for y in range(5)
                for x in range(5)
                for flip in (1, -1)
                if np.array_equal(pixels, padded[y : y + 4, x : x + 6][:, ::flip])
            ]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) == 50  # 440 draws, so that each of 50 is missed with 1e-4.


def test_augmentation_differs_between_batches_and_epochs():
    """One image again and again, so that only augmentation can differ."""
    image = np.random.default_rng(0).integers(1, 256, (1, 8, 8, 1), dtype=np.uint8)
    split = Split(image.repeat(64, axis=0), np.zeros(64, np.int32))
    dataset = Dataset("one", split, split, num_classes=1, padding=4, flip=True)
    batches = take(TrainBatches(dataset, 32, seed=0), 4)
    assert len({batch["image"].tobytes() for batch in batches}) == 4


def test_images_do_not_depend_on_the_width_of_default_floats():
    dataset = numbered(padding=2, flip=True)
    with jax.enable_x64(False):
        narrow = take(TrainBatches(dataset, 5, seed=0), 6)
    wide = take(TrainBatches(dataset, 5, seed=0), 6)
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_array_equal(a["label"], b["label"])
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_the_dtype_can_be_chosen(dtype):
    dataset = numbered()
    train = next(TrainBatches(dataset, 5, seed=0, dtype=dtype))
    (test,) = data.test_batches(dataset, 10, dtype=dtype)
    assert train["image"].dtype == test["image"].dtype == dtype


@pytest.mark.parametrize("position", [0, 1, 3, 4, 5, 9])
def test_a_state_is_all_it_takes_to_go_on(position):
    dataset = numbered(padding=2, flip=True)
    batches = TrainBatches(dataset, 5, seed=0)
    take(batches, position)
    state = jax.device_get(batches.state)
    expected = take(batches, 7)
    restored = TrainBatches(dataset, 5, seed=99)
    restored.state = state
    for _ in range(2):  # The second time shows that neither state was consumed.
        for a, b in zip(expected, take(restored, 7), strict=True):
            np.testing.assert_array_equal(a["label"], b["label"])
            np.testing.assert_array_equal(a["image"], b["image"])
        restored.state = state


def test_a_state_is_a_copy_and_names_the_next_batch():
    batches = TrainBatches(numbered(), 5, seed=0)
    held = batches.state
    take(batches, 6)
    assert (int(held.epoch), int(held.step)) == (0, 0)
    assert (int(batches.state.epoch), int(batches.state.step)) == (1, 2)
    batches.state = held
    assert not held.permutation.is_deleted()
    take(batches, 1)
    assert not held.permutation.is_deleted()


def test_a_state_of_other_batches_is_refused():
    batches = TrainBatches(numbered(23), 5, seed=0)
    with pytest.raises(ValueError, match="orders 23 images.*one of 24 images"):
        batches.state = TrainBatches(numbered(24), 5, seed=0).state
    smaller = TrainBatches(numbered(23), 1, seed=0)
    take(smaller, 10)
    with pytest.raises(ValueError, match=r"step in \[0, 4\).*at step 10"):
        batches.state = smaller.state


def test_the_loop_transfers_nothing_between_host_and_device():
    first, second = jax.devices()[:2]
    dataset = numbered(padding=2, flip=True)
    train = TrainBatches(dataset, 5, seed=0, device=first, label_device=second)
    test = data.test_batches(dataset, 4, device=first, label_device=second)
    with jax.transfer_guard("disallow"):
        for _ in range(10):  # Over two epoch boundaries.
            next(train)
        for _ in range(2):
            jax.block_until_ready(list(test))
        jax.block_until_ready(train.state)


@pytest.mark.parametrize(("device", "label_device"), [(1, 2), (2, None), (None, None)])
def test_images_and_labels_lie_where_they_were_asked_to(device, label_device):
    devices = jax.devices()
    asked = {
        "device": None if device is None else devices[device],
        "label_device": None if label_device is None else devices[label_device],
    }
    images_on = devices[device or 0]
    labels_on = asked["label_device"] or images_on
    dataset = numbered()
    train = TrainBatches(dataset, 5, seed=0, **asked)
    for batch in [next(train), next(train), *data.test_batches(dataset, 4, **asked)]:
        assert batch["image"].devices() == {images_on}
        assert batch["label"].devices() == {labels_on}


def test_batches_do_not_depend_on_the_device():
    dataset = numbered(padding=1, flip=True)
    one, other = (
        take(TrainBatches(dataset, 5, seed=0, device=device), 6)
        for device in jax.devices()[:2]
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
def test_evaluation_visits_each_image_once_in_order(batch_size):
    dataset = numbered(padding=2, flip=True)
    batches = data.test_batches(dataset, batch_size)
    assert len(batches) == -(-10 // batch_size)
    for _ in range(2):
        seen = jax.device_get(list(batches))
        sizes = [len(batch["label"]) for batch in seen]
        assert sizes[:-1] == [batch_size] * (len(batches) - 1)
        assert sum(sizes) == 10
        labels = np.concatenate([batch["label"] for batch in seen])
        np.testing.assert_array_equal(labels, np.arange(10))
        images = np.concatenate([batch["image"] for batch in seen])
        expected = (dataset.test.images / 255 - dataset.mean) / dataset.std
        np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_larger_than_the_training_split_is_refused():
    with pytest.raises(ValueError, match="batch_size 24 exceeds the 23 .*at most 23"):
        TrainBatches(numbered(), 24, seed=0)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_holds_at_least_one_image(batch_size):
    with pytest.raises(ValueError, match=f"1 or more, got {batch_size}"):
        TrainBatches(numbered(), batch_size, seed=0)
    with pytest.raises(ValueError, match=f"1 or more, got {batch_size}"):
        data.test_batches(numbered(), batch_size)


def test_images_of_integers_are_refused():
    with pytest.raises(ValueError, match="float type .* got uint8"):
        TrainBatches(numbered(), 5, seed=0, dtype=jnp.uint8)


def test_float64_without_the_64_bit_mode_is_refused_rather_than_narrowed():
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            data.test_batches(numbered(), 5, dtype=jnp.float64)
