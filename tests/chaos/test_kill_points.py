"""A run is killed before each thing that it ever does to its files, one by one.

A process that is killed at random rarely dies between two calls that belong together.
Here every start dies just before the first kind of operation at which none has died,
until one comes to the end: then each has had its kill, those of the recovery too.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from chaos import runs

import fdg_jax as fdg
from fdg_jax import resume

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = [
    *("--config.num_epochs=2", "--config.learning_rate_milestones=()"),
    *("--config.log_every_steps=5", "--config.snapshot_every_steps=5"),
    *("--config.num_stages=3", "--config.cuts=1,3", "--config.progress=false"),
]
MOST_STARTS = 200

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="it looks into /proc and forks"
)


@pytest.fixture(scope="module")
def server():
    """A process that forks, so that no start has to import everything again."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    with subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).with_name("dying.py"))],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


class Runner:
    """Starts one run again and again."""

    def __init__(self, server, workdir, caches):
        self.workdir, self.log = workdir, workdir.with_name(f"{workdir.name}.log")
        self.done = []
        self._server = server
        self._flags = [*FLAGS, f"--config.compilation_cache={caches}"]

    def start(self, wanted, stopping=False, flags=()):
        """Returns the exit status, and what a killed process was about to do."""
        self.log.unlink(missing_ok=True)
        request = {
            "workdir": str(self.workdir),
            "argv": [f"--workdir={self.workdir}", *self._flags, *flags],
            "done": self.done,
            "wanted": wanted,
            "stopping": stopping,
            "log": str(self.log),
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        if status == -9:
            self.done.append(self.log.read_text())
        return status

    def torment(self, wanted, stopping=False):
        """Starts until no start is killed any more; returns the last exit status."""
        for _ in range(MOST_STARTS):
            status = self.start(wanted, stopping)
            if status != -9:
                return status
        raise AssertionError(f"it does not come to an end: {self.done}")

    def said(self):
        """What the last process has printed, and at which operations others died."""
        out = pathlib.Path(f"{self.log}.out").read_text()
        return "\n".join([*self.done, out])


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory, caches):
    """A run that nobody touches."""
    runner = Runner(server, tmp_path_factory.mktemp("whole") / "run", caches)
    assert runner.start(wanted="^$") == 0, runner.said()
    return runner.workdir


def _report(kind, done):
    print(f"\n{len(done)} kills, {kind}, each before another kind of operation:")
    print("\n".join(f"  {name}" for name in done))


@pytest.mark.slow
def test_a_kill_before_each_kind_of_rename_changes_nothing(
    server, tmp_path, caches, whole
):
    runner = Runner(server, tmp_path / "run", caches)
    assert runner.torment(wanted="^os.rename") == 0, runner.said()
    runs.assert_same(runner.workdir, whole)
    targets = {name.split()[-1].split("/")[0] for name in runner.done}
    files = {"config.json", "snapshots", "checkpoints", "summary.json"}
    assert targets == files | {".tried-#"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_before_each_kind_of_operation_changes_nothing(
    server, tmp_path, caches, whole
):
    runner = Runner(server, tmp_path / "run", caches)
    assert runner.torment(wanted="") == 0, runner.said()
    runs.assert_same(runner.workdir, whole)
    _report("in training", runner.done)
    assert len(runner.done) > 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_while_a_stopped_run_leaves_changes_nothing(
    server, tmp_path, caches, whole
):
    """Stopped before its first batch, it writes the snapshot that it went on from."""
    runner = Runner(server, tmp_path / "run", caches)
    assert runner.start(wanted="^$", stopping=True) == 143, runner.said()
    status = runner.torment(wanted="snapshots/#(/| |$)", stopping=True)
    assert status == 143, runner.said()
    _report("while stopping", runner.done)
    assert runner.start(wanted="^$") == 0, runner.said()
    runs.assert_same(runner.workdir, whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_kill_while_a_run_is_removed_leaves_no_end_without_a_network(
    server, tmp_path, caches, whole
):
    """Started over, it dies at each kind of removal; a run that seems to have ended
    has its network."""
    runner = Runner(server, tmp_path / "run", caches)
    shutil.copytree(whole, runner.workdir)
    for name in ("snapshots/5", "export/newest"):
        (runner.workdir / name).mkdir(parents=True)
        (runner.workdir / name / "file").touch()
    restart = ["--config.restart=true"]
    status = -9
    while status == -9:
        status = runner.start("^os.(remove|rmdir) (?!.*partial)", flags=restart)
        if resume.is_finished(runner.workdir):
            assert runs.networks(runner.workdir).keys() == runs.networks(whole).keys()
            fdg.load(runner.workdir)
        assert len(runner.done) < MOST_STARTS
    assert status == 0, runner.said()
    runs.assert_same(runner.workdir, whole)
    _report("starting over", runner.done)
    assert "os.remove summary.json" in runner.done
