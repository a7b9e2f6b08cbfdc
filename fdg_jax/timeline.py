"""The timeline of a run: what every stage did when, and what it waited for.

    timeline = fdg.Timeline()
    with fdg.Pipeline(..., timeline=timeline) as pipeline:
        for metrics in pipeline.train(batches):
            ...
    print(timeline.table())
    timeline.write("timeline.json")

The file is in the Trace Event format, which https://ui.perfetto.dev opens, and
``python -m fdg_jax.draw_timeline timeline.json`` draws. How device time is measured,
and how it is attributed where devices are shared, stands in ``fdg_jax.recorder``.
"""

import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from fdg_jax.engines.program import Ports
from fdg_jax.recorder import WAITS, WORK, Clock, Lane, RecordedProgram, Slice
from fdg_jax.snapshot import StageSnapshot
from fdg_jax.stage import Stage
from fdg_jax.words import tabulate

# The time in which any stage does these is no part of that in which it trains.
_NOT_TRAINING = ("compile", "evaluate")

_FORWARDS = ("forward", "loss_step", "train")
_UPDATES = ("update", "train")
"""What ends a tick."""


class Timeline:
    """Records one pipeline: a lane per stage, a slice per compiled call and per wait.

    The last slices of every lane are kept, so that memory and file are bounded however
    long the run is; all that is told is about these.
    """

    def __init__(self, max_slices: int = 20_000):
        """Creates an empty timeline, to be given to a ``Pipeline``.

        Args:
            max_slices: how many slices of each stage to keep; a batch has four or more.
                20,000 make a file of some 3 MB per stage.

        Raises:
            ValueError: max_slices is below 1.
        """
        if max_slices < 1:
            raise ValueError(f"max_slices must be at least 1; got {max_slices}")
        self._max_slices = max_slices
        self._clock = Clock()
        self._lanes = {}
        self._is_taken = False

    def take(self) -> None:
        """Reserves the timeline for a pipeline.

        Raises:
            ValueError: a pipeline has it.
        """
        if self._is_taken:
            raise ValueError(
                "a timeline records one pipeline; got one that has a pipeline already; "
                "make a new Timeline()"
            )
        self._is_taken = True

    def lane(self, name: str, device: jax.Device) -> Lane:
        """Returns the lane of that name; a new one is made below the others.

        Args:
            name: "stage 0", say.
            device: where its calls run.
        """
        if name not in self._lanes:
            self._lanes[name] = Lane(
                self._clock,
                name,
                device,
                first=not self._lanes,
                limit=self._max_slices,
            )
        return self._lanes[name]

    def program(
        self, stage: Stage, start: StageSnapshot, batch: int, ports: Ports
    ) -> RecordedProgram:
        """Returns a ``StageProgram`` that is recorded, and starts the stage's lane."""
        lane = self.lane(f"stage {stage.index}", stage.device)
        return RecordedProgram(lane, stage, start, batch, ports)

    def end(self) -> None:
        """Tells the threads of all lanes to end, without waiting for any of them."""
        for lane in self._lanes.values():
            lane.end()

    def stop(self, seconds: float | None = None) -> None:
        """Ends the threads of all lanes, once every call so far has been timed.

        Args:
            seconds: the most to wait for each; None for as long as it takes.
        """
        for lane in self._lanes.values():
            lane.stop(seconds)

    def slices(self) -> list[list[Slice]]:
        """Returns each lane's slices, in order; all lanes reach back equally far."""
        with self._clock.lock:
            lanes = [list(lane.slices) for lane in self._lanes.values()]
        full = [lane[0].start for lane in lanes if len(lane) == self._max_slices]
        since = max(full, default=0.0)
        return [[piece for piece in lane if piece.start >= since] for lane in lanes]

    def busy(self) -> list[dict[str, Any]]:
        """Measures how stages spend a tick, once the pipeline is filled.

        Only whole ticks count, from the end of an update to the end of another, between
        the time when every stage has made one and that when a stage ran its last
        forward. Times in which any stage compiled or evaluated, or the pipeline was
        closed, are left out.

        Returns:
            Per lane a dict: "name"; "device"; "batches", ticks that count; "tick", mean
            seconds of one; "work", those of them in which the device worked; "busy",
            work / tick; and "seconds", by kind of slice, in all ticks ("compile" and
            "evaluate": in the whole run). Without a tick, numbers are 0.
        """
        lanes = self.slices()
        window = _filled(lanes)
        training_time = _clock_without(_not_training(lanes))
        return [
            {"name": lane.name, "device": lane.device}
            | _measure(slices, window, training_time)
            for lane, slices in zip(self._lanes.values(), lanes, strict=True)
        ]

    def table(self) -> str:
        """Returns ``busy`` as text: where a tick goes, in milliseconds per batch."""
        lanes = self.busy()
        kinds = [
            kind
            for kind in WORK + WAITS
            if kind not in _NOT_TRAINING
            and any(lane["seconds"][kind] > 5e-6 * lane["batches"] for lane in lanes)
        ]
        header = ["", "device", "batches", "busy", "ms/batch"]
        rows = [header + [_name(kind) for kind in kinds]]
        for lane in lanes:
            device, per_batch = lane["device"], 1e3 / max(1, lane["batches"])
            rows.append(
                [
                    *(lane["name"], f"{device.platform}:{device.id}"),
                    *(f"{lane['batches']}", f"{lane['busy']:.1%}"),
                    f"{1e3 * lane['tick']:.2f}",
                    *(f"{lane['seconds'][kind] * per_batch:.2f}" for kind in kinds),
                ]
            )
        return tabulate(rows)

    def write(self, path: str | os.PathLike) -> None:
        """Writes the slices in the Trace Event format, as JSON.

        A lane is a thread of one process. A slice is an "X" event named after its kind,
        its batch under "args"; times are microseconds. Activations and cotangents are
        flows ("s" and "f") from the slice that made them to the one that used them.

        Args:
            path: of the file, which is whole or not there at any time.
        """
        path = pathlib.Path(path)
        trace = {"traceEvents": list(self._events()), "displayTimeUnit": "ms"}
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")
        partial.replace(path)

    def _events(self) -> Iterator[dict[str, Any]]:
        yield _metadata("process_name", 0, name="fdg_jax")
        for tid, lane in enumerate(self._lanes.values()):
            device = f"{lane.device.platform}:{lane.device.id}"
            yield _metadata("thread_name", tid, name=f"{lane.name} ({device})")
            yield _metadata("thread_sort_index", tid, sort_index=tid)
        lanes = self.slices()
        for tid, slices in enumerate(lanes):
            for piece in slices:
                yield _event(
                    *("X", _name(piece.kind), tid, piece.start),
                    dur=_microseconds(piece.end - piece.start),
                    args={"batch": piece.batch},
                )
        for number, (name, *ends) in enumerate(_flows(lanes)):
            for phase, (tid, piece) in zip("sf", ends, strict=True):
                # A flow is tied to the slice that is open at its time.
                middle = (piece.start + piece.end) / 2
                yield _event(phase, name, tid, middle, id=number, bp="e", cat="flow")


def _filled(lanes: Sequence[Sequence[Slice]]) -> tuple[float, float]:
    """Returns from when until when all stages were at work."""

    def ends(slices, kinds):
        return [piece.end for piece in slices if piece.kind in kinds]

    start = max(
        (min(ends(lane, _UPDATES), default=np.inf) for lane in lanes), default=0
    )
    end = min((max(ends(lane, _FORWARDS), default=0) for lane in lanes), default=0)
    return start, end


def _measure(
    slices: Sequence[Slice], window: tuple[float, float], training_time: Callable
) -> dict[str, Any]:
    """Returns the numbers of one lane, as ``Timeline.busy`` describes them."""
    updates = [
        piece
        for piece in slices
        if piece.kind in _UPDATES and window[0] <= piece.end <= window[1]
    ]
    ends = [piece.end for piece in updates] or [0.0]
    ticks = np.diff(training_time(ends))
    # A tick of no length lies in a time that does not count.
    batches = sum(updates[i + 1].num_batches for i in np.flatnonzero(ticks > 1e-9))
    times = np.array([(piece.start, piece.end) for piece in slices]).reshape(-1, 2)
    took = np.diff(training_time(times.clip(ends[0], ends[-1])))[:, 0]
    seconds = Counter()
    for piece, in_training in zip(slices, took, strict=True):
        outside = piece.kind in _NOT_TRAINING
        seconds[piece.kind] += (
            piece.end - piece.start if outside else float(in_training)
        )
    work = sum(seconds[kind] for kind in WORK if kind not in _NOT_TRAINING)
    total = float(ticks.sum())
    return {
        "batches": batches,
        "tick": total / max(1, batches),
        "work": work / max(1, batches),
        "busy": work / total if total else 0.0,
        "seconds": seconds,
    }


def _not_training(lanes: Sequence[Sequence[Slice]]) -> Iterator[tuple[float, float]]:
    """Yields start and end of what is not training: see ``Timeline.busy``."""
    for slices in lanes:
        for piece in slices:
            if piece.kind in _NOT_TRAINING:
                yield piece.start, piece.end
        for before, after in itertools.pairwise(slices):
            if before.end < after.start:
                yield before.end, after.start


def _clock_without(intervals: Iterable[tuple[float, float]]) -> Callable:
    """Returns a clock that stands still within intervals.

    Args:
        intervals: start and end of each, in seconds; they may overlap.

    Returns:
        A function from times, an array-like of seconds, to times.
    """
    edges, stopped = [0.0], [0.0]
    for start, end in sorted(intervals):
        start = max(start, edges[-1])
        if end > start:
            edges += [start, end]
            stopped += [stopped[-1], stopped[-1] + end - start]
    return lambda times: np.asarray(times) - np.interp(times, edges, stopped)


def _flows(lanes: Sequence[Sequence[Slice]]) -> Iterator[tuple]:
    """Yields (name, (lane, slice), (lane, slice)) of what stages send each other."""

    def pairs(name, source, source_kinds, target, target_kinds):
        sent = {p.batch: p for p in lanes[source] if p.kind in source_kinds}
        for piece in lanes[target]:
            if piece.kind in target_kinds and piece.batch in sent:
                yield name, (source, sent[piece.batch]), (target, piece)

    last = ("loss_step",)
    for k in range(len(lanes) - 1):
        forward, backward = ("forward",), ("backward",)
        yield from pairs("activation", k, forward, k + 1, forward + last)
        yield from pairs("cotangent", k + 1, backward + last, k, backward)


def _event(phase: str, name: str, tid: int, start: float, **fields: Any) -> dict:
    """An event of the Trace Event format; start in seconds."""
    ts = _microseconds(start)
    return {"ph": phase, "name": name, "pid": 0, "tid": tid, "ts": ts, **fields}


def _metadata(name: str, tid: int, /, **args: Any) -> dict:
    return {"ph": "M", "name": name, "pid": 0, "tid": tid, "args": args}


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _name(kind: str) -> str:
    """A kind of slice, as it is shown."""
    return f"wait: {kind}" if kind in WAITS else kind
