import contextlib
import errno
import json
import math
import os
import struct

import pytest
from tensorboardX.proto import event_pb2

from fdg_jax import metrics


def _events(folder):
    """Reads TensorBoard's record format: length, its CRC, the event, its CRC."""
    (file,) = folder.glob("events.out.tfevents.*")
    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]


def test_both_files_hold_the_same_scalars(tmp_path):
    written = [
        (10, {"train_loss": 2.25, "learning_rate": 0.5}),
        (20, {"test_accuracy": 0.75}),
    ]
    with contextlib.closing(metrics.MetricsWriter(tmp_path)) as writer:
        for step, scalars in written:
            writer.write(step, scalars)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, **scalars} for step, scalars in written
    ]
    board = {
        (event.step, value.tag): value.simple_value
        for event in _events(tmp_path)
        for value in event.summary.value
    }
    assert board == {
        (step, name): value
        for step, scalars in written
        for name, value in scalars.items()
    }


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with contextlib.closing(metrics.MetricsWriter(tmp_path)) as writer:
        writer.write(1, {"train_loss": 1.0})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "train_loss": 1.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_file_stays_json_where_a_metric_is_not_finite(tmp_path, value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    with contextlib.closing(metrics.MetricsWriter(tmp_path)) as writer:
        writer.write(1, {"test_loss": value})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "test_loss": None}


def test_running_mean_starts_anew_when_taken():
    mean = metrics.RunningMean()
    for loss in (1.0, 2.0, 6.0):
        mean.add({"loss": loss, "accuracy": loss / 10})
    assert mean.take() == pytest.approx({"loss": 3.0, "accuracy": 0.3})
    mean.add({"loss": 5.0, "accuracy": 1.0})
    assert mean.take() == {"loss": 5.0, "accuracy": 1.0}


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)

    def batch_after(self, seconds, throughput):
        self.now += seconds
        throughput.add(images=8)


def test_throughput_leaves_out_warmup_and_pauses(monkeypatch):
    clock = Clock(monkeypatch)
    throughput = metrics.Throughput(warmup=2)
    clock.batch_after(60.0, throughput)  # compiling
    clock.batch_after(30.0, throughput)  # compiling
    assert throughput.take() is None
    clock.batch_after(1.0, throughput)
    clock.batch_after(3.0, throughput)
    assert throughput.take() == 16 / 4.0
    throughput.pause()
    clock.batch_after(50.0, throughput)  # an evaluation came between
    clock.batch_after(2.0, throughput)
    assert throughput.take() == 8 / 2.0


def test_throughput_of_bursts_is_taken_at_their_ends(monkeypatch):
    clock = Clock(monkeypatch)
    throughput = metrics.Throughput(warmup=0, burst=4)
    for _ in range(3):  # 4 batches every 2 seconds, all wait before the first of them
        for wait in (2.0, 0.0, 0.0, 0.0):
            clock.batch_after(wait, throughput)
    clock.batch_after(2.0, throughput)
    assert throughput.take() == 32 / 2.0
    assert throughput.take() is None  # the open burst is not counted by halves


def test_progress_bar_is_silent_off_a_terminal(capsys):
    with contextlib.closing(metrics.ProgressBar(total=3)) as bar:
        bar.advance()
        bar.show(loss=1.0, accuracy=0.5, images_per_second=None)
        bar.print("a line")
    assert capsys.readouterr() == ("a line\n", "")


def test_progress_bar_shows_loss_accuracy_and_rate(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with contextlib.closing(metrics.ProgressBar(total=2)) as bar:
        bar.show(loss=0.25, accuracy=0.5, images_per_second=1234.4)
        bar.advance()
        bar.advance()
    shown = capsys.readouterr().err
    assert "loss=0.2500" in shown
    assert "accuracy=50.00%" in shown
    assert "images/s=1234" in shown


def test_a_line_that_finds_no_room_is_written_later(tmp_path):
    writer = metrics.MetricsWriter(tmp_path)
    writer.write(1, {"train_loss": 1.0})
    lines = writer._lines._file

    class Full:
        """A file that takes five more bytes."""

        def __getattr__(self, name):
            return getattr(lines, name)

        def write(self, data):
            return lines.write(data[:5])

    writer._lines._file = Full()
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            writer.write(step, {"train_loss": 1.0})
    with pytest.raises(OSError, match="No space"):
        writer.flush()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    writer._lines._file = lines
    writer.write(4, {"train_loss": 1.0})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 4]


def test_a_file_system_without_fsync_is_written_all_the_same(tmp_path, monkeypatch):
    def fail(number):
        def fsync(file):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    with contextlib.closing(metrics.MetricsWriter(tmp_path)) as writer:
        for number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            fail(number)
            writer.flush()
        fail(errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            writer.flush()
