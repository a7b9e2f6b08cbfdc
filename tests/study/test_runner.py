"""The runner with processes that only pretend to train."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import study_folders as folders
from fdg_jax import lock, resume
from fdg_jax.study import results, runner

FINISH = """
import json, pathlib, sys
for folder in map(pathlib.Path, sys.argv[1:]):
    config = json.loads(sys.stdin.readline())
    (folder / "config.json").write_text(json.dumps(config))
    summary = {"final_test_accuracy": 0.75, "best_test_accuracy": 0.75}
    summary |= {"engine": "fused", "device_kind": "cpu", "host": "", "versions": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    print("trained")
"""
FAIL = "print('all well'); print('no such file\\n'); raise SystemExit(1)"
DIVERGE = "print('the loss of batch 2 is nan'); raise SystemExit(3)"
DIE = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
WAIT = """
import pathlib, signal, sys, time
def leave(number, frame):
    print("leaving at", number)
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, leave)
(pathlib.Path(sys.argv[1]) / "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def pretend(monkeypatch):
    """Has cells run programs, by what their names hold; otherwise they finish."""

    def have(**programs):
        def command(group, together):
            names = [folder.name for folder in group]
            held = [p for name, p in programs.items() if f"-{name}-" in names[0]]
            return [sys.executable, "-c", *(held or [FINISH])[:1], *map(str, group)]

        monkeypatch.setattr(runner, "_command", command)

    return have


def _states(cells, workdir):
    return [(r.state, r.reason) for r in results.read_all(cells, workdir)]


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tmp_path, pretend, capsys):
    cells = folders.cells({"network": ["fail", "diverge", "die", "fine"]})
    pretend(fail=FAIL, diverge=DIVERGE, die=DIE)
    updates = []
    assert runner.run(cells, tmp_path / "w", lambda: updates.append(0)) is None
    assert _states(cells, tmp_path / "w") == [
        ("failed", "no such file"),
        ("diverged", "the loss of batch 2 is nan"),
        ("failed", "ended by SIGKILL"),
        ("finished", ""),
    ]
    assert len(updates) == 4
    told = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in told] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert f"{cells[3].name}: final test error 25.00 %" in told[3]


def test_a_process_that_dies_before_it_is_told_its_config_has_failed(
    tmp_path, pretend, monkeypatch
):
    class Dead(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.wait()

    cells = folders.cells({"network": ["fail", "diverge"]})
    pretend(fail=FAIL, diverge=DIVERGE)
    monkeypatch.setattr(subprocess, "Popen", Dead)
    runner.run(cells, tmp_path, lambda: None)
    assert _states(cells, tmp_path) == [
        ("failed", "no such file"),
        ("diverged", "the loss of batch 2 is nan"),
    ]


def test_what_has_ended_is_not_run_again_and_what_failed_is(tmp_path, pretend):
    cells = folders.cells({"network": ["fail", "diverge", "fine"]})
    pretend(fail=FAIL, diverge=DIVERGE)
    runner.run(cells, tmp_path, lambda: None)
    pretend()
    runner.run(cells, tmp_path, lambda: None)
    logs = [(tmp_path / c.name / runner.LOG_FILE).read_text() for c in cells]
    assert [log.splitlines()[-1] for log in logs] == [
        "trained",
        "the loss of batch 2 is nan",
        "trained",
    ]
    assert logs[2].count("trained") == 1
    states = [state for state, _ in _states(cells, tmp_path)]
    assert states == ["finished", "diverged", "finished"]


def test_a_signal_goes_to_the_cell_and_ends_the_study(tmp_path, pretend):
    cells = folders.cells({"network": ["wait", "fine", "good", "well"]})
    pretend(wait=WAIT)
    before = signal.getsignal(signal.SIGTERM)

    def stop_when_ready():
        while not (tmp_path / cells[0].name / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_ready)
    thread.start()
    updates = []
    assert runner.run(cells, tmp_path, lambda: updates.append(0)) == signal.SIGTERM
    thread.join()
    assert updates == []
    log = tmp_path / cells[0].name / runner.LOG_FILE
    assert log.read_text() == f"leaving at {signal.SIGTERM}\n"
    assert not (tmp_path / cells[0].name / results.FAILURE_FILE).exists()
    assert not any((tmp_path / cell.name).exists() for cell in cells[1:])
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_the_study_ends_the_cells_as_a_signal_does(tmp_path, pretend):
    cells = folders.cells({"network": ["wait", "fine", "good"]})
    pretend(wait=WAIT)

    def fail():
        while not (tmp_path / cells[0].name / "ready").exists():
            time.sleep(0.01)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runner.run(cells, tmp_path, fail, jobs=2)
    log = tmp_path / cells[0].name / runner.LOG_FILE
    assert log.read_text() == f"leaving at {signal.SIGTERM}\n"
    assert not (tmp_path / cells[0].name / results.FAILURE_FILE).exists()


def test_two_studies_do_not_run_in_one_folder(tmp_path, pretend):
    pretend()
    cells = folders.cells({})
    with open(tmp_path / runner.LOCK_FILE, "ab") as file:
        assert lock.acquire(file, 0.0)
        with pytest.raises(ValueError, match="another one is at work"):
            runner.run(cells, tmp_path, lambda: None)
    assert not (tmp_path / cells[0].name).exists()
    assert runner.run(cells, tmp_path, lambda: None) is None  # it is free again


def test_where_files_cannot_be_locked_a_study_warns_once(
    tmp_path, pretend, capsys, monkeypatch
):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    pretend()
    cells = folders.cells({"network": ["fine", "good"]})
    runner.run(cells, tmp_path, lambda: None)
    assert [state for state, _ in _states(cells, tmp_path)] == ["finished"] * 2
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if "cannot be locked" in line] == told[:1]


def test_a_cell_waits_for_what_a_killed_study_has_left_behind(tmp_path, pretend):
    pretend()
    (cell,) = folders.cells({})
    (tmp_path / cell.name).mkdir()
    with open(tmp_path / cell.name / runner.LOG_FILE, "ab") as log:
        assert lock.acquire(log, 0.0)
        program = "import time; print('begun', flush=True); time.sleep(0.5); print(1)"
        left_behind = subprocess.Popen([sys.executable, "-c", program], stdout=log)
    runner.run([cell], tmp_path, lambda: None)
    lines = (tmp_path / cell.name / runner.LOG_FILE).read_text().splitlines()
    assert lines == ["begun", "1", "trained"]
    assert left_behind.wait() == 0


def test_a_run_of_another_study_is_refused(tmp_path):
    (cell,) = folders.cells({})
    folders.write_run(tmp_path, cell, [0.5], finished=False)
    runner.check_workdir([cell], tmp_path)
    changed = cell.config.to_dict() | {"shrink": 0.7}
    resume.write_json(tmp_path / cell.name / resume.CONFIG_FILE, changed)
    with pytest.raises(ValueError, match="shrink: 0.7 was asked then, 1.0 now"):
        runner.check_workdir([cell], tmp_path)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for workdir in (tmp_path / "file", tmp_path / "file" / "w"):
        with pytest.raises(ValueError, match="a folder that can be written"):
            runner.check_workdir(folders.cells({}), workdir)
