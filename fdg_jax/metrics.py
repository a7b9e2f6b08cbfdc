"""Where metrics go: a file of JSON lines, TensorBoard, and a progress bar."""

import contextlib
import errno
import json
import math
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

import tqdm
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

METRICS_FILE = "metrics.jsonl"
# What file systems say that have no fsync(2); those that cannot write say otherwise.
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
EVENT_FILES = "events.out.tfevents.*"


class MetricsWriter:
    """Writes scalars to ``metrics.jsonl`` and to a TensorBoard event file.

    Both are written at once, by the caller's thread: what has been written when a
    snapshot is taken is what the files hold then.
    """

    def __init__(self, workdir: pathlib.Path, step: int = 0):
        """Opens the files.

        Args:
            workdir: an existing folder. Lines are added to its ``metrics.jsonl``.
            step: batches trained so far, part of the name of a new event file.
        """
        seconds, host = int(time.time()), socket.gethostname()
        name = EVENT_FILES.replace("*", f"{seconds:010d}.{host}.{step}")
        self._files = _Appended(workdir / METRICS_FILE), _Appended(workdir / name)
        self._lines, self._events = self._files
        version = event_pb2.Event(wall_time=seconds, file_version="brain.Event:2")
        self._events.add(_record(version))

    def flush(self) -> None:
        """Has everything on disk when this returns.

        Raises:
            OSError: the disk does not take it.
        """
        for file in self._files:
            file.append()
            file.sync()

    def close(self) -> None:
        """Closes the files.

        Raises:
            OSError: the disk does not take what is still to be written.
        """
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line, and the same scalars; whole in the files at the return.

        Args:
            step: batches trained so far.
            scalars: name to value. JSON has no infinity and no NaN: they become null.

        Raises:
            OSError: the disk does not take it. All of it is kept for the next time.
        """
        line = {"step": step} | {
            name: value if math.isfinite(value) else None
            for name, value in scalars.items()
        }
        self._lines.add(json.dumps(line, allow_nan=False).encode() + b"\n")
        for name, value in scalars.items():
            event = event_pb2.Event(
                wall_time=time.time(), step=step, summary=summary.scalar(name, value)
            )
            self._events.add(_record(event))
        for file in self._files:
            file.append()


class _Appended:
    """A file to which all that was added is appended at once, or nothing of it."""

    def __init__(self, path: pathlib.Path):
        self._file = open(path, "ab", buffering=0)
        self._unwritten = b""

    def add(self, data: bytes) -> None:
        self._unwritten += data

    def append(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(self._unwritten)
            if written < len(self._unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(size)
            raise
        self._unwritten = b""

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in _NO_FSYNC:
                raise

    def close(self) -> None:
        with contextlib.closing(self._file):
            self.append()


def _record(event: event_pb2.Event) -> bytes:
    """An event as event files have it: its length and itself, each with its CRC."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        part + struct.pack("<I", masked_crc32c(part)) for part in (length, data)
    )


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
