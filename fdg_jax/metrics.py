"""Where metrics go: a file of JSON lines, TensorBoard, and a progress bar."""

import contextlib
import errno
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

import tqdm
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

METRICS_FILE = "metrics.jsonl"
EVENT_FILES = "events.out.tfevents.*"


class MetricsWriter:
    """Writes scalars to ``metrics.jsonl`` and to TensorBoard event files.

    Both are written at once, by the caller's thread: what has been written when a
    snapshot is taken is what the files hold then.
    """

    def __init__(self, workdir: pathlib.Path, step: int = 0):
        """Opens the files.

        Args:
            workdir: an existing folder. Lines are added to its ``metrics.jsonl``.
            step: batches trained so far, part of the name of a new event file.
        """
        self._lines = open(workdir / METRICS_FILE, "ab", buffering=0)
        self._unwritten = b""
        self._board = EventsWriter(str(workdir / "events"), f".{step}")

    def flush(self) -> None:
        """Has everything on disk when this returns.

        Raises:
            OSError: the disk does not take it.
        """
        self._append(b"")
        os.fsync(self._lines.fileno())
        self._board.flush()

    def close(self) -> None:
        """Closes the files.

        Raises:
            OSError: the disk does not take what is still to be written.
        """
        with contextlib.closing(self._lines):
            self._append(b"")
        self._board.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line, whole on disk when this returns, and the same scalars.

        Args:
            step: batches trained so far.
            scalars: name to value. JSON has no infinity and no NaN: they become null.

        Raises:
            OSError: the disk does not take it. The line is kept for the next time.
        """
        line = {"step": step} | {
            name: value if math.isfinite(value) else None
            for name, value in scalars.items()
        }
        self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
        for name, value in scalars.items():
            self._board.write_event(
                event_pb2.Event(
                    wall_time=time.time(),
                    step=step,
                    summary=summary.scalar(name, value),
                )
            )

    def _append(self, line: bytes) -> None:
        """Appends all lines that are still to be written, or none of them."""
        self._unwritten += line
        size = self._lines.seek(0, os.SEEK_END)
        try:
            written = self._lines.write(self._unwritten)
            if written < len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._lines.truncate(size)
            raise
        self._unwritten = b""


class RunningMean:
    """The mean of dicts of numbers, over the batches since it was last taken."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0):
        """Starts with no batch, or with those of a ``state``."""
        self._sums = dict(sums or {})
        self._count = count

    def state(self) -> dict:
        """Returns the arguments that would make another one like this."""
        return {"sums": dict(self._sums), "count": self._count}

    def add(self, scalars: Mapping[str, float]) -> None:
        """Adds one batch's numbers."""
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1

    def take(self) -> dict[str, float]:
        """Returns the means and starts anew."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


class Throughput:
    """Images per second of training, without compilation and evaluation.

    The clock does not run during the first ``warmup`` batches, nor from ``pause`` to
    the next batch. Where batches come out in bursts, only the ends of bursts are looked
    at, since the wait for all of a burst lies before its first batch.
    """

    def __init__(self, warmup: int, burst: int = 1):
        """Starts before the first batch.

        Args:
            warmup: batches to leave out at the start.
            burst: batches that come out together.
        """
        self._warmup = warmup
        self._burst = burst
        self._images = 0
        self._seconds = 0.0
        self.pause()

    def add(self, images: int) -> None:
        """Counts one batch that has just come out of the pipeline."""
        self._warmup -= 1
        self._uncounted_batches += 1
        self._uncounted_images += images
        if self._uncounted_batches % self._burst:
            return
        now = time.perf_counter()
        if self._warmup < 0 and self._since is not None:
            self._images += self._uncounted_images
            self._seconds += now - self._since
        self._since = now
        self._uncounted_batches = self._uncounted_images = 0

    def pause(self) -> None:
        """Stops the clock; the next batch, or whole burst, starts it."""
        self._since = None
        self._uncounted_batches = self._uncounted_images = 0

    def take(self) -> float | None:
        """Returns the rate since it was last taken; None where nothing was timed."""
        rate = self._images / self._seconds if self._images else None
        self._images, self._seconds = 0, 0.0
        return rate


class ProgressBar:
    """A tqdm bar over batches, with loss, accuracy and images per second.

    It is drawn on standard error, and only where that is a terminal.
    """

    def __init__(self, total: int, done: int = 0, shown: bool = True):
        """Draws the bar.

        Args:
            total: batches in the whole run.
            done: batches that lie behind already.
            shown: False never draws it.
        """
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            unit="batch",
            dynamic_ncols=True,
            disable=None if shown else True,
        )

    def close(self) -> None:
        """Closes the bar."""
        self._bar.close()

    def advance(self) -> None:
        """Counts one batch."""
        self._bar.update()

    def show(
        self, loss: float, accuracy: float, images_per_second: float | None
    ) -> None:
        """Shows the latest numbers behind the bar."""
        postfix = {"loss": f"{loss:.4f}", "accuracy": f"{accuracy:.2%}"}
        if images_per_second is not None:
            postfix["images/s"] = f"{images_per_second:.0f}"
        self._bar.set_postfix(postfix, refresh=False)

    def print(self, line: str) -> None:
        """Prints a line to standard output, above the bar."""
        self._bar.write(line)
