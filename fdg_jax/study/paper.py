"""The paper's numbers: tables 1, 2, 3 and 6 of arXiv 1906.09108, as data.

paper_results.csv holds them as they are printed there, test error in percent after 300
epochs of training and seconds per epoch; the notes are the paper's. The row that the
paper prints as WRN-28-10 with 19.4M parameters is ResNet-1202's.
"""

import csv
import dataclasses
import functools
import importlib.resources

from fdg_jax import data
from fdg_jax.study.grid import Cell

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


def find(metric: str, cell: Cell) -> Published | None:
    """Returns the paper's number for a cell's setting; None where there is none.

    FDG's errors are those of one beta; times, and other methods, have none. Runs on
    part of the training images have nothing to compare in the paper.

    Args:
        metric: ``ERROR`` or ``SECONDS``.
        cell: of any seed.
    """
    config = cell.config
    if config.num_train not in (0, data.spec(config.dataset).num_train):
        return None
    shrink = config.shrink if cell.method == "fdg" and metric == ERROR else None
    key = (config.dataset, config.network, config.num_stages, cell.method, shrink)
    return results().get((metric, *key))
