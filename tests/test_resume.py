import errno
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import digits
from fdg_jax import resume


def _begun(workdir, **changes):
    config = digits.get_config()
    config.update(changes)
    workdir.mkdir(exist_ok=True)
    resume.write_json(workdir / "config.json", config.to_dict())


def test_the_same_config_may_go_on(tmp_path):
    _begun(tmp_path)
    resume.check_config(digits.get_config(), tmp_path)


def test_every_key_is_either_harmless_or_refused(tmp_path):
    _begun(tmp_path)
    for key, value in digits.get_config().items():
        changed = json.loads((tmp_path / "config.json").read_text())
        changed[key] = "something else" if value != "something else" else None
        other = tmp_path / key
        other.mkdir()
        (other / "config.json").write_text(json.dumps(changed))
        if key in resume.HARMLESS:
            resume.check_config(digits.get_config(), other)
        else:
            with pytest.raises(ValueError, match=f"differ: {key}: 'something else'"):
                resume.check_config(digits.get_config(), other)


def test_harmless_keys_are_those_that_change_no_number():
    assert resume.HARMLESS == {
        "data_dir",  # for which the images themselves are looked at
        "engine",
        "compilation_cache",
        "mode",
        "restart",
        "log_every_steps",
        "progress",
        "timeline",
        "snapshot_every_steps",
        "snapshot_every_minutes",
        "snapshots_kept",
        "stop_seconds",
        "stall_timeout",
    }
    assert set(digits.get_config()) >= resume.HARMLESS


def test_a_key_of_an_older_version_is_told(tmp_path):
    _begun(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["shrink"]
    config["shrinkage"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as refused:
        resume.check_config(digits.get_config(), tmp_path)
    assert "shrink: None was unknown then, 1.0 now" in str(refused.value)
    assert "shrinkage: 1.0 was asked then, None now" in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', "\x00"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="a run's config is in"):
        resume.read_config(tmp_path)


def test_logs_are_taken_back_to_a_snapshot(tmp_path):
    metrics, old, new = (
        tmp_path / name
        for name in ("metrics.jsonl", "events.out.tfevents.1", "events.out.tfevents.2")
    )
    metrics.write_text("one\n")
    old.write_text("event")
    sizes = resume.log_sizes(tmp_path)
    assert sizes == {"metrics.jsonl": 4, "events.out.tfevents.1": 5}
    metrics.write_text("one\ntwo\nthr")
    new.write_text("event")
    (tmp_path / "notes.txt").write_text("mine")
    resume.rewind_logs(tmp_path, sizes)
    assert metrics.read_text() == "one\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "events.out.tfevents.1",
        "metrics.jsonl",
        "notes.txt",
    ]
    resume.rewind_logs(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_log_that_has_lost_its_end_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("one\n")
    assert resume.log_warnings(tmp_path, {"metrics.jsonl": 4}) == []
    (line,) = resume.log_warnings(tmp_path, {"metrics.jsonl": 5})
    assert "metrics.jsonl has lost its end" in line
    assert len(resume.log_warnings(tmp_path, {"events.out.tfevents.1": 1})) == 1


def test_removing_a_run_removes_all_of_it_and_nothing_else(tmp_path):
    _begun(tmp_path)
    for name in ("snapshots/3", "checkpoints/3", "export/newest"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "events.out.tfevents.1", "mine.txt"):
        (tmp_path / name).touch()
    resume.remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_events_without_a_config_are_left_alone(tmp_path):
    (tmp_path / "events.out.tfevents.1").touch()
    with pytest.raises(ValueError, match="events.out.tfevents.1 but no config.json"):
        resume.check_workdir(tmp_path)


def test_older_snapshots_count_as_room(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    (tmp_path / "snapshots" / "5").mkdir(parents=True)
    (tmp_path / "snapshots" / "5" / "a").write_bytes(bytes(60))
    resume.check_free_space(tmp_path, needed=160)
    with pytest.raises(ValueError, match="needs room"):
        resume.check_free_space(tmp_path, needed=161)


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "summary.json"
    resume.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        resume.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_other_versions_are_told():
    now = resume.versions()
    assert resume.change_warnings({"versions": now}) == []
    (line,) = resume.change_warnings({"versions": now | {"jax": "0.0.1"}})
    assert f"jax 0.0.1 then, {now['jax']} now" in line and "flax" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_default_prng_impl", "rbg"),
        ("jax_default_matmul_precision", "float32"),
        ("jax_enable_x64", False),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_random_seed_offset", 1),
    ],
)
def test_other_settings_of_jax_are_told(name, value):
    then = json.loads(json.dumps(resume.jax_config()))
    record = {"versions": resume.versions(), "jax_config": then}
    assert resume.change_warnings(record) == []
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        (line,) = resume.change_warnings(record)
        now = str(getattr(jax.config, name))
    finally:
        jax.config.update(name, before)
    assert f"{name} {before} then, {now} now" in line
    assert line.count(" then, ") == 1


def test_settings_that_a_version_of_jax_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(resume, "_JAX_CONFIG", ("jax_enable_x64", "jax_no_such"))
    assert resume.jax_config().keys() == {"jax_enable_x64"}
    record = {"versions": resume.versions(), "jax_config": {"jax_gone": "True"}}
    assert resume.change_warnings(record) == []


@pytest.mark.parametrize("name", ["a/b", "a[1]\\\udcff", "gs:/b", "."])
def test_trying_a_folder_leaves_nothing(tmp_path, name):
    resume.check_files(tmp_path / name, name_length=150)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lacking", ["rename", "replace"])
def test_a_folder_where_files_cannot_be_renamed_is_refused(
    tmp_path, monkeypatch, lacking
):
    def fail(path, target):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pathlib.Path, lacking, fail)
    with pytest.raises(ValueError, match="read back; in .*/b that .*not implemented"):
        resume.check_files(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_gives_back_other_numbers_is_refused(tmp_path, monkeypatch):
    other = {"a": np.zeros(3)}
    monkeypatch.setattr(resume.checkpoint, "restore_arrays", lambda *a, **k: other)
    with pytest.raises(ValueError, match="other numbers than were written"):
        resume.check_files(tmp_path)


def test_what_a_killed_trial_has_left_is_removed(tmp_path):
    (tmp_path / ".tried-abc" / "snapshots").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    resume.remove_tried(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_too_little_room_is_refused(tmp_path):
    resume.check_free_space(tmp_path / "not" / "there", needed=1)
    with pytest.raises(ValueError, match="needs room for its snapshots"):
        resume.check_free_space(tmp_path, needed=2**70)
