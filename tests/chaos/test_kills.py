"""Runs that are killed and stopped at random, until each has ended as it should."""

import json
import os
import pathlib
import random
import re
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import fdg_jax as fdg
from fdg_jax import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = [
    "--config.num_epochs=4",
    "--config.learning_rate_milestones=()",
    "--config.log_every_steps=5",
    "--config.snapshot_every_steps=6",
    "--config.engine=threads",
]
CUTS = {2: "2", 3: "1,3"}
SECONDS_TO_EXIT = 10


def _start(workdir, num_stages, caches, program=(ROOT / "train.py",), flags=()):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    return subprocess.Popen(
        [
            *(sys.executable, *program, f"--workdir={workdir}", *FLAGS),
            f"--config.num_stages={num_stages}",
            f"--config.cuts={CUTS[num_stages]}",
            f"--config.compilation_cache={caches}",
            *flags,
        ],
        env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, caches):
    """By number of stages, a run that nobody touches, and how long its start took."""
    runs = {}

    def get(num_stages):
        if num_stages not in runs:
            folder = tmp_path_factory.mktemp(f"whole{num_stages}")
            for workdir in (folder / "first", folder / "second"):  # the second compiles
                began = time.monotonic()  # nothing, as those to come
                process = _start(workdir, num_stages, caches)
                while not (workdir / "metrics.jsonl").exists():
                    time.sleep(0.01)
                started = time.monotonic()
                _, error = process.communicate(timeout=200)
                assert process.returncode == 0, error
            runs[num_stages] = (
                workdir,
                started - began,
                time.monotonic() - started,
            )
        return runs[num_stages]

    return get


def _lines(workdir):
    lines = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    for line in lines:
        line.pop("images_per_second", None)
    return lines


def _board(workdir):
    """Scalars of all event files but the speed, sorted."""
    files = workdir.glob("events.out.tfevents.*")
    scalars = [scalar for file in files for scalar in _scalars(file)]
    return sorted(s for s in scalars if s[1] != "images_per_second")


def _scalars(file):
    data, scalars = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return scalars


def _newest(workdir):
    """The step that a start would go on from: of the newest whole snapshot, or 0."""
    if (workdir / "summary.json").exists():
        return 0  # it does nothing any more
    whole = workdir.glob("snapshots/*[0-9]/manifest.json")
    return max((int(path.parent.name) for path in whole), default=0)


def _first_step(workdir):
    """The first step of which the process that came to the end has told."""
    files = workdir.glob("events.out.tfevents.*")
    return min(step for step, *_ in _scalars(max(files, key=os.path.getmtime)))


def _checkpoints(workdir):
    config = json.loads((workdir / "config.json").read_text())
    network = fdg.models.create(config["network"], num_classes=10, in_channels=1)
    return {
        step: checkpoint.network_arrays(
            checkpoint.restore_network(network, workdir / "checkpoints", step)
        )
        for step in checkpoint.steps(workdir / "checkpoints")
    }


def _assert_same_run(workdir, whole):
    assert _lines(workdir) == _lines(whole)
    assert _board(workdir) == _board(whole)
    got, expected = _checkpoints(workdir), _checkpoints(whole)
    assert got.keys() == expected.keys()
    for step, arrays in expected.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(got[step][name], array)
    summaries = [json.loads((w / "summary.json").read_text()) for w in (workdir, whole)]
    for key in ("final_test_accuracy", "best_test_accuracy", "steps"):
        assert summaries[0][key] == summaries[1][key]


def _moment(draw, start_seconds, train_seconds):
    """Mostly in training, but anywhere from the start of Python on."""
    if draw.random() < 0.2:
        return draw.uniform(0, start_seconds)
    return start_seconds + draw.uniform(-0.3, 0.7) * train_seconds


def _torment(workdir, num_stages, caches, whole, draw, signals):
    """Starts a run again and again, with a signal each time until they are used up.

    Returns:
        Signals that met a running process, and seconds from each SIGTERM to the exit.
    """
    _, start_seconds, train_seconds = whole(num_stages)
    met, seconds = [], []
    while True:
        number = signals.pop() if signals else None
        newest = _newest(workdir)
        process = _start(workdir, num_stages, caches)
        if number is not None:
            time.sleep(max(0.0, _moment(draw, start_seconds, train_seconds)))
        asked = time.monotonic()
        if number is not None and process.poll() is None:
            process.send_signal(number)
            met.append(number)
        _, error = process.communicate(timeout=200)
        if number == signal.SIGTERM and met and process.returncode != 0:
            seconds.append(time.monotonic() - asked)
            # In the imports nobody listens yet, and the signal ends the process.
            assert process.returncode in (143, -signal.SIGTERM), error
            if process.returncode == 143:
                step = re.search(r"goes on from batch (\d+)", error)[1]
                assert (workdir / "snapshots" / step / "manifest.json").exists()
        elif process.returncode == 0:
            # It has gone on from the newest snapshot, and not begun anew.
            assert _first_step(workdir) >= newest
            return met, seconds
        else:
            assert process.returncode == -signal.SIGKILL, error


def _run(tmp_path, caches, whole, seed, num_kills, num_terms, workdirs):
    draw = random.Random(seed)
    wanted = [signal.SIGKILL] * num_kills + [signal.SIGTERM] * num_terms
    draw.shuffle(wanted)
    met, seconds, runs = [], [], 0
    while wanted:
        num_stages = 2 + runs % 2
        signals = [wanted.pop() for _ in range(min(len(wanted), workdirs))]
        workdir = tmp_path / f"run{runs}"
        asked = len(signals)
        got, took = _torment(workdir, num_stages, caches, whole, draw, signals)
        wanted += signals  # of a run that ended before
        met, seconds, runs = met + got, seconds + took, runs + 1
        assert len(got) <= asked
        _assert_same_run(workdir, whole(num_stages)[0])
    kills, terms = met.count(signal.SIGKILL), met.count(signal.SIGTERM)
    print(
        f"{kills} SIGKILLs and {terms} SIGTERMs over {runs} runs, all equal to the "
        f"uninterrupted ones; from SIGTERM to exit {np.median(seconds):.2f} s in the "
        f"median, {max(seconds):.2f} at most"
    )
    assert max(seconds) < SECONDS_TO_EXIT
    return kills, terms


@pytest.mark.timeout(600)
def test_a_few_kills_and_stops_change_nothing(tmp_path, caches, whole):
    assert _run(tmp_path, caches, whole, 0, 1, 1, workdirs=2) == (1, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_and_twenty_stops_change_nothing(tmp_path, caches, whole):
    kills, terms = _run(tmp_path, caches, whole, 1, 57, 30, workdirs=8)
    assert kills >= 50 and terms >= 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_signal_ends_the_process_at_once(tmp_path, caches):
    """Though the snapshot that the first one asked for takes a minute."""
    program = """
import sys, time, train
from fdg_jax.snapshot_taker import SnapshotTaker
SnapshotTaker.take_now = lambda taker: time.sleep(60)
sys.exit(train.main(sys.argv))
"""
    flags = ("--config.num_epochs=10000", "--config.stop_seconds=100")
    process = _start(tmp_path / "run", 2, caches, ("-c", program), flags)
    try:
        while not list(tmp_path.glob("run/snapshots/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - asked < 5
    assert process.returncode == 130
    assert error.endswith("a second signal: leaving at once\n")
