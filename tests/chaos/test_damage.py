"""Snapshots whose files are damaged: each is found out, and none is loaded wrongly."""

import json
import random
import shutil

import jax
import numpy as np
import pytest

from fdg_jax import resume
from fdg_jax.snapshot_store import DamagedSnapshotError, SnapshotStore

STEPS = (10, 20)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two whole snapshots, and what is in them."""
    folder = tmp_path_factory.mktemp("snapshots")
    store = SnapshotStore(folder, keep=2)
    contents = {}
    for step in STEPS:
        draw = np.random.default_rng(step)
        arrays = {
            f"stages/{k}/state/params/{i}": draw.normal(size=(7, 40)).astype(np.float32)
            for k in range(2)
            for i in range(12)
        }
        arrays["data/epoch"] = np.int32(step)
        record = {"batch": step, "cuts": [3], "losses": [1 / 3, step]}
        store.write(step, jax.device_put(arrays), record)
        contents[step] = arrays, record
    return folder, contents


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(folder, draw):
    path = draw.choice([p for p in _files(folder) if p.stat().st_size])
    with open(path, "r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))


def flip_bits(folder, draw):
    path = draw.choice([p for p in _files(folder) if p.stat().st_size])
    data = bytearray(path.read_bytes())
    for place in draw.sample(range(len(data)), min(len(data), draw.randint(1, 8))):
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def delete(folder, draw):
    for path in draw.sample(_files(folder), draw.randint(1, 3)):
        path.unlink()


def append(folder, draw):
    path = draw.choice(_files(folder))
    with open(path, "ab") as file:
        file.write(draw.randbytes(draw.randint(1, 64)))


def swap(folder, draw):
    files = [p for p in _files(folder) if p.stat().st_size]
    one, other = draw.sample(files, 2)
    a, b = one.read_bytes(), other.read_bytes()
    if a == b:
        return truncate(folder, draw)
    one.write_bytes(b)
    other.write_bytes(a)


def empty(folder, draw):
    shutil.rmtree(folder)
    folder.mkdir()


def replace_json(folder, draw):
    path = folder / draw.choice(["manifest.json", "record.json"])
    path.write_text(draw.choice(["[]", "{}", "null", "", '{"batch": 1}', "\x00" * 9]))


def garbage(folder, draw):
    path = draw.choice([p for p in _files(folder) if p.stat().st_size])
    path.write_bytes(draw.randbytes(path.stat().st_size))


DAMAGES = (truncate, flip_bits, delete, append, swap, empty, replace_json, garbage)


def _assert_right(stored, contents):
    arrays, record = contents[stored.step]
    assert stored.record == record
    got = stored.arrays()
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


def _damage(original, tmp_path, count):
    """Damages copies of one or both snapshots; returns how each case ended."""
    source, contents = original
    outcomes = {"skipped": 0, "refused": 0, "harmless": 0}
    for seed in range(count):
        draw = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(source, folder)
        victims = STEPS if draw.random() < 0.3 else STEPS[1:]
        for step in victims:
            draw.choice(DAMAGES)(folder / str(step), draw)
        store, warnings = SnapshotStore(folder, keep=2), []
        try:
            found = resume.newest_whole(store, warnings.append)
        except ValueError as error:
            assert victims == STEPS and "none is whole" in str(error)
            outcomes["refused"] += 1
        else:
            # Whatever is handed out is right, to the last bit.
            _assert_right(found, contents)
            if found.step == STEPS[1]:
                outcomes["harmless"] += 1
                continue
            assert found.step not in victims or len(victims) == 2
            outcomes["skipped"] += 1
        assert any(str(folder / str(STEPS[1])) in line for line in warnings)
        with pytest.raises(DamagedSnapshotError):
            store.read(STEPS[1])
        shutil.rmtree(folder)
    print(f"{count} damaged snapshots: {json.dumps(outcomes)}, none loaded wrongly")
    return outcomes


def test_some_damage_is_found_out(original, tmp_path):
    outcomes = _damage(original, tmp_path, 40)
    assert outcomes["skipped"] and outcomes["refused"]
    # White space in a manifest, say: what is handed out was compared all the same.
    assert outcomes["harmless"] <= 2


@pytest.mark.slow
def test_two_hundred_damages_are_found_out(original, tmp_path):
    outcomes = _damage(original, tmp_path, 200)
    assert outcomes["harmless"] <= 6


def test_what_is_not_damaged_is_loaded(original):
    folder, contents = original
    for step in STEPS:
        _assert_right(SnapshotStore(folder, keep=2).read(step), contents)
