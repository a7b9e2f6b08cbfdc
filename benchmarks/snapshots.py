"""Measures what a snapshot costs the training that goes on meanwhile.

    python -m benchmarks.snapshots --network=resnet20 --num_stages=2

A filled pipeline trains in rounds of as many batches, in turns without and with one
snapshot, which is asked for after the first batch of the round and written to disk by a
thread, as ``train.py`` does it. A round is long enough for the writing to end in it.
Lines of the report:

    snapshot MiB           arrays of one snapshot
    write s                from asking for it to its folder being there
    round s, without       median (least - most)
    round s, with          likewise
    lost s                 difference of a pair of rounds, likewise
    lost at one a minute   median of lost over 60 seconds, in percent

Exit status: 0 measured; 2 an argument is wrong.
"""

import argparse
import itertools
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np

import fdg_jax as fdg
from benchmarks import jax_bp
from benchmarks.task import Task
from fdg_jax import host_memory
from fdg_jax import snapshot as snapshots
from fdg_jax.snapshot import Snapshot
from fdg_jax.snapshot_store import SnapshotStore
from fdg_jax.words import tabulate

MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    arguments = parse(argv[1:])
    host_memory.keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", arguments.num_stages)
    try:
        print(measure(arguments))
    except ValueError as error:
        print(f"snapshots: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags' values; ends the process where one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.snapshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--FLAG=VALUE ...]",
    )
    for flag, default, words in (
        ("network", "resnet20", "as fdg.models.create takes it"),
        ("num_stages", 2, "K, a device each"),
        ("batch_size", 128, "images in a batch"),
        ("cuts", "paper", "as fdg.Pipeline takes it"),
        ("schedule", "reference", "as fdg.Pipeline takes it"),
        ("engine", "threads", "as fdg.Pipeline takes it"),
        ("rounds", 5, "pairs of rounds"),
        ("round_seconds", 12.0, "about how long each round takes"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=type(default),
            default=default,
            metavar="",
            help=f"{words} (%(default)s)",
        )
    return parser.parse_args(argv)


def measure(arguments: argparse.Namespace) -> str:
    """Trains, and returns the report.

    Raises:
        ValueError: an argument is not valid.
    """
    task = Task(
        network=arguments.network,
        num_stages=arguments.num_stages,
        batch_size=arguments.batch_size,
        cuts=None,
        schedule=fdg.schedule.resolve(
            arguments.schedule, arguments.num_stages
        ).staleness,
        dtype="float32",
    )
    pipeline = fdg.Pipeline(
        jax_bp.create_network(task),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=jax_bp.create_optimizer(),
        num_stages=task.num_stages,
        cuts=arguments.cuts,
        schedule=arguments.schedule,
        engine=arguments.engine,
    )
    batch = jax.device_put(jax_bp.create_batch(task), jax.devices()[0])
    without, with_one = [], []
    with pipeline, tempfile.TemporaryDirectory() as folder:
        rounds = _Rounds(pipeline, batch, pathlib.Path(folder))
        rounds.run(2 * task.schedule[0] + 4)
        num_batches = max(4, round(arguments.round_seconds / (rounds.run(4) / 4)))
        rounds.run(num_batches, with_snapshot=True)  # Orbax's imports and first write
        rounds.write_seconds.clear()
        for _ in range(arguments.rounds):
            without.append(rounds.run(num_batches))
            with_one.append(rounds.run(num_batches, with_snapshot=True))
    lost = np.subtract(with_one, without)
    return tabulate(
        [
            ("snapshot MiB", f"{rounds.mib:,.1f}"),
            ("write s", _spread(rounds.write_seconds)),
            ("batches in a round", str(num_batches)),
            ("round s, without", _spread(without)),
            ("round s, with", _spread(with_one)),
            ("lost s", _spread(lost)),
            ("lost at one a minute", f"{100 * np.median(lost) / 60:.2f} %"),
        ]
    )


class _Rounds:
    """Rounds of training, with or without a snapshot in them."""

    def __init__(self, pipeline: fdg.Pipeline, batch: dict, folder: pathlib.Path):
        self._pipeline, self._batch = pipeline, batch
        self._store = SnapshotStore(folder, keep=1)
        self._read = 0
        self.mib = 0.0
        self.write_seconds = []

    def run(self, num_batches: int, with_snapshot: bool = False) -> float:
        """Trains, and returns the seconds until all batches and the files are there."""
        start, asked, writer = time.perf_counter(), None, None
        batches = itertools.repeat(self._batch, num_batches)
        for read, _ in enumerate(self._pipeline.train(batches)):
            self._read += 1
            if with_snapshot and read == 0:
                asked, since = self._pipeline.snapshot(), time.perf_counter()
            if asked is not None and writer is None and asked.batch == self._read:
                arguments = (asked.result(), since)
                writer = threading.Thread(target=self._write, args=arguments)
                writer.start()
        if writer is not None:
            writer.join()
        return time.perf_counter() - start

    def _write(self, snapshot: Snapshot, since: float) -> None:
        arrays = snapshots.to_arrays(snapshot)
        self.mib = sum(array.nbytes for array in arrays.values()) / MIB
        self._store.write(snapshot.batch, arrays, {})
        self._store.remove_old()
        self.write_seconds.append(time.perf_counter() - since)


def _spread(seconds: Sequence[float]) -> str:
    low, middle, high = np.min(seconds), np.median(seconds), np.max(seconds)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
