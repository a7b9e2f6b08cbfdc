"""The paper's numbers: tables 1, 2, 3 and 6 of arXiv 1906.09108, as data.

paper_results.csv holds them as they are printed there, test error in percent after 300
epochs of training and seconds per epoch; the notes are the paper's. The row that the
paper prints as WRN-28-10 with 19.4M parameters is ResNet-1202's.
"""

import csv
import dataclasses
import functools
import importlib.resources
from collections.abc import Mapping
from typing import Any

from fdg_jax import data, methods
from fdg_jax import schedule as schedules
from fdg_jax.words import parse_integers

SOURCE = "arXiv 1906.09108"
ERROR, SECONDS = "test_error_percent", "seconds_per_epoch"


@dataclasses.dataclass(frozen=True)
class Published:
    """A number of the paper.

    Attributes:
        table: its number there.
        value: in percent or seconds.
        note: what the paper says of it.
    """

    table: int
    value: float
    note: str


@functools.cache
def results() -> dict[tuple[str, str, str, int, str, float | None], Published]:
    """Returns all numbers by metric, data set, network, K, method and beta.

    The method is in lower case; beta is None where the paper gives none.
    """
    file = importlib.resources.files("fdg_jax.study") / "paper_results.csv"
    published = {}
    for row in csv.DictReader(file.read_text("utf-8").splitlines()):
        shrink = float(row["shrink"]) if row["shrink"] else None
        key = (row["metric"], row["dataset"], row["network"], int(row["num_stages"]))
        published[*key, row["method"].lower(), shrink] = Published(
            int(row["table"]), float(row["value"]), row["note"]
        )
    return published


def find(metric: str, row: Mapping[str, Any]) -> Published | None:
    """Returns the paper's number for a setting; None where there is none.

    FDG's errors are those of one beta; times, and other methods, have none. There is
    nothing to compare in the paper for part of the training images, a remedy, updates
    of several batches (but a method's own), other schedules than FDG's two, or a
    backward with today's weights where the method has the forward's.

    Args:
        metric: ``ERROR`` or ``SECONDS``.
        row: of results.csv, as text, or as ``results.columns`` has it.
    """
    if not _is_the_papers(row):
        return None
    method, shrink = row["method"], None
    if method == "fdg" and metric == ERROR:
        shrink = float(row["shrink"])
    key = (row["dataset"], row["network"], int(row["num_stages"]), method, shrink)
    return results().get((metric, *key))


def _is_the_papers(row: Mapping[str, Any]) -> bool:
    """Whether a setting trains as the paper's method of its name did."""
    method, num_stages = methods.get(row["method"]), int(row["num_stages"])
    leaves_open, schedule = method.leaves_open, row["staleness"]
    late = [schedules.resolve(s, num_stages).staleness for s in ("reference", "paper")]
    return (
        int(row["num_train"]) == data.spec(row["dataset"]).num_train
        and row["remedy"] == "none"
        and int(row["accumulation"]) == method.accumulation
        and ("schedule" not in leaves_open or parse_integers(schedule) in late)
        and ("backward" not in leaves_open or row["backward"] != "replay")
    )
