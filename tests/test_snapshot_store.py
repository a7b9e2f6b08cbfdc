import errno
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax import snapshot_store
from fdg_jax.snapshot_store import DamagedSnapshotError, SnapshotStore

ODD_NAMES = ["?", "[a]", "*", "b[1]", "\\", "gs:", "a\nb", "%2F", "\udcff"]
ARRAYS = {
    "stages/0/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "stages/0/n": np.uint32(7),
    "stages/1/half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
}
RECORD = {"batch": 3, "loss": 1 / 3, "names": ["a", None]}


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "snapshots", keep=2)


def test_what_is_read_is_what_was_written(store):
    store.write(3, ARRAYS, RECORD)
    stored = store.read(3)
    assert (stored.step, stored.record) == (3, RECORD)
    arrays = stored.arrays()
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], np.asarray(array))
        assert arrays[name].dtype == array.dtype
        assert isinstance(arrays[name], np.ndarray)


def test_the_newest_ones_are_kept_and_counted_as_numbers(store):
    for step in (9, 10, 100):
        store.write(step, ARRAYS, RECORD)
        store.remove_old()
    assert store.steps() == [100, 10]


def test_nothing_is_made_before_the_first_write(store, tmp_path):
    assert store.steps() == []
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_of_the_same_step_stays_unless_it_is_damaged(store, tmp_path):
    store.write(3, ARRAYS, RECORD)
    store.write(3, {"stages/0/w": np.zeros(2)}, {"batch": 4})
    assert store.read(3).record == RECORD
    (tmp_path / "snapshots/3/record.json").unlink()
    store.write(3, {"stages/0/w": np.zeros(2)}, {"batch": 4})
    stored = store.read(3)
    assert stored.record == {"batch": 4}
    assert list(stored.arrays()) == ["stages/0/w"]


def test_a_file_that_cannot_be_read_is_a_damaged_snapshot(store, monkeypatch):
    store.write(3, ARRAYS, RECORD)

    def broken(file, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(snapshot_store.hashlib, "file_digest", broken)
    with pytest.raises(DamagedSnapshotError, match="3 cannot be read.*Input/output"):
        store.read(3)


def test_later_snapshots_are_removed(tmp_path):
    store = SnapshotStore(tmp_path / "snapshots", keep=5)
    for step in (1, 20, 300):
        store.write(step, ARRAYS, RECORD)
    store.remove_after(20)
    assert store.steps() == [20, 1]


@pytest.mark.parametrize("fails", ["_write_json", "_digests"])
def test_a_write_that_fails_leaves_the_snapshots_before(store, monkeypatch, fails):
    store.write(3, ARRAYS, RECORD)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot_store, fails, full)
        with pytest.raises(OSError, match="No space"):
            store.write(4, ARRAYS, RECORD)
    assert store.steps() == [3]
    assert [path.name for path in (store._directory).iterdir()] == ["3"]
    assert store.read(3).record == RECORD


def test_what_a_dead_process_left_is_no_snapshot_and_goes(store, tmp_path):
    left = tmp_path / "snapshots" / "7.partial" / "arrays"
    left.mkdir(parents=True)
    assert store.steps() == []
    store.write(8, ARRAYS, RECORD)
    assert not left.exists()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_snapshot_is_kept_in_a_folder_of_any_name(tmp_path, name):
    # A pattern of the first names would also match this.
    SnapshotStore(tmp_path / "a" / "snapshots", keep=1).write(3, ARRAYS, {})
    store = SnapshotStore(tmp_path / name / "snapshots", keep=1)
    other = {"stages/0/w": np.arange(4.0)}
    store.write(3, other, RECORD)
    arrays = store.read(3).arrays()
    assert arrays.keys() == other.keys()
    np.testing.assert_array_equal(arrays["stages/0/w"], other["stages/0/w"])


RESTORE = """
import pathlib, sys
from fdg_jax.snapshot_store import StoredSnapshot

for _ in range(10):
    try:
        StoredSnapshot(3, {}, pathlib.Path(sys.argv[1])).arrays()
    except ValueError:
        print("refused")
"""


def test_arrays_that_cannot_be_read_are_told_in_no_other_way(store, tmp_path):
    store.write(3, {f"stages/{i}/w": np.arange(3e4) for i in range(100)}, RECORD)
    for path in (tmp_path / "snapshots/3/arrays/d").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    root = pathlib.Path(snapshot_store.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path / "snapshots/3")],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.stderr, done.stdout) == ("", "refused\n" * 10)
    assert done.returncode == 0


def test_a_missing_snapshot_is_a_damaged_one(store):
    with pytest.raises(DamagedSnapshotError, match="manifest.json cannot be read"):
        store.read(5)
