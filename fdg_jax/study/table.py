"""A study as a Markdown table: mean, deviation and n, beside the paper's numbers."""

import collections
import itertools
import statistics
from collections.abc import Iterable, Sequence

from fdg_jax.study import paper, results
from fdg_jax.study.definition import Study
from fdg_jax.study.results import FINISHED, NOT_BEGUN, Run

_LEGEND = (
    "Test error in percent, mean ± sample deviation over n seeds, after the last epoch "
    "(final) and where it was lowest (best; chosen by the test images, so optimistic). "
    "Images/s and seconds per epoch: median over the epochs of training, without "
    "compilation and evaluation; mean ± sample deviation over the seeds. They compare "
    "only between runs with the same engine, and with as many processes at a time."
)


def by_setting(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Returns the runs of every setting, settings and runs in their order."""
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run.cell.setting].append(run)
    return dict(groups)


def markdown(study: Study, runs: Sequence[Run]) -> str:
    """Returns the table of a study, a row per setting, and what is to be known of it.

    Args:
        study: for its name and note.
        runs: of all its cells.
    """
    axes = sorted({key for run in runs for key in run.cell.axes})
    header = ["dataset", "network", "epochs", "K", "method", "beta", *axes, "n"]
    header += ["final error", "best error", "paper", "images/s", "s/epoch"]
    header += ["paper s/epoch", "engine", "remarks"]
    rows = [_row(group, axes) for group in by_setting(runs).values()]
    # Columns that say nothing in this study are left out.
    empty = {name for i, name in enumerate(header) if not any(r[i] for r in rows)}
    if len({run.engine for run in runs}) == 1:
        empty.add("engine")
    kept = [i for i, name in enumerate(header) if name in axes or name not in empty]
    lines = [[header[i] for i in kept], ["---"] * len(kept)]
    lines += [[row[i] for i in kept] for row in rows]
    parts = [f"# {study.name}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, *_notes(study, runs)]) + "\n"


def _row(group: Sequence[Run], axes: Sequence[str]) -> list[str]:
    cell = group[0].cell
    config = cell.config
    finished = [run for run in group if run.state == FINISHED]
    beta = f"{config.shrink:g}" if cell.shrinks else ""
    row = results.columns(cell)
    error, seconds = (paper.find(m, row) for m in (paper.ERROR, paper.SECONDS))
    return [
        *(config.dataset, config.network, str(config.num_epochs)),
        *(str(config.num_stages), cell.method, beta),
        *(str(cell.axes[key]) if key in cell.axes else "" for key in axes),
        str(len(finished)),
        mean_and_deviation([run.final_error for run in finished]),
        mean_and_deviation([run.best_error for run in finished]),
        _published(error),
        mean_and_deviation([run.images_per_second for run in finished], 0),
        mean_and_deviation([run.seconds_per_epoch for run in finished]),
        _published(seconds),
        group[0].engine,
        _remarks(group),
    ]


def mean_and_deviation(values: Iterable[float | None], digits: int = 2) -> str:
    """Returns ``"7.23 ± 0.12"``: the mean and the sample deviation (n - 1).

    A single value has no deviation, and no value gives "".

    Args:
        values: the sample; what is None is left out.
        digits: after the point.
    """
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "".join(f"{value:.{digits}f}" for value in known)
    mean, deviation = statistics.fmean(known), statistics.stdev(known)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _published(number: paper.Published | None) -> str:
    if number is None:
        return ""
    return f"{number.value:g} (table {number.table})"


def _remarks(group: Sequence[Run]) -> str:
    states = collections.Counter(run.state for run in group)
    counts = [
        f"{count} {state}" for state, count in states.items() if state != FINISHED
    ]
    return ", ".join(counts)


def _notes(study: Study, runs: Sequence[Run]) -> list[str]:
    """What stands below the table, a paragraph each."""
    notes = [_LEGEND]
    rows = [results.columns(run.cell) for run in runs]
    found = itertools.product((paper.ERROR, paper.SECONDS), rows)
    if any(paper.find(metric, row) for metric, row in found):
        epochs = sorted({run.cell.config.num_epochs for run in runs})
        notes.append(
            f"Paper: {paper.SOURCE}, 300 epochs on its authors' GPUs; here "
            f"{', '.join(map(str, epochs))} epochs."
        )
    if study.note:
        notes.append(study.note)
    notes += _places(runs)
    failures = [
        f"- {run.cell.name} {run.state}: {run.reason}" for run in runs if run.reason
    ]
    if failures:
        notes.append("\n".join(failures))
    if any(run.state == NOT_BEGUN for run in runs):
        done = sum(run.state == FINISHED for run in runs)
        notes.append(f"The study is not complete: {done} of {len(runs)} runs are done.")
    return notes


def _places(runs: Sequence[Run]) -> list[str]:
    """On what, and with which versions, the runs were made; a line for each."""
    places = collections.Counter()
    for run in runs:
        if run.summary is not None:
            versions = run.summary["versions"].items()
            names = ", ".join(f"{name} {version}" for name, version in versions)
            kind, host = run.summary["device_kind"], run.summary["host"]
            places[f"on {kind} devices of a machine with {host}; {names}"] += 1
    if not places:
        return []
    return ["\n".join(f"{count} runs {place}." for place, count in places.items())]
