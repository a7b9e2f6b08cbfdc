"""What the runs of a study have come to: read from their folders, tidy, as CSV."""

import csv
import dataclasses
import io
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from fdg_jax import from_config, methods, resume
from fdg_jax.metrics import METRICS_FILE
from fdg_jax.study.grid import Cell

FAILURE_FILE = "failure.json"
"""In the folder of a cell that has failed: its state and the reason."""

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
UNFINISHED, NOT_BEGUN = "unfinished", "not begun"

COLUMNS = (
    *("study", "cell", "setting", "state", "method", "network", "dataset"),
    *("num_train", "num_stages", "schedule", "staleness", "shrink", "backward"),
    *("remedy", "accumulation", "engine"),
)
"""Of every row, before those of the study's other axes; staleness is in batches."""

_SUMMARY = (
    *("final_test_accuracy", "best_test_accuracy", "engine"),
    *("device_kind", "host", "versions"),
)

MEASURED = (
    *("seed", "epoch", "step", "train_loss", "test_loss", "test_accuracy"),
    *("test_error_percent", "images_per_second", "seconds"),
)
"""Of every row, at its end."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A cell and what is in its folder.

    Attributes:
        cell: what runs.
        state: FINISHED, DIVERGED, FAILED, UNFINISHED or NOT_BEGUN.
        reason: of a failure.
        epochs: a dict with the keys of MEASURED per evaluation.
        summary: of a run that is finished, as in its summary.json.
    """

    cell: Cell
    state: str
    reason: str
    epochs: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    @property
    def final_error(self) -> float:
        """Test error in percent at the end of a finished run."""
        return _percent(self.summary["final_test_accuracy"])

    @property
    def best_error(self) -> float:
        """The lowest test error in percent of a finished run."""
        return _percent(self.summary["best_test_accuracy"])

    @property
    def images_per_second(self) -> float | None:
        """Median over the epochs that were timed, compilation and evaluation apart."""
        return _median(row["images_per_second"] for row in self.epochs)

    @property
    def seconds_per_epoch(self) -> float | None:
        """Seconds of training in an epoch, by the median of images per second."""
        return _median(row["seconds"] for row in self.epochs)

    @property
    def engine(self) -> str:
        """What ran the stages; before that is known, as it was asked for."""
        asked = self.cell.config.engine
        return asked if self.summary is None else self.summary["engine"]


def read(cell: Cell, workdir: pathlib.Path) -> Run:
    """Reads what there is of a cell; of a run under way, what it has logged so far.

    Args:
        cell: of the study.
        workdir: the study's.

    Raises:
        ValueError: a file in its folder is damaged.
    """
    folder = workdir / cell.name
    summary, state, reason = None, NOT_BEGUN, ""
    if resume.is_finished(folder):
        path = folder / resume.SUMMARY_FILE
        summary, state = _parse(path.read_bytes(), path, _SUMMARY), FINISHED
    elif (folder / FAILURE_FILE).exists():
        path = folder / FAILURE_FILE
        failure = _parse(path.read_bytes(), path, ("state", "reason"))
        state, reason = failure["state"], failure["reason"]
    elif resume.has_run(folder):
        state = UNFINISHED
    return Run(cell, state, reason, _epochs(cell, folder), summary)


def read_all(cells: Iterable[Cell], workdir: pathlib.Path) -> list[Run]:
    """Reads every cell of a study."""
    return [read(cell, workdir) for cell in cells]


def metrics(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines that a run has logged; none where it has not begun.

    Raises:
        ValueError: a line is damaged, other than by having no end yet.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return [_parse(line, path, ("step", "epoch")) for line in whole]


def _parse(text: bytes, path: pathlib.Path, keys: Sequence[str]) -> dict[str, Any]:
    """Returns an object that a run has written, which has the keys at least."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        begin = text[:60].decode(errors="replace")
        raise ValueError(
            f"a run's {path.name} has JSON objects with {', '.join(keys)}; {path} has "
            f"{begin!r}; remove the folder {path.parent} to have it run again, or "
            f"choose another --workdir"
        )
    return value


def write_csv(study: str, runs: Iterable[Run]) -> str:
    """Returns a table with a row per run and epoch, tidy: a column per variable.

    ``train_loss`` is the mean since the row before; ``images_per_second`` the median of
    what was logged since then, empty where nothing was timed; ``seconds`` what training
    an epoch takes at that rate; ``staleness`` that of every stage, in batches.

    Args:
        study: its name.
        runs: from ``read_all``.
    """
    runs = list(runs)
    axes = sorted({key for run in runs for key in run.cell.axes} - {*COLUMNS})
    text = io.StringIO()
    writer = csv.DictWriter(text, (*COLUMNS, *axes, *MEASURED), lineterminator="\n")
    writer.writeheader()
    for run in runs:
        of_run = {"study": study, "state": run.state, "engine": run.engine}
        common = columns(run.cell) | of_run
        common |= {key: run.cell.config[key] for key in axes}
        writer.writerows(common | row for row in run.epochs)
    return text.getvalue()


def columns(cell: Cell) -> dict[str, Any]:
    """Returns what the columns of a CSV say of a cell, whatever its run came to."""
    config = cell.config
    arguments = from_config.method_arguments(config)
    return {key: config[key] for key in COLUMNS if key in config} | {
        "cell": cell.name,
        "setting": cell.setting,
        "num_train": from_config.num_train(config),
        "schedule": _schedule(config, arguments),
        "backward": arguments["backward"],
        "accumulation": arguments["accumulation"],
        "staleness": ",".join(map(str, arguments["schedule"].staleness)),
    }


def _schedule(config: ml_collections.ConfigDict, arguments: Mapping[str, Any]) -> str:
    """The schedule's name, or its integers as the config has them."""
    own = config.schedule == methods.AUTO
    return arguments["schedule"].name if own else config.schedule


def _epochs(cell: Cell, folder: pathlib.Path) -> list[dict[str, Any]]:
    """A row per evaluation, with what was logged of training since the one before."""
    images = from_config.images_per_epoch(cell.config)
    rows, training = [], []
    for line in metrics(folder):
        if "test_loss" not in line:
            training.append(line)
            continue
        rate = _median(log.get("images_per_second") for log in training)
        before = rows[-1]["step"] if rows else 0
        rows.append(
            {
                "seed": cell.config.seed,
                "epoch": line["epoch"],
                "step": line["step"],
                "train_loss": _mean_loss(training, before),
                "test_loss": line["test_loss"],
                "test_accuracy": line["test_accuracy"],
                "test_error_percent": _percent(line["test_accuracy"]),
                "images_per_second": rate,
                "seconds": None if rate is None else images / rate,
            }
        )
        training = []
    return rows


def _mean_loss(logs: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Mean over the steps since ``step``; each loss is one over those since another."""
    if not logs or any(log["train_loss"] is None for log in logs):
        return None
    ends = [log["step"] for log in logs]
    steps = [end - begin for begin, end in itertools.pairwise([step, *ends])]
    losses = [log["train_loss"] for log in logs]
    return statistics.fmean(losses, steps) if sum(steps) else losses[-1]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _percent(accuracy: float) -> float:
    return 100.0 * (1.0 - accuracy)
