"""Training from a config: load, cut, train, evaluate, save; or go on with all that.

``prepare`` checks everything that a user can get wrong and leaves nothing behind;
``run`` trains. A ``ValueError`` of the first is a user's mistake, one of the second is
a bug.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_collections

from fdg_jax import (
    checkpoint,
    data,
    folders,
    from_config,
    optimizers,
    resume,
    trained,
)
from fdg_jax import snapshot as snapshots
from fdg_jax.models.network import Network
from fdg_jax.pipeline import NonFiniteLossError, Pipeline
from fdg_jax.report import Report
from fdg_jax.snapshot_store import SnapshotStore, StoredSnapshot
from fdg_jax.snapshot_taker import Best, SnapshotTaker
from fdg_jax.stall import StalledError
from fdg_jax.stopping import Stopped, Stopping
from fdg_jax.timeline import Timeline


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to start.

    Attributes:
        config: as in configs/default.py.
        workdir: where the run will write.
        pipeline: the network, cut and placed.
        train_batches: endless, epoch after epoch.
        test_batches: every test image once, each time it is iterated over.
        steps_per_epoch: batches in an epoch.
        learning_rate: by update count.
        timeline: what records the pipeline, where the config asks for it.
        store: the run's snapshots.
        start: the snapshot that the pipeline and the batches go on from, if there is
            one.
        best: the most accurate network until then.
        warnings: what the user should know, a line each.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    pipeline: Pipeline
    train_batches: Iterator[dict[str, jax.Array]]
    test_batches: Iterable[dict[str, jax.Array]]
    steps_per_epoch: int
    learning_rate: optimizers.LearningRate
    timeline: Timeline | None
    store: SnapshotStore
    start: StoredSnapshot | None
    best: Best | None
    warnings: tuple[str, ...]


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
    """Trains a network as a config says, and writes metrics and the result.

    Args:
        config: every key of configs/default.py.
        workdir: a folder, made when missing. Where it holds a run of the same config,
            that one goes on.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ValueError: the config or the workdir is wrong; nothing has been written.
        NonFiniteLossError: a loss became infinite or NaN.
    """
    summary = finished(config, workdir)
    return run(prepare(config, workdir)) if summary is None else summary


def finished(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any] | None:
    """Returns the summary of a run that has come to its end, or None.

    Args:
        config: of the run.
        workdir: where it is.

    Raises:
        ValueError: the run has another config.
    """
    workdir = folders.local(workdir)
    if config.restart or not resume.is_finished(workdir):
        return None
    resume.check_config(config, workdir)
    return json.loads((workdir / resume.SUMMARY_FILE).read_text(encoding="utf-8"))


def prepare(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    dataset: data.Dataset | None = None,
    jit: Callable = jax.jit,
) -> Experiment:
    """Builds everything that a run needs, and leaves nothing behind.

    Args:
        config: every key of configs/default.py.
        workdir: a folder; it need not exist.
        dataset: the config's, if the caller has it.
        jit: what compiles the fused engine's program; see ``engines.together``.

    Raises:
        ValueError: the config or the workdir is wrong.
    """
    workdir, warnings = folders.local(workdir), []
    from_config.check_numbers(config)
    _check_workdir(workdir)
    if (workdir / resume.LOCK_FILE).exists():
        # So far; a run looks once more, and tells of what it meets.
        with resume.alone(workdir, warn=lambda line: None):
            pass
    resume.check_files(workdir)
    store = SnapshotStore(workdir / resume.SNAPSHOTS, keep=config.snapshots_kept)
    start = None
    if not config.restart:
        resume.check_workdir(workdir)
        if resume.has_run(workdir):
            resume.check_config(config, workdir)
            start = resume.newest_whole(store, warnings.append)
    steps_per_epoch = from_config.steps_per_epoch(config)
    learning_rate = from_config.learning_rate(config, steps_per_epoch)
    timeline = Timeline() if config.timeline else None
    pipeline = from_config.create_pipeline(
        config,
        learning_rate,
        # Measured anew, they might come out differently.
        cuts=config.cuts if start is None else tuple(start.record["cuts"]),
        network=_first_network(config) if start is None else None,
        timeline=timeline,
        jit=jit,
    )
    example = from_config.example_batch(config)
    pipeline.build(example)
    # Last, since it may take long, and download: everything else is right by now.
    if dataset is None:
        dataset = from_config.load_data(config)
    place = {
        "device": pipeline.stages[0].device,
        "label_device": pipeline.stages[-1].device,
        "dtype": example["image"].dtype,
    }
    train_batches = data.TrainBatches(
        dataset,
        from_config.piece_size(config),
        seed=config.seed,
        accumulation=from_config.method_arguments(config)["accumulation"],
        **place,
    )
    best = None
    if start is not None:
        changed = resume.change_warnings(start.record)
        try:
            best = _restore(start, pipeline, train_batches, example)
        except ValueError as error:
            raise ValueError("; ".join([str(error), *changed])) from error
        warnings += changed
        warnings += resume.log_warnings(workdir, start.record["logs"])
    resume.check_free_space(workdir, _snapshot_bytes(config, pipeline, example))
    return Experiment(
        config=config,
        workdir=workdir,
        pipeline=pipeline,
        train_batches=train_batches,
        test_batches=data.test_batches(dataset, config.eval_batch_size, **place),
        steps_per_epoch=steps_per_epoch,
        learning_rate=learning_rate,
        timeline=timeline,
        store=store,
        start=start,
        best=best,
        warnings=tuple(warnings),
    )


def run(experiment: Experiment, stopping: Stopping | None = None) -> dict[str, Any]:
    """Trains, evaluates and saves.

    Args:
        experiment: from ``prepare``; a run uses it up.
        stopping: what may ask the run to stop before its end.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        WorkdirInUseError: another process trains there; nothing has been changed.
        NonFiniteLossError: a loss became infinite or NaN.
        Stopped: the run was asked to stop, and has taken a snapshot to go on from.
    """
    stopping = stopping or Stopping(experiment.config.stop_seconds)
    experiment.workdir.mkdir(parents=True, exist_ok=True)
    warnings = list(experiment.warnings)
    with resume.alone(experiment.workdir, warnings.append):
        _begin(experiment)
        experiment = dataclasses.replace(experiment, warnings=tuple(warnings))
        return _train(experiment, stopping)


def _train(experiment: Experiment, stopping: Stopping) -> dict[str, Any]:
    pipeline = experiment.pipeline
    with (
        _recorded(experiment),
        _report(experiment) as report,
        _taker(experiment, report) as taker,
        _ended(pipeline),
    ):
        report.say("\n".join([*experiment.warnings, pipeline.summary()]))
        try:
            _train_epochs(experiment, report, taker, stopping)
        except StalledError as stalled:
            _take_last_snapshot(stalled, experiment, report, taker)
            raise
        except NonFiniteLossError:
            # Not as a snapshot: resumed from it, a run would leave the batch out.
            taker.save_halted(experiment.workdir / resume.HALTED)
            raise
        taker.save_networks(experiment.workdir / resume.CHECKPOINTS)
        summary = _summary(experiment, report)
        resume.write_json(experiment.workdir / resume.SUMMARY_FILE, summary)
        report.say(
            f"final test accuracy {summary['final_test_accuracy']:.2%} after "
            f"{summary['seconds']:.1f} s; files are in {experiment.workdir}"
        )
    return summary


def _train_epochs(
    experiment: Experiment, report: Report, taker: SnapshotTaker, stopping: Stopping
) -> None:
    """Trains and evaluates, to the end or until it is stopped."""
    config, pipeline = experiment.config, experiment.pipeline
    for epoch in _epochs(experiment, report.step):
        left = epoch * experiment.steps_per_epoch - report.step
        batches = _until(stopping, itertools.islice(experiment.train_batches, left))
        for metrics in pipeline.train(batches):
            report.batch(metrics)
            taker.after_batch()
        if stopping.signal is not None:
            raise Stopped(stopping.signal, taker.take_now())
        report.end_epoch()
        due = epoch % config.eval_every_epochs == 0 and epoch < config.num_epochs
        if due and not report.is_evaluated:
            _evaluate(experiment, report, taker, stopping)
    pipeline.close()  # every stage applies the gradients that are under way
    _evaluate(experiment, report, taker, stopping)


@contextlib.contextmanager
def _ended(pipeline: Pipeline) -> Iterator[None]:
    """Ends a pipeline; after an error without draining it.

    The run can then be resumed from its snapshots.
    """
    try:
        yield
    except BaseException as error:
        pipeline.abort(wait=not isinstance(error, StalledError))
        raise
    pipeline.close()  # an evaluation has started it anew


def _take_last_snapshot(
    stalled: StalledError, experiment: Experiment, report: Report, taker: SnapshotTaker
) -> None:
    """Takes a snapshot if what has stalled moves in the time that is left."""
    seconds = experiment.config.stop_seconds
    try:
        with experiment.pipeline.stall_limit(seconds):
            for metrics in experiment.pipeline.train(()):
                report.batch(metrics)
            step = taker.take_now(seconds)
    except StalledError:
        return
    if step:
        stalled.add_note(f"there is a snapshot of step {step}")


def _evaluate(
    experiment: Experiment, report: Report, taker: SnapshotTaker, stopping: Stopping
) -> None:
    """Evaluates, unless it is stopped: then the run that goes on does so anew."""
    pipeline = experiment.pipeline
    batches = iter(experiment.test_batches)
    first = next(batches)  # seen in any case, for an evaluation needs one
    metrics = pipeline.evaluate_metrics(
        itertools.chain([first], _until(stopping, batches))
    )
    if stopping.signal is not None:
        raise Stopped(stopping.signal, taker.take_now())
    skipped = pipeline.skipped_updates if experiment.config.skip_nonfinite else None
    report.evaluation(metrics, skipped)
    taker.after_evaluation()


def _first_network(config: ml_collections.ConfigDict) -> Network | None:
    """The network of another run, where the config asks for one to start from."""
    if config.init_from is None:
        return None
    network = from_config.create_network(config)
    other, _ = trained.load(config.init_from, "newest")
    return checkpoint.set_network_arrays(network, checkpoint.network_arrays(other))


def _restore(
    start: StoredSnapshot,
    pipeline: Pipeline,
    train_batches: data.TrainBatches,
    example: dict[str, jax.ShapeDtypeStruct],
) -> Best | None:
    """Puts the pipeline and the batches where they were; returns the best network."""
    record, arrays = start.record, resume.grouped(start.arrays())
    # A snapshot of an older version says nothing of them.
    if record.get("dataset", train_batches.digest) != train_batches.digest:
        raise ValueError(
            f"a run goes on with the images that it began with, and the data set has "
            f"others than at the snapshot of step {start.step}; name the data_dir of "
            f"then, choose another workdir, or start over with --config.restart=true"
        )
    resume.restore_pipeline(pipeline, record, arrays["stages"], example)
    train_batches.state = data.BatchState(**arrays["data"])
    return Best(*record["best"], arrays["best"]) if record["best"] else None


def _snapshot_bytes(
    config: ml_collections.ConfigDict,
    pipeline: Pipeline,
    example: dict[str, jax.ShapeDtypeStruct],
) -> int:
    """Bytes of the snapshots of a filled pipeline, and of one that is being written."""
    lengths = snapshots.most_lengths(pipeline.schedule.staleness)
    filled = pipeline.abstract_snapshot(example, 0, lengths)
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(filled.stages))
    return size * (config.snapshots_kept + 1)


def _begin(experiment: Experiment) -> None:
    """Makes the workdir what it was at the start, or at the snapshot."""
    config, workdir, start = experiment.config, experiment.workdir, experiment.start
    resume.remove_tried(workdir)
    if config.restart:
        resume.remove_run(workdir)
    if start is None:
        resume.write_json(workdir / resume.CONFIG_FILE, config.to_dict())
    shutil.rmtree(workdir / resume.HALTED, ignore_errors=True)
    experiment.store.remove_after(0 if start is None else start.step)
    resume.rewind_logs(workdir, {} if start is None else start.record["logs"])


def _report(experiment: Experiment) -> Report:
    start, pipeline = experiment.start, experiment.pipeline
    return Report(
        experiment.workdir,
        experiment.config,
        steps_per_epoch=experiment.steps_per_epoch,
        learning_rate=experiment.learning_rate,
        staleness=pipeline.schedule.staleness[0],
        burst=pipeline.steps_per_call,
        accumulation=from_config.method_arguments(experiment.config)["accumulation"],
        state=None if start is None else start.record["report"],
    )


def _taker(experiment: Experiment, report: Report) -> SnapshotTaker:
    return SnapshotTaker(
        experiment.config,
        pipeline=experiment.pipeline,
        train_batches=experiment.train_batches,
        report=report,
        store=experiment.store,
        workdir=experiment.workdir,
        written=0 if experiment.start is None else experiment.start.step,
        best=experiment.best,
    )


def _epochs(experiment: Experiment, step: int) -> range:
    """Epochs that may have still something to do after ``step`` batches.

    Among them is one that has ended with ``step``: it may not have been evaluated.
    """
    first = max(1, -(-step // experiment.steps_per_epoch))
    return range(first, experiment.config.num_epochs + 1)


def _until(stopping: Stopping, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches until somebody asks to stop; draws none that it does not yield."""
    batches = iter(batches)
    while stopping.signal is None:
        batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _recorded(experiment: Experiment) -> Iterator[None]:
    """Writes and prints the timeline, however the run ends."""
    timeline = experiment.timeline
    try:
        yield
    except StalledError:
        timeline = None  # it waits for calls that may never end
        raise
    finally:
        if timeline is not None:
            timeline.write(experiment.workdir / resume.TIMELINE_FILE)
            print(timeline.table())


def _summary(experiment: Experiment, report: Report) -> dict[str, Any]:
    config, pipeline = experiment.config, experiment.pipeline
    accuracies = [accuracy for _, accuracy in report.evaluations]
    return {
        "final_test_accuracy": accuracies[-1],
        "best_test_accuracy": max(accuracies),
        "seconds": report.seconds,
        "steps": report.step,
        "num_stages": config.num_stages,
        "method": config.method,
        "schedule": pipeline.schedule.name,
        "staleness": list(pipeline.schedule.staleness),
        "shrink": config.shrink,
        "engine": pipeline.engine,
        "device_kind": pipeline.stages[0].device.device_kind,
        "skipped_updates": pipeline.skipped_updates,
        "host": resume.host(),
        "versions": resume.versions(),
    }


def _check_workdir(workdir: pathlib.Path) -> None:
    if os.path.isfile(workdir):
        raise ValueError(f"workdir must be a folder; {workdir} is a file; name another")
    if not folders.can_be_written(workdir):
        raise ValueError(
            f"workdir must be a folder that can be written; {workdir} is not, or "
            f"{folders.nearest(workdir)}, where it would be, is not; choose another "
            f"workdir"
        )
