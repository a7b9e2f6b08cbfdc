"""When snapshots are taken, and the thread that writes them while training goes on."""

import pathlib
import shutil
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

import ml_collections
import numpy as np

from fdg_jax import checkpoint, resume
from fdg_jax import snapshot as snapshots
from fdg_jax.data import TrainBatches
from fdg_jax.models.network import Network
from fdg_jax.pipeline import Pipeline
from fdg_jax.report import Report
from fdg_jax.snapshot_store import SnapshotStore
from fdg_jax.stall import StalledError
from fdg_jax.stopping import Stopped
from fdg_jax.words import first_batches


class Best(NamedTuple):
    """The most accurate network so far.

    Attributes:
        step: batches trained until then.
        accuracy: of the test images, between 0 and 1.
        arrays: its values by name, on the host.
    """

    step: int
    accuracy: float
    arrays: Mapping[str, np.ndarray]


class SnapshotTaker:
    """Takes a run's snapshots, at most one at a time.

    A snapshot that is due is asked for between two batches, and is complete when the
    metrics of the last batch before it have come out: then the logs are what they
    would be if training had stopped there. Use it as a context manager.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        pipeline: Pipeline,
        train_batches: TrainBatches,
        report: Report,
        store: SnapshotStore,
        workdir: pathlib.Path,
        written: int = 0,
        best: Best | None = None,
    ):
        """Takes none yet.

        Args:
            config: how often; see configs/default.py.
            pipeline: that trains.
            train_batches: what it trains on.
            report: what it tells.
            store: where snapshots go.
            workdir: where the logs are.
            written: step of the newest snapshot there is; 0 for none.
            best: the best network so far.
        """
        self._config = config
        self._pipeline, self._train_batches = pipeline, train_batches
        self._report, self._store, self._workdir = report, store, workdir
        self._written, self._best = written, best
        self._pending = None
        self._writer = None
        self._asked_at = report.step, time.monotonic()

    def __enter__(self) -> "SnapshotTaker":
        """Returns itself."""
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """Waits until the snapshot that is being written is there."""
        if error_type in (None, Stopped):
            self._wait()
        elif error_type is not StalledError:  # after which its arrays may never come
            self._wait(self._config.stall_timeout)

    def after_batch(self) -> None:
        """Asks for a snapshot that is due, or writes one that is complete."""
        if self._pending is None and not self._is_writing() and self._is_due():
            self._ask()
        if self._pending is not None and self._pending[0].batch == self._report.step:
            self._write()

    def take_now(self, seconds: float | None = None) -> int:
        """Takes a snapshot of a pipeline whose metrics have all been read.

        Args:
            seconds: the most to wait for the disk; None for as long as it takes.

        Returns:
            Batches trained before it, once it is on disk; before the last one if it
            could not be written.
        """
        self._wait(seconds)
        self._ask()
        self._write()
        self._wait(seconds)
        return self._written

    def after_evaluation(self) -> None:
        """Keeps the network if no earlier one was more accurate."""
        step, accuracy = self._report.evaluations[-1]
        if self._best is None or accuracy > self._best.accuracy:
            arrays = checkpoint.network_arrays(self._pipeline.network)
            self._best = Best(step, accuracy, arrays)

    def save_networks(self, directory: pathlib.Path) -> None:
        """Saves the network as it is now, and the most accurate one.

        Args:
            directory: where checkpoints go.
        """
        shutil.rmtree(directory, ignore_errors=True)  # of an end that was cut short
        step = self._report.step
        if self._best.step != step:
            checkpoint.save_network(self._best_network(), directory, self._best.step)
        checkpoint.save_network(self._pipeline.network, directory, step)

    def save_halted(self, directory: pathlib.Path) -> None:
        """Saves the network from before an update that was not finite, and the best.

        Args:
            directory: where the checkpoints "newest" and "best" go.
        """
        counts = self._pipeline.batches_applied
        try:
            checkpoint.save_network(
                self._pipeline.network, directory / "newest", min(counts)
            )
            if self._best is not None:
                step = self._best.step
                checkpoint.save_network(self._best_network(), directory / "best", step)
        except OSError as error:
            self._report.say(f"the last network could not be written: {error}")
            return
        self._report.say(
            f"the network with the updates of {first_batches(counts)} is in "
            f"{directory}; fdg.load, and the modes evaluate and export, read it"
        )

    def _best_network(self) -> Network:
        return checkpoint.set_network_arrays(self._pipeline.network, self._best.arrays)

    def _is_due(self) -> bool:
        step, seconds = self._asked_at
        every_steps = self._config.snapshot_every_steps
        every_minutes = self._config.snapshot_every_minutes
        return bool(
            (every_steps and self._report.step - step >= every_steps)
            or (every_minutes and time.monotonic() - seconds >= 60 * every_minutes)
        )

    def _ask(self) -> None:
        self._asked_at = self._report.step, time.monotonic()
        # The batches that have gone in are just those before the marker.
        self._pending = self._pipeline.snapshot(), self._train_batches.state

    def _write(self) -> None:
        """Hands the snapshot to a thread, with the logs as they are at its batch."""
        (asked, data), self._pending = self._pending, None
        snapshot, best = asked.result(), self._best
        groups = {"stages": snapshots.to_arrays(snapshot), "data": data._asdict()}
        if best is not None:
            groups["best"] = best.arrays
        arrays = {
            f"{group}/{name}": array
            for group, named in groups.items()
            for name, array in named.items()
        }
        try:
            record = {
                "batch": snapshot.batch,
                "lengths": snapshot.lengths(),
                "nonfinite": snapshot.nonfinite,
                "dataset": self._train_batches.digest,
                "cuts": [stage.blocks.start for stage in self._pipeline.stages[1:]],
                "report": self._report.state(),
                "logs": resume.log_sizes(self._workdir),
                "best": None if best is None else [best.step, best.accuracy],
                "versions": resume.versions(),
                "jax_config": resume.jax_config(),
            }
        except OSError as error:
            self._say_failed(snapshot.batch, error)
            return
        del snapshot
        self._writer = threading.Thread(
            target=self._write_to_disk,
            args=(record, arrays),
            name="fdg-snapshot-writer",
            daemon=True,
        )
        self._writer.start()

    def _write_to_disk(self, record: dict, arrays: dict) -> None:
        step = record["batch"]
        try:
            self._store.write(step, arrays, record)
        except Exception as error:  # nobody else would tell of it
            self._say_failed(step, error)
            return
        self._written = step
        try:
            self._store.remove_old()
        except OSError as error:
            self._report.say(
                f"snapshots older than that of step {step} could not be removed: "
                f"{error}; training goes on"
            )

    def _say_failed(self, step: int, error: Exception) -> None:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        self._report.say(
            f"the snapshot of step {step} could not be written: {kind}{error}; "
            f"training goes on; there are those of steps {self._store.steps()}"
        )

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _wait(self, seconds: float | None = None) -> None:
        if self._writer is not None:
            self._writer.join(seconds)
