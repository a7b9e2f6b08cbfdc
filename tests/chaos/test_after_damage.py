"""After damage a run goes on: what it writes from then on is what it goes on from."""

import pathlib

import numpy as np
import pytest

from fdg_jax import resume
from fdg_jax.snapshot_store import DamagedSnapshotError, SnapshotStore


def _write(store, step):
    store.write(step, {"stages/0/w": np.full(50, step, np.float32)}, {"batch": step})


def _damage(folder):
    (folder / "record.json").write_text("{}")


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("damaged", [(40,), (30, 40)])
def test_what_is_written_after_damage_is_gone_on_from(tmp_path, keep, damaged):
    """The number to keep may have been larger when the damaged ones were written."""
    before = SnapshotStore(tmp_path, keep=4)
    for step in (10, 20, 30, 40):
        _write(before, step)
    for step in damaged:
        _damage(tmp_path / str(step))
    store = SnapshotStore(tmp_path, keep=keep)
    begun = resume.newest_whole(store, lambda line: None).step
    assert begun == min(damaged) - 10
    for step in (begun + 3, begun + 6):
        _write(store, step)
        found = resume.newest_whole(store, lambda line: None)
        assert (found.step, found.record) == (step, {"batch": step})
        np.testing.assert_array_equal(found.arrays()["stages/0/w"], step)
    # As many are whole as are to be kept, however many damaged ones there were.
    whole = []
    for step in store.steps():
        try:
            whole.append(store.read(step).step)
        except DamagedSnapshotError:
            pass
    assert len(whole) == keep


def test_a_damaged_snapshot_is_replaced_by_one_of_its_step(tmp_path):
    store = SnapshotStore(tmp_path, keep=2)
    _write(store, 10)
    _damage(tmp_path / "10")
    _write(store, 10)
    assert store.read(10).record == {"batch": 10}


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/mem").exists(), reason="needs a file that fails"
)
def test_a_file_that_the_disk_no_longer_gives_is_damage(tmp_path):
    store = SnapshotStore(tmp_path, keep=2)
    for step in (10, 20):
        _write(store, step)
    (tmp_path / "20" / "record.json").unlink()
    # It opens, and reading it fails with "Input/output error", as with a bad sector.
    (tmp_path / "20" / "record.json").symlink_to("/proc/self/mem")
    warnings = []
    assert resume.newest_whole(store, warnings.append).step == 10
    assert len(warnings) == 1 and "step 20 is damaged" in warnings[0]
