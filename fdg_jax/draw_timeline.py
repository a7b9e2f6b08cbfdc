"""Draws some batches of a timeline; needs matplotlib.

    python -m fdg_jax.draw_timeline runs/DIR/timeline.json --output=timeline.png

A lane per stage, each slice with the number of its batch. For the whole run, and to
look closer, open the file in https://ui.perfetto.dev.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

COLORS = {
    "forward": "#5b9bd5",
    "loss_step": "#9678c8",
    "train": "#9678c8",
    "backward": "#ed9b4f",
    "drain": "#ed9b4f",
    "update": "#62b07a",
    "evaluate": "#b8a078",
    "wait": "#dddddd",
}
"""By the name of a slice; all waits are one."""


class Event(NamedTuple):
    """A slice as the file has it; start and length in milliseconds."""

    name: str
    batch: int
    start: float
    length: float


def read(path: str | os.PathLike) -> dict[str, list[Event]]:
    """Returns the slices of a written timeline, in order, by the name of their lane.

    Args:
        path: of a file that ``Timeline.write`` wrote.

    Raises:
        ValueError: there is no such file, or it is no timeline.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"the timeline must be a file; there is no {str(path)!r}")
    try:
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
        names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
        lanes = {name: [] for name in names}
        for event in events:
            if event["ph"] == "X":
                times = event["ts"] / 1e3, event["dur"] / 1e3
                slices = lanes[names[event["tid"]]]
                slices.append(Event(event["name"], event["args"]["batch"], *times))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"a timeline is a file that Timeline.write wrote; {str(path)!r} is none: "
            f"{error!r}"
        ) from error
    return lanes


def choose_window(
    lanes: Mapping[str, Sequence[Event]], first_batch: int | None, num_batches: int
) -> tuple[float, float]:
    """Returns start and end, in milliseconds, of some batches at the last stage.

    Args:
        lanes: from ``read``.
        first_batch: where to begin; None begins so that they lie in the middle.
        num_batches: how many, at most.

    Raises:
        ValueError: the timeline has no such batch.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1; got {num_batches}")
    last = list(lanes.values())[-1] if lanes else []
    trained = [e for e in last if e.name in ("loss_step", "train")]
    if first_batch is None:
        first = max(0, (len(trained) - num_batches) // 2)
        chosen = trained[first : first + num_batches]
    else:
        chosen = [e for e in trained if e.batch >= first_batch][:num_batches]
    if not chosen:
        held = f"{trained[0].batch} to {trained[-1].batch}" if trained else "none"
        raise ValueError(
            f"the timeline must hold batches from {first_batch or 0} on; it holds "
            f"{held}; choose another --first_batch"
        )
    final = [e for e in last if e.batch == chosen[-1].batch and e.name != "evaluate"]
    return chosen[0].start, max(e.start + e.length for e in final)


def draw(
    lanes: Mapping[str, Sequence[Event]],
    window: tuple[float, float],
    output: str | os.PathLike,
) -> None:
    """Draws the slices within a window, one lane below the other.

    Args:
        lanes: from ``read``.
        window: start and end in milliseconds.
        output: the picture; its suffix says the format.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ValueError("drawing needs matplotlib; pip install matplotlib") from error
    start, end = window
    figure = Figure(figsize=(10, 0.9 + 0.55 * len(lanes)), layout="constrained")
    axes = figure.add_subplot()
    shown = set()
    for row, events in enumerate(lanes.values()):
        for name, batch, begin, length in events:
            begin -= start
            if begin + length < 0 or begin > end - start:
                continue
            kind = "wait" if name.startswith("wait") else name
            shown.add(kind)
            axes.broken_barh([(begin, length)], (row - 0.4, 0.8), color=COLORS[kind])
            if kind != "wait" and length > 0.02 * (end - start):
                middle = max(begin, 0.0) + min(begin + length, end - start)
                axes.text(middle / 2, row, batch, ha="center", va="center", size=8)
    axes.set(xlim=(0, end - start), ylim=(len(lanes) - 0.5, -0.5), xlabel="ms")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params("y", length=0)
    handles = [Patch(color=COLORS[k], label=k) for k in COLORS if k in shown]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False
    )
    figure.savefig(output, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 2 for a mistake in it."""
    parser = argparse.ArgumentParser(
        prog="python -m fdg_jax.draw_timeline", description="Draws a timeline."
    )
    parser.add_argument("file", help="timeline.json of a run")
    parser.add_argument("--output", default="timeline.png", help="the picture")
    parser.add_argument(
        "--first_batch", type=int, help="where to begin; default: in the middle"
    )
    parser.add_argument("--num_batches", type=int, default=6, help="default: 6")
    options = parser.parse_args(arguments)
    try:
        lanes = read(options.file)
        window = choose_window(lanes, options.first_batch, options.num_batches)
        draw(lanes, window, options.output)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
