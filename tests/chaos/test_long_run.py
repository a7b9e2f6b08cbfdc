"""A long run of a tiny network, with evaluations and snapshots, leaks nothing."""

import gc
import os
import pathlib
import threading

import jax
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
from configs import default
from fdg_jax import data
from fdg_jax.optimizers import learning_rate
from fdg_jax.report import Report
from fdg_jax.snapshot_store import SnapshotStore
from fdg_jax.snapshot_taker import SnapshotTaker

EVALUATE_EVERY = 100
SAMPLE_EVERY = 100


def _resident_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _sample():
    gc.collect()
    return {
        "resident MiB": _resident_mib(),
        "device arrays": len(jax.live_arrays()),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
    }


def _config(num_batches):
    config = default.get_config()
    config.update(
        {
            "batch_size": 16,
            "num_epochs": -(-num_batches // (1437 // 16)),
            "log_every_steps": 50,
            "progress": False,
            "snapshot_every_steps": 200,
            "snapshot_every_minutes": 0.0,
        }
    )
    return ml_collections.FrozenConfigDict(config)


class Flatten(nnx.Module):
    def __call__(self, x):
        return x.reshape(x.shape[0], -1)


def _pipeline():
    rngs = nnx.Rngs(0)

    def linear(width_in, width_out):
        return nnx.Linear(width_in, width_out, param_dtype=np.float32, rngs=rngs)

    return fdg.Pipeline(
        [Flatten(), linear(64, 16), linear(16, 16), linear(16, 10)],
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(1e-2, momentum=0.9),
        num_stages=2,
        cuts=(2,),
        engine="threads",
        stall_timeout=60.0,
    )


def _train(num_batches, workdir):
    """Trains as a run does; returns samples after the warm-up, one row each."""
    config, digits = _config(num_batches), data.load("digits")
    batches = data.TrainBatches(digits, config.batch_size, seed=0)
    tests = data.test_batches(digits, 360)
    pipeline = _pipeline()
    report = Report(
        workdir,
        config,
        steps_per_epoch=batches.steps_per_epoch,
        learning_rate=learning_rate(1e-2, steps_per_epoch=1),
        staleness=1,
        burst=1,
    )
    store = SnapshotStore(workdir / "snapshots", keep=2)
    taker = SnapshotTaker(
        config,
        pipeline=pipeline,
        train_batches=batches,
        report=report,
        store=store,
        workdir=workdir,
    )
    samples = []
    report.say = lambda text: None
    with report, taker, pipeline:
        while report.step < num_batches:
            part = (next(batches) for _ in range(EVALUATE_EVERY))
            for metrics in pipeline.train(part):
                report.batch(metrics)
                taker.after_batch()
            report.evaluation(pipeline.evaluate_metrics(tests))
            taker.after_evaluation()
            if report.step % SAMPLE_EVERY == 0:
                taker._wait()
                samples.append({"batch": report.step, **_sample()})
    assert len(store.steps()) == 2
    return samples


def _plot(samples, path):
    from matplotlib.figure import Figure

    names = [name for name in samples[0] if name != "batch"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), sharex=True), names, strict=True):
        axes.plot([s["batch"] for s in samples], [s[name] for s in samples])
        axes.set_ylabel(name)
        axes.set_ylim(0, 1.2 * max(s[name] for s in samples))
    axes.set_xlabel("batch")
    figure.savefig(path, dpi=120)


def _assert_flat(samples, mib):
    """After a third of the run, nothing grows from one third to the next."""
    third = len(samples) // 3
    middle, end = samples[third : 2 * third], samples[2 * third :]
    for name in ("device arrays", "threads", "open files"):
        assert max(s[name] for s in end) <= max(s[name] for s in middle), name
    grown = np.median([s["resident MiB"] for s in end]) - np.median(
        [s["resident MiB"] for s in middle]
    )
    print(f"resident memory grew by {grown:.1f} MiB in the last third; {samples[-1]}")
    assert grown < mib


needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/statm").exists(), reason="memory is read from /proc"
)


@needs_proc
@pytest.mark.timeout(300)
def test_a_thousand_ticks_leak_nothing(tmp_path):
    _assert_flat(_train(1200, tmp_path), mib=30)


@needs_proc
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_thousand_ticks_leak_nothing(tmp_path):
    samples = _train(20_000, tmp_path)
    if folder := os.environ.get("FDG_PLOT_DIR"):
        _plot(samples, pathlib.Path(folder) / "long_run.png")
    _assert_flat(samples, mib=20)
