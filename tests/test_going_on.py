"""A stopped run goes on as if it had not been stopped: in process, every engine."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import safetensors.numpy

import fdg_jax as fdg
from configs import digits
from fdg_jax import checkpoint, data, lock, resume, trained, training
from fdg_jax.snapshot_store import SnapshotStore, StoredSnapshot
from fdg_jax.stage import Stage
from fdg_jax.stopping import Stopped, Stopping


def _config(**changes):
    config = digits.get_config()
    config.update(
        {
            "num_epochs": 2,
            "learning_rate_milestones": (),
            "progress": False,
            "batch_size": 128,  # 11 batches in an epoch
            "log_every_steps": 3,
            "num_stages": 3,
            "cuts": "1,3",
            "engine": "threads",
            "snapshot_every_minutes": 0.0,
        }
        | changes
    )
    return config


class _StopAt(Stopping):
    """Asks to stop once it was asked so often, as is done before each batch."""

    def __init__(self, count):
        super().__init__(seconds=60)
        self._left = count

    @property
    def signal(self):
        self._left -= 1
        return signal.SIGTERM if self._left < 0 else None

    @signal.setter
    def signal(self, value):
        pass


def _train(config, workdir, stop_after=None):
    experiment = training.prepare(config, workdir)
    if stop_after is None:
        return training.run(experiment)
    with pytest.raises(Stopped) as stopped:
        training.run(experiment, _StopAt(stop_after))
    return stopped.value.step


def _lines(workdir):
    lines = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def _arrays(workdir):
    network, _ = fdg.load(workdir)
    return checkpoint.network_arrays(network)


def _assert_same_run(workdir, whole, tolerance=0.0):
    if not tolerance:
        assert _lines(workdir) == _lines(whole)
    got, expected = _arrays(workdir), _arrays(whole)
    assert got.keys() == expected.keys()
    for name in expected:
        if tolerance:
            np.testing.assert_allclose(
                got[name], expected[name], rtol=tolerance, atol=tolerance
            )
        else:
            np.testing.assert_array_equal(got[name], expected[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    _train(_config(), workdir)
    return workdir


@pytest.mark.parametrize("stop_after", [0, 4, 11, 12, 13, 14, 21])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, stop_after):
    # In the first epoch, at its end, in and after its evaluation, in the second.
    step = _train(_config(), tmp_path, stop_after)
    assert min(stop_after, 11) <= step <= stop_after
    experiment = training.prepare(_config(), tmp_path)
    assert experiment.start.step == step  # it goes on, and does not begin again
    training.run(experiment)
    _assert_same_run(tmp_path, whole)
    got, expected = (
        json.loads((w / "summary.json").read_text()) for w in (tmp_path, whole)
    )
    for key in ("final_test_accuracy", "best_test_accuracy", "steps"):
        assert got[key] == expected[key]


@pytest.mark.slow
def test_a_run_may_be_stopped_again_and_again(tmp_path, whole):
    steps = []
    while not resume.is_finished(tmp_path):
        experiment = training.prepare(_config(), tmp_path)
        try:
            # More often than an evaluation asks, for one that is stopped begins anew.
            training.run(experiment, _StopAt(6))
        except Stopped as stopped:
            steps.append(stopped.step)
            assert len(steps) < 20
    assert len(steps) >= 4 and steps == sorted(steps)
    _assert_same_run(tmp_path, whole)


def test_another_engine_may_go_on(tmp_path, whole):
    _train(_config(engine="serial"), tmp_path, stop_after=5)
    _train(_config(engine="threads"), tmp_path, stop_after=6)
    _train(_config(engine="serial"), tmp_path)
    _assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param(("threads", "fused"), marks=pytest.mark.slow),
        ("fused", "threads"),
    ],
)
def test_the_fused_engine_goes_on_within_its_tolerance(tmp_path, engines):
    # Few steps: float32 differences grow with training.
    first, second = (
        _config(engine=engine, num_epochs=1, learning_rate=0.01) for engine in engines
    )
    _train(first, tmp_path / "parts", stop_after=5)
    _train(second, tmp_path / "parts")
    _train(first, tmp_path / "whole")
    _assert_same_run(tmp_path / "parts", tmp_path / "whole", tolerance=2e-3)


@pytest.mark.slow
def test_balanced_cuts_are_measured_once(tmp_path, monkeypatch):
    config = _config(cuts="balanced", num_epochs=1)
    step = _train(config, tmp_path, stop_after=5)
    cuts = json.loads((tmp_path / f"snapshots/{step}/record.json").read_text())["cuts"]

    def fail(*args, **kwargs):
        raise AssertionError("measured anew")

    monkeypatch.setattr("fdg_jax.costs.measure", fail)
    experiment = training.prepare(config, tmp_path)
    assert [stage.blocks.start for stage in experiment.pipeline.stages[1:]] == cuts


def test_a_killed_run_goes_on_from_its_newest_snapshot(tmp_path, whole, monkeypatch):
    """What a kill leaves: logs ahead of the newest snapshot, and half-written files."""

    class Killed(BaseException):
        pass

    def die(report, metrics, batch=training.Report.batch):
        batch(report, metrics)
        if report.step == 17:
            raise Killed

    config = _config(snapshot_every_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(training.Report, "batch", die)
        with pytest.raises(Killed):
            training.train_and_evaluate(config, tmp_path)
    (tmp_path / "snapshots" / "17.partial").mkdir()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "ep')
    experiment = training.prepare(config, tmp_path)
    assert 4 <= experiment.start.step <= 17
    training.run(experiment)
    _assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("moves_on", [True, False])
def test_a_run_that_stalls_takes_a_snapshot_if_it_can(
    tmp_path, whole, monkeypatch, moves_on
):
    limit = 2.0
    experiment = training.prepare(
        _config(stop_seconds=60.0 if moves_on else 0.5), tmp_path
    )

    def slow(stage, state, gradient, original=Stage.update):
        number = int(state.batch.number)
        if (stage.index, number) == (2, 5):  # everything is compiled by now
            experiment.pipeline._patience.seconds = limit
        if (stage.index, number) == (2, 8):
            time.sleep(4 * limit)
        return original(stage, state, gradient)

    monkeypatch.setattr(Stage, "update", slow)
    with pytest.raises(fdg.StalledError, match="for 2 seconds") as stalled:
        training.run(experiment)
    steps = [path.name for path in tmp_path.glob("snapshots/*")]
    notes = getattr(stalled.value, "__notes__", [])
    if moves_on:
        assert notes == [f"there is a snapshot of step {steps[0]}"]
    else:
        assert steps == notes == []
    monkeypatch.undo()
    _train(_config(stop_seconds=60.0), tmp_path)
    _assert_same_run(tmp_path, whole)


def test_a_damaged_snapshot_gives_way_to_the_one_before(tmp_path, whole):
    first = _train(_config(), tmp_path, stop_after=4)
    second = _train(_config(), tmp_path, stop_after=8)
    assert second > first
    files = [p for p in (tmp_path / f"snapshots/{second}").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    experiment = training.prepare(_config(), tmp_path)
    assert experiment.start.step == first
    assert str(second) in experiment.warnings[0] and "damaged" in experiment.warnings[0]
    training.run(experiment)
    _assert_same_run(tmp_path, whole)


def test_where_no_snapshot_is_whole_there_is_no_silent_start(tmp_path):
    step = _train(_config(), tmp_path, stop_after=4)
    (tmp_path / f"snapshots/{step}/record.json").unlink()
    with pytest.raises(ValueError, match="none is whole.*record.json is missing"):
        training.prepare(_config(), tmp_path)
    summary = training.train_and_evaluate(_config(restart=True), tmp_path)
    assert summary["steps"] == 22


def test_a_changed_config_is_refused_with_what_differs(tmp_path):
    _train(_config(), tmp_path, stop_after=4)
    with pytest.raises(ValueError) as refused:
        training.prepare(_config(seed=1, shrink=0.5, engine="serial"), tmp_path)
    message = str(refused.value)
    assert "seed: 0 was asked then, 1 now" in message
    assert "shrink: 1.0 was asked then, 0.5 now" in message
    assert "engine" not in message and "--config.restart=true" in message


def test_other_images_are_refused(tmp_path):
    """As another ``data_dir`` may hold, though the key itself may change."""
    step = _train(_config(), tmp_path, stop_after=4)
    dataset = data.load("digits")
    images = dataset.train.images.copy()
    images[7, 3, 3] += 1
    other = dataclasses.replace(
        dataset, train=dataclasses.replace(dataset.train, images=images)
    )
    with pytest.raises(ValueError, match=f"others than at the snapshot of step {step}"):
        training.prepare(_config(), tmp_path, other)
    assert training.prepare(_config(data_dir="moved"), tmp_path, dataset).start


def test_a_refused_snapshot_of_other_versions_says_so(tmp_path, monkeypatch):
    _train(_config(), tmp_path, stop_after=4)
    then = resume.versions()
    monkeypatch.setattr(resume, "versions", lambda: then | {"jax": "99.0"})

    def refuse(*args):
        raise ValueError("a snapshot must be of the same pipeline; it lacks 0/x")

    monkeypatch.setattr(resume, "restore_pipeline", refuse)
    with pytest.raises(ValueError, match=r"it lacks 0/x; .* other versions.*99\.0 now"):
        training.prepare(_config(), tmp_path)


def test_a_snapshot_of_another_version_that_does_not_fit_names_it(
    tmp_path, monkeypatch
):
    _train(_config(), tmp_path, stop_after=4)
    monkeypatch.setattr(fdg, "__version__", "99.0")

    def refuse(*args):
        raise ValueError("it lacks 0/state/progress/skipped")

    monkeypatch.setattr(resume.snapshots, "from_arrays", refuse)
    here = re.escape(resume.versions()["fdg_jax"])
    for attempt in (
        lambda: training.prepare(_config(), tmp_path),
        lambda: fdg.load(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"of 0.2.0, and here is {here}.*restart"):
            attempt()


def test_another_setting_of_jax_is_warned_of(tmp_path, monkeypatch):
    _train(_config(), tmp_path, stop_after=4)
    assert training.prepare(_config(), tmp_path).warnings == ()
    now = resume.jax_config() | {"jax_threefry_partitionable": "other"}
    monkeypatch.setattr(resume, "jax_config", lambda: now)
    (line,) = training.prepare(_config(), tmp_path).warnings
    assert "jax_threefry_partitionable True then, other now" in line


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("a bug")])
def test_a_snapshot_that_cannot_be_written_is_told(
    tmp_path, whole, monkeypatch, capsys, error
):
    def fail(*args):
        raise error

    experiment = training.prepare(_config(snapshot_every_steps=8), tmp_path)
    monkeypatch.setattr(SnapshotStore, "write", fail)
    training.run(experiment)
    kind = "" if isinstance(error, OSError) else "RuntimeError: "
    told = rf"the snapshot of step \d+ could not be written: {kind}{error}; training"
    assert re.search(told, capsys.readouterr().out)
    _assert_same_run(tmp_path, whole)


def test_an_old_snapshot_that_stays_does_not_count_as_one_not_written(
    tmp_path, monkeypatch, capsys
):
    def fail(store):
        raise OSError("busy")

    monkeypatch.setattr(SnapshotStore, "remove_old", fail)
    step = _train(_config(), tmp_path, stop_after=4)
    assert training.prepare(_config(), tmp_path).start.step == step
    told = f"snapshots older than that of step {step} could not be removed: busy"
    assert told in capsys.readouterr().out


def test_starting_over_must_be_said_and_removes_the_old_run(tmp_path, whole):
    _train(_config(seed=1), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    _train(_config(restart=True), tmp_path)
    _assert_same_run(tmp_path, whole)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "snapshots").exists()


def test_a_run_that_has_ended_is_not_trained_again(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(training, "prepare", None)
    summary = training.train_and_evaluate(_config(), whole)
    assert summary == json.loads((whole / "summary.json").read_text())


def test_a_disk_without_room_is_refused_at_the_start(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs room for its snapshots.*has 1 MiB"):
        training.prepare(_config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# --- what was trained -------------------------------------------------------------


def test_a_run_is_loaded_evaluated_and_exported(whole):
    network, config = fdg.load(whole)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    one_by_one = [network(images[i : i + 1])[0] for i in range(4)]
    np.testing.assert_allclose(one_by_one, network(images), rtol=1e-4, atol=1e-5)
    assert config.to_dict() == resume.read_config(whole)
    summary = json.loads((whole / "summary.json").read_text())
    metrics = trained.evaluate(_config(), whole)
    assert metrics["accuracy"] == pytest.approx(summary["final_test_accuracy"])
    paths = trained.export(whole)
    arrays = checkpoint.network_arrays(network)
    exported = safetensors.numpy.load_file(paths["safetensors"])
    assert exported.keys() == arrays.keys()
    other = fdg.models.create(config.network, in_channels=1, seed=5)
    from_orbax = checkpoint.network_arrays(
        checkpoint.restore_network(other, paths["orbax"])
    )
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, exported[name])
        np.testing.assert_array_equal(array, from_orbax[name])


def test_a_later_export_is_of_the_later_network(tmp_path):
    _train(_config(), tmp_path, stop_after=4)
    early = safetensors.numpy.load_file(trained.export(tmp_path)["safetensors"])
    _train(_config(), tmp_path)
    paths = trained.export(tmp_path)
    late = safetensors.numpy.load_file(paths["safetensors"])
    assert any(not np.array_equal(early[name], late[name]) for name in late)
    other = fdg.models.create(_config().network, in_channels=1, seed=5)
    checkpoint.restore_network(other, paths["orbax"])
    for name, array in checkpoint.network_arrays(other).items():
        np.testing.assert_array_equal(array, late[name])
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["newest"]


def test_one_process_at_a_time_exports_a_run(whole, monkeypatch):
    paths = trained.export(whole)
    monkeypatch.setattr(trained, "_EXPORT_SECONDS", 0.0)
    with open(whole / ".export.lock", "ab") as file:
        assert lock.acquire(file, 0.0)
        with pytest.raises(ValueError, match="one process at a time exports a run"):
            trained.export(whole)
    assert trained.export(whole) == paths


def test_evaluation_has_the_config_of_the_run(whole):
    """All that another command line says is where and in what portions."""
    expected = trained.evaluate(_config(), whole)
    other = _config(network="resnet20", seed=7, num_stages=2, eval_batch_size=100)
    got = trained.evaluate(other, whole)
    assert got["accuracy"] == pytest.approx(expected["accuracy"])
    assert got["loss"] == pytest.approx(expected["loss"])


def test_keys_that_an_older_config_lacks_are_named(tmp_path, whole):
    def without(workdir, keys):
        config = json.loads((whole / "config.json").read_text())
        for key in keys:
            del config[key]
        (workdir / "config.json").write_text(json.dumps(config))

    step = _train(_config(), tmp_path, stop_after=4)
    known = set(_config())
    network, pipeline = set(trained.NETWORK_KEYS), set(trained.PIPELINE_KEYS)
    assert network | pipeline <= known
    without(tmp_path, known - network - pipeline)
    newest = checkpoint.network_arrays(fdg.load(tmp_path)[0])  # which needs no more
    assert newest and step
    for key in sorted(network | pipeline):
        without(tmp_path, [key])
        with pytest.raises(ValueError, match=f"lacks {key}; add"):
            fdg.load(tmp_path)
    without(tmp_path, ["seed", "network"])
    with pytest.raises(ValueError, match="lacks network, seed; add"):
        trained.export(tmp_path)
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(whole / "summary.json", tmp_path)
    without(tmp_path, known - network)
    assert trained.evaluate(_config(), tmp_path) == trained.evaluate(_config(), whole)


def test_a_snapshot_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(
    tmp_path, monkeypatch
):
    config = _config(snapshots_kept=9)
    steps = [_train(config, tmp_path, stop_after=n) for n in (4, 8)]
    expected = _arrays(tmp_path)
    newer = tmp_path / f"snapshots/{steps[1]}"
    newer.rename(tmp_path / "away")
    read = StoredSnapshot.arrays

    def removed(stored):
        if stored.step == steps[0]:  # the run has moved on meanwhile
            (tmp_path / "away").rename(newer)
            shutil.rmtree(stored.folder)
        return read(stored)

    monkeypatch.setattr(StoredSnapshot, "arrays", removed)
    got = _arrays(tmp_path)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)


def test_a_run_that_lost_its_network_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_config().to_dict()))
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="has none there; train again"):
        fdg.load(tmp_path)


def test_starting_over_first_removes_what_says_that_a_run_has_ended(
    tmp_path, monkeypatch
):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").touch()
    (tmp_path / "summary.json").touch()

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(resume.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        resume.remove_run(tmp_path)
    assert not resume.is_finished(tmp_path)
    assert resume.has_run(tmp_path)


def test_a_run_on_its_way_is_loaded_from_its_snapshot(tmp_path):
    config = _config(eval_every_epochs=1)
    _train(config, tmp_path, stop_after=18)
    experiment = training.prepare(config, tmp_path)
    with experiment.pipeline as pipeline:
        expected = checkpoint.network_arrays(pipeline.network)
        metrics = pipeline.evaluate_metrics(experiment.test_batches)
    newest = _arrays(tmp_path)
    for name, array in expected.items():
        np.testing.assert_array_equal(newest[name], array)
    evaluated = trained.evaluate(config, tmp_path)
    assert evaluated["accuracy"] == pytest.approx(metrics["accuracy"])
    best = checkpoint.network_arrays(fdg.load(tmp_path, "best")[0])
    assert any(not np.array_equal(best[name], newest[name]) for name in best)


def test_a_trained_network_may_start_under_other_cuts(tmp_path, whole):
    config = _config(init_from=str(whole), num_stages=2, cuts="2", num_epochs=1)
    experiment = training.prepare(config, tmp_path)
    begun = checkpoint.network_arrays(experiment.pipeline.network)
    for name, array in _arrays(whole).items():
        np.testing.assert_array_equal(begun[name], array)
    assert training.run(experiment)["steps"] == 11


def test_what_cannot_be_loaded_is_refused(tmp_path, whole):
    with pytest.raises(ValueError, match="has no config.json"):
        fdg.load(tmp_path)
    with pytest.raises(ValueError, match="newest, best; got 'bst'; did you mean"):
        fdg.load(whole, "bst")
    with pytest.raises(ValueError, match="same network"):
        training.prepare(_config(init_from=str(whole), network="resnet20"), tmp_path)
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    with pytest.raises(ValueError, match="no newest network yet"):
        fdg.load(tmp_path)
