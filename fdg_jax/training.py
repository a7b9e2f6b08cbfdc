"""Training from a config: load, cut, train, evaluate, save.

``prepare`` checks everything that a user can get wrong and writes nothing; ``run``
trains. A ``ValueError`` of the first is a user's mistake, one of the second is a bug.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import ml_collections
import numpy as np
import optax

import fdg_jax
from fdg_jax import checkpoint, data, losses, models, optimizers
from fdg_jax.metrics import (
    METRICS_FILE,
    MetricsWriter,
    ProgressBar,
    RunningMean,
    Throughput,
)
from fdg_jax.pipeline import Pipeline
from fdg_jax.timeline import Timeline

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
TIMELINE_FILE = "timeline.json"
CHECKPOINTS = "checkpoints"
DTYPES = ("float32", "bfloat16")

# So many batches, and s_0 more, do not count for images per second: compilation lies in
# them. A stage sends batch n down after its turn n - 1, so once batch s_0 + 1 is out
# every stage has compiled all its functions; the fused engine gives batches in bursts.
_WARMUP_BATCHES = 16


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
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    pipeline: Pipeline
    train_batches: Iterator[dict[str, jax.Array]]
    test_batches: Iterable[dict[str, jax.Array]]
    steps_per_epoch: int
    learning_rate: optimizers.LearningRate
    timeline: Timeline | None


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, Any]:
    """Trains a network as a config says, and writes metrics and the result.

    Args:
        config: every key of configs/default.py.
        workdir: a folder without a run in it; made when missing.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        ValueError: the config or the workdir is wrong; nothing has been written.
        NonFiniteLossError: a loss became infinite or NaN.
    """
    return run(prepare(config, workdir))


def prepare(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> Experiment:
    """Builds everything that a run needs, and writes nothing.

    Args:
        config: every key of configs/default.py.
        workdir: a folder without a run in it; it need not exist.

    Raises:
        ValueError: the config or the workdir is wrong.
    """
    workdir = pathlib.Path(workdir)
    _check_workdir(workdir)
    _check_numbers(config)
    dtype = _dtype("dtype", config.dtype)
    spec = data.spec(config.dataset)
    steps_per_epoch = data.steps_per_epoch(
        config.dataset, spec.num_train, config.batch_size
    )
    learning_rate = optimizers.learning_rate(
        config.learning_rate,
        steps_per_epoch=steps_per_epoch,
        milestones=config.learning_rate_milestones,
        decay=config.learning_rate_decay,
        warmup_epochs=config.warmup_epochs,
        warmup_factor=config.warmup_factor,
    )
    timeline = Timeline() if config.timeline else None
    pipeline = _create_pipeline(config, spec, learning_rate, timeline)
    image_shape = (config.batch_size, *spec.image_shape)
    pipeline.build(
        {
            "image": jax.ShapeDtypeStruct(image_shape, dtype),
            "label": jax.ShapeDtypeStruct(image_shape[:1], np.int32),
        }
    )
    # Last, since it may take long, and download: everything else is right by now.
    dataset = data.load(config.dataset, config.data_dir)
    place = {
        "device": pipeline.stages[0].device,
        "label_device": pipeline.stages[-1].device,
        "dtype": dtype,
    }
    return Experiment(
        config=config,
        workdir=workdir,
        pipeline=pipeline,
        train_batches=data.TrainBatches(
            dataset, config.batch_size, seed=config.seed, **place
        ),
        test_batches=data.test_batches(dataset, config.eval_batch_size, **place),
        steps_per_epoch=steps_per_epoch,
        learning_rate=learning_rate,
        timeline=timeline,
    )


def run(experiment: Experiment) -> dict[str, Any]:
    """Trains, evaluates and saves.

    Args:
        experiment: from ``prepare``; a run uses it up.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        NonFiniteLossError: a loss became infinite or NaN.
    """
    config, workdir = experiment.config, experiment.workdir
    pipeline = experiment.pipeline
    workdir.mkdir(parents=True, exist_ok=True)
    _write_json(workdir / CONFIG_FILE, config.to_dict())
    with Report(experiment) as report, pipeline:
        report.say(pipeline.summary())
        for epoch in range(1, config.num_epochs + 1):
            batches = itertools.islice(
                experiment.train_batches, experiment.steps_per_epoch
            )
            for metrics in pipeline.train(batches):
                report.batch(metrics)
            report.end_epoch()
            if epoch % config.eval_every_epochs == 0 and epoch < config.num_epochs:
                report.evaluation(pipeline.evaluate_metrics(experiment.test_batches))
        pipeline.close()  # every stage applies the gradients that are under way
        report.evaluation(pipeline.evaluate_metrics(experiment.test_batches))
        checkpoint.save_network(pipeline.network, workdir / CHECKPOINTS, report.step)
        summary = report.summary()
        _write_json(workdir / SUMMARY_FILE, summary)
        report.say(
            f"final test accuracy {summary['final_test_accuracy']:.2%} after "
            f"{summary['seconds']:.1f} s; files are in {workdir}"
        )
    return summary


class Report:
    """What a run tells: files, the progress bar, and lines on standard output.

    Use it as a context manager.

    Attributes:
        step: batches trained so far.
    """

    def __init__(self, experiment: Experiment):
        """Opens the files in the workdir, which must exist."""
        config = experiment.config
        self.step = 0
        self._experiment = experiment
        self._started = time.perf_counter()
        self._test_accuracies = []
        self._means = RunningMean()
        staleness = experiment.pipeline.schedule.staleness
        self._throughput = Throughput(
            warmup=staleness[0] + _WARMUP_BATCHES,
            burst=experiment.pipeline.steps_per_call,
        )
        self._total = config.num_epochs * experiment.steps_per_epoch
        self._bar = ProgressBar(self._total, shown=config.progress)
        self._writer = MetricsWriter(experiment.workdir)

    def __enter__(self) -> "Report":
        """Returns itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes the bar and the files; tells the timeline, however the run ended."""
        self._bar.close()
        self._writer.close()
        timeline = self._experiment.timeline
        if timeline is not None:
            timeline.write(self._experiment.workdir / TIMELINE_FILE)
            self.say(timeline.table())

    def say(self, text: str) -> None:
        """Prints to standard output."""
        self._bar.print(text)

    def batch(self, metrics: Mapping[str, float]) -> None:
        """Takes in one batch; logs every ``log_every_steps``, and after the last."""
        config = self._experiment.config
        self.step += 1
        self._means.add({f"train_{name}": value for name, value in metrics.items()})
        self._throughput.add(config.batch_size)
        self._bar.advance()
        if self.step % config.log_every_steps == 0 or self.step == self._total:
            logged = self._means.take()
            # That of the update which this batch's gradient makes.
            logged["learning_rate"] = self._experiment.learning_rate.at(self.step - 1)
            rate = self._throughput.take()
            if rate is not None:
                logged["images_per_second"] = rate
            self._log(**logged)
            self._bar.show(logged["train_loss"], logged["train_accuracy"], rate)

    def end_epoch(self) -> None:
        """Stops the clock of images per second until the next batch."""
        self._throughput.pause()

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Logs and prints the metrics of the test images."""
        self._test_accuracies.append(metrics["accuracy"])
        self._log(**{f"test_{name}": value for name, value in metrics.items()})
        self.say(
            f"epoch {self._epoch:g}  test loss {metrics['loss']:.4f}  "
            f"test accuracy {metrics['accuracy']:.2%}"
        )

    def summary(self) -> dict[str, Any]:
        """Returns the result of the run, from the evaluations so far."""
        config, pipeline = self._experiment.config, self._experiment.pipeline
        return {
            "final_test_accuracy": self._test_accuracies[-1],
            "best_test_accuracy": max(self._test_accuracies),
            "seconds": time.perf_counter() - self._started,
            "steps": self.step,
            "num_stages": len(pipeline.stages),
            "schedule": config.schedule,
            "staleness": list(pipeline.schedule.staleness),
            "shrink": config.shrink,
            "engine": pipeline.engine,
            "device_kind": pipeline.stages[0].device.device_kind,
            "versions": _versions(),
        }

    @property
    def _epoch(self) -> float:
        return self.step / self._experiment.steps_per_epoch

    def _log(self, **scalars: float) -> None:
        self._writer.write(self.step, {"epoch": self._epoch, **scalars})


def _check_workdir(workdir: pathlib.Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir must be a folder; {workdir} is a file; name another")
    held = [
        name
        for name in (CONFIG_FILE, METRICS_FILE, CHECKPOINTS)
        if (workdir / name).exists()
    ]
    if held:
        raise ValueError(
            f"a workdir takes one run; {workdir} already holds one ({held[0]}); choose "
            f"another workdir"
        )
    existing = next(
        path for path in (workdir, *workdir.absolute().parents) if path.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"workdir must be a folder that can be written; {existing}, where "
            f"{workdir} would be, cannot; choose another workdir"
        )


def _check_numbers(config: ml_collections.ConfigDict) -> None:
    at_least_one = ("batch_size", "eval_batch_size", "num_epochs", "num_stages")
    for name in (*at_least_one, "log_every_steps", "eval_every_epochs"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1; got {config[name]}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32); got {config.seed}")


def _dtype(name: str, value: str) -> np.dtype:
    if value not in DTYPES:
        raise ValueError(f"{name} must be one of {', '.join(DTYPES)}; got {value!r}")
    return jnp.dtype(value)


def _create_pipeline(
    config: ml_collections.ConfigDict,
    spec: data.Spec,
    learning_rate: optimizers.LearningRate,
    timeline: Timeline | None,
) -> Pipeline:
    network = models.create(
        config.network,
        num_classes=spec.num_classes,
        in_channels=spec.image_shape[-1],
        dropout_rate=config.dropout_rate,
        init=config.init,
        dtype=_dtype("dtype", config.dtype),
        param_dtype=_dtype("param_dtype", config.param_dtype),
        seed=config.seed,
    )
    return Pipeline(
        network,
        loss_fn=losses.softmax_cross_entropy,
        optimizer=optimizers.create(
            config.optimizer,
            learning_rate.schedule(),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        ),
        num_stages=config.num_stages,
        cuts=config.cuts,
        schedule=config.schedule,
        shrink=config.shrink,
        backward=config.backward,
        engine=config.engine,
        seed=config.seed,
        timeline=timeline,
    )


def _versions() -> dict[str, str]:
    libraries = (jax, jaxlib, flax, optax)
    return {
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in libraries},
        "fdg_jax": fdg_jax.__version__,
    }


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
