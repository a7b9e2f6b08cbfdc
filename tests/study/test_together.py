"""Seeds of a study that are trained as one program."""

import json
import pathlib
import signal
import subprocess
import time

import pytest

import study_folders as folders
from fdg_jax import resume, training
from fdg_jax.study import cell as process
from fdg_jax.study import results, runner

OVERRIDES = {
    "engine": "fused",
    "num_epochs": 2,
    "learning_rate": 0.02,
    "learning_rate_milestones": (),
    "log_every_steps": 2,
    "snapshot_every_steps": 8,
}


def _cells(caches, **changes):
    return folders.cells(
        {"num_stages": 2, "cuts": "3"},
        overrides=OVERRIDES | {"compilation_cache": str(caches)} | changes,
        seeds=(0, 1),
        seeds_together=True,
    )


def _snapshots(folder):
    return list(folder.glob("snapshots/*/manifest.json"))


def _losses(folder):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["train_loss"] for x in lines if "train_loss" in x}


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_seeds_together_are_stopped_go_on_and_come_out_as_alone(tmp_path):
    cells = _cells(tmp_path / "caches")
    assert all(cell.together for cell in cells)
    command = runner._command([tmp_path / c.name for c in cells], together=True)
    with _started(cells, tmp_path, command) as started:
        while not all(_snapshots(tmp_path / cell.name) for cell in cells):
            assert started.poll() is None
            time.sleep(0.02)
        started.send_signal(signal.SIGTERM)
        assert started.wait(100) == 128 + signal.SIGTERM
    for cell in cells:
        assert not resume.is_finished(tmp_path / cell.name)
        log = (tmp_path / cell.name / "log.txt").read_text()
        assert log.count("stopped by SIGTERM") == 1

    assert runner.run(cells, tmp_path, lambda: None) is None
    for cell in cells:
        assert resume.is_finished(tmp_path / cell.name)
        log = (tmp_path / cell.name / "log.txt").read_text()
        assert log.count("final test accuracy") == 1
        # float32 drifts apart as training goes on, and other seeds from the start.
        alone = tmp_path / "alone" / cell.name
        training.train_and_evaluate(cell.config, alone)
        ours, theirs = _losses(tmp_path / cell.name), _losses(alone)
        assert ours.keys() == theirs.keys()
        first = [step for step in ours if step <= 10]
        assert [ours[i] for i in first] == pytest.approx(
            [theirs[i] for i in first], 1e-3
        )
    assert _losses(tmp_path / cells[0].name) != _losses(tmp_path / cells[1].name)


def _started(cells, workdir, command):
    for cell in cells:
        (workdir / cell.name).mkdir()
    started = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=pathlib.Path(process.__file__).parents[2],
    )
    for cell in cells:
        started.stdin.write(json.dumps(cell.config.to_dict()).encode() + b"\n")
    started.stdin.flush()
    return started


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_seed_that_fails_leaves_the_others_alone(tmp_path):
    cells = _cells(tmp_path / "caches", num_epochs=1)
    (tmp_path / cells[0].name / "snapshots").mkdir(parents=True)
    (tmp_path / cells[0].name / "config.json").write_text("{")  # of a run that began
    runner.run(cells, tmp_path, lambda: None)
    ended = [results.read(cell, tmp_path) for cell in cells]
    assert [run.state for run in ended] == ["failed", "finished"]
    assert "config.json" in ended[0].reason
    assert "config.json" not in (tmp_path / cells[1].name / "log.txt").read_text()


def test_only_the_fused_engine_trains_seeds_together(tmp_path):
    cells = _cells(tmp_path, engine="threads")
    assert not any(cell.together for cell in cells)
