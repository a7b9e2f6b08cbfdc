"""A disk that is full for a while: training goes on, and so does the run later.

A limit on the size of files stands for the full disk: writing beyond it fails, in the
middle of a file, with what the file system has still taken.
"""

import os
import pathlib
import subprocess
import sys

import pytest
from chaos import runs

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = [
    *("--config.num_epochs=2", "--config.learning_rate_milestones=()"),
    *("--config.log_every_steps=2", "--config.snapshot_every_steps=4"),
    *("--config.num_stages=2", "--config.cuts=2", "--config.progress=false"),
]
SCRIPT = """
import pathlib, resource, sys, time
import train
from fdg_jax import training

first, last, limit = map(int, sys.argv[1:4])
snapshots = pathlib.Path(sys.argv[4].removeprefix("--workdir="), "snapshots")

def batch(report, metrics, batch=training.Report.batch):
    if report.step == first:
        while not list(snapshots.glob("*/manifest.json")):
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if report.step == last:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    batch(report, metrics)

training.Report.batch = batch
sys.exit(train.main(["train.py", *sys.argv[4:]]))
"""
NEVER = 10**9

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="no limit on the size of files"
)


def _train(workdir, caches, first=NEVER, last=NEVER, limit=0, flags=()):
    """Trains with a full disk from one batch to another; returns the process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.run(
        [
            *(sys.executable, "-c", SCRIPT, str(first), str(last), str(limit)),
            f"--workdir={workdir}",
            *FLAGS,
            f"--config.compilation_cache={caches}",
            *flags,
        ],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, caches):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = _train(workdir, caches)
    assert (done.returncode, done.stderr) == (0, "")
    return workdir


def _snapshots(workdir):
    return sorted(path.name for path in (workdir / "snapshots").iterdir())


# From files that take nothing more, to one that takes the logs but no arrays.
@pytest.mark.parametrize(
    "limit",
    [0, 700, 1500, 4000, 12_000],
)
@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_no_line(tmp_path, caches, whole, limit):
    done = _train(tmp_path / "run", caches, first=13, last=31, limit=limit)
    assert done.returncode == 0, done.stderr
    assert "the snapshot of step" in done.stdout and "training goes on" in done.stdout
    assert not [name for name in _snapshots(tmp_path / "run") if "partial" in name]
    runs.assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("limit", [0, 4000])
@pytest.mark.slow
def test_a_disk_that_stays_full_keeps_the_last_snapshot(tmp_path, caches, whole, limit):
    done = _train(tmp_path / "run", caches, first=13, limit=limit)
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(told) == 1  # Orbax logs around it
    kept = [name for name in _snapshots(tmp_path / "run") if name.isdigit()]
    assert kept and all(0 < int(name) <= 13 for name in kept)
    done = _train(tmp_path / "run", caches)
    assert (done.returncode, done.stderr) == (0, "")
    runs.assert_same(tmp_path / "run", whole)


LOGS = """
import pathlib, resource, sys
from fdg_jax.metrics import MetricsWriter

limit, workdir = int(sys.argv[1]), pathlib.Path(sys.argv[2])
writer, failures = MetricsWriter(workdir), 0
for step in range(600):
    if step in (100, 400):
        size = limit if step == 100 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        writer.write(step, {"train_loss": 0.5, "train_accuracy": 0.25})
    except OSError:
        failures += 1
writer.close()
print(failures)
"""


@pytest.mark.parametrize("limit", [0, 10_000])
def test_logs_are_whole_after_a_disk_was_full_for_long(tmp_path, limit):
    done = subprocess.run(
        [sys.executable, "-c", LOGS, str(limit), str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
    assert [line["step"] for line in runs.lines(tmp_path)] == list(range(600))
    assert runs.board(tmp_path) == [
        (step, name, value)
        for step in range(600)
        for name, value in (("train_loss", 0.5), ("train_accuracy", 0.25))
    ]
