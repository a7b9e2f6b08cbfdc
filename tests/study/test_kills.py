"""Studies that are stopped and killed end as those that nobody touches."""

import csv
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from fdg_jax import lock
from fdg_jax.study import __main__ as command_line

ROOT = pathlib.Path(command_line.__file__).parents[2]
STUDY = """
from fdg_jax.study import Study
def get_study():
    return Study(
        name="s",
        base="digits",
        overrides=dict(
            num_epochs={num_epochs},
            learning_rate_milestones=(),
            log_every_steps=5,
            snapshot_every_steps=4,
            compilation_cache={caches!r},
        ),
        grids=[dict(schedule=["paper"]), {more}],
        seeds={seeds},
    )
"""
DIVERGING = "dict(learning_rate=[1e30])"
FINE = "dict(num_stages=[3], cuts='2,3')"
IGNORED = ("images_per_second", "seconds", "learning_rate")


def _rows(workdir):
    """What was measured, but how fast, and the axis that only one study has."""
    with open(workdir / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in IGNORED} for row in rows]


def _start(study, workdir):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.Popen(
        [sys.executable, "-m", "fdg_jax.study", f"--study={study}"]
        + [f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_study_is_killed_and_goes_on_beside_a_run_that_diverges(tmp_path):
    study, caches = tmp_path / "s.py", str(tmp_path / "caches")
    given = {"num_epochs": 3, "caches": caches, "seeds": (0,)}
    study.write_text(STUDY.format(more=DIVERGING, **given))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [f"--study={study}", "--workdir"]
    assert command_line.main([*flags, str(whole)]) == 0
    table = (whole / "table.md").read_text()
    assert "1 diverged" in table and "is not finite in stage" in table
    assert (whole / "curves.png").exists()
    name = _rows(whole)[-1]["cell"]
    assert [row["epoch"] for row in _rows(whole)] == ["1.0", "2.0", "3.0"]

    process = _start(study, killed)
    while not list((killed / name).glob("snapshots/*/manifest.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    with open(killed / name / "log.txt", "ab") as log:
        assert lock.acquire(log, 20.0), "the run goes on without its study"
    assert "stopped by SIGTERM" in (killed / name / "log.txt").read_text()
    assert not (killed / name / "summary.json").exists()

    # What goes on here is that run alone, and its rows come out as they were.
    study.write_text(STUDY.format(more="", **given))
    assert command_line.main([*flags, str(killed)]) == 0
    assert _rows(killed) == _rows(whole)

    said = (killed / name / "log.txt").read_text()
    assert command_line.main([*flags, str(killed)]) == 0
    assert (killed / name / "log.txt").read_text() == said  # nothing was left to run


def _child(process):
    """The process of some cells, on Linux; None between two of them."""
    try:
        threads = list(pathlib.Path(f"/proc/{process.pid}/task").glob("*/children"))
        numbers = [number for t in threads for number in t.read_text().split()]
    except OSError:
        return None
    return int(numbers[0]) if numbers else None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_studies_and_runs_are_killed_at_random(tmp_path):
    draw = random.Random(0)
    study, caches = tmp_path / "s.py", str(tmp_path / "caches")
    study.write_text(STUDY.format(more=FINE, num_epochs=6, caches=caches, seeds=(0, 1)))
    assert _start(study, tmp_path / "whole").wait() == 0
    wanted = [("study", signal.SIGKILL)] * 6 + [("study", signal.SIGTERM)] * 4
    wanted += [("study", signal.SIGINT)] * 2 + [("run", signal.SIGKILL)] * 6
    draw.shuffle(wanted)
    met = round_ = 0
    while wanted:
        workdir, status = tmp_path / f"round{round_}", None
        while status != 0:
            process = _start(study, workdir)
            if wanted:
                time.sleep(draw.uniform(3, 16))
                target, number = wanted[-1]
                pid = process.pid if target == "study" else _child(process)
                if process.poll() is None and pid is not None:
                    os.kill(pid, number)
                    wanted.pop()
                    met += 1
            _, error = process.communicate(timeout=300)
            status = process.returncode
            allowed = (0, 1, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
            assert status in allowed, error
        assert _rows(workdir) == _rows(tmp_path / "whole")
        round_ += 1
    print(f"{met} signals over {round_} studies, all equal to the untouched one")
    assert met == 18
