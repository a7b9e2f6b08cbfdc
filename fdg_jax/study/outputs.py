"""The files that a study gives: each of them whole at any time, or not there."""

import pathlib
import secrets
from collections.abc import Callable, Sequence

from fdg_jax.study import plots, results, table
from fdg_jax.study.definition import Study
from fdg_jax.study.grid import Cell

CSV_FILE = "results.csv"
TABLE_FILE = "table.md"
CURVES_FILE = "curves.png"
SHRINK_FILE = "shrink.png"


def write(study: Study, cells: Sequence[Cell], workdir: pathlib.Path) -> list[str]:
    """Writes what the runs have come to so far.

    Args:
        study: the study.
        cells: all its cells.
        workdir: where their folders are; the files go there.

    Returns:
        What the user should know, a line each.
    """
    runs = results.read_all(cells, workdir)
    _write(workdir / CSV_FILE, results.write_csv(study.name, runs))
    _write(workdir / TABLE_FILE, table.markdown(study, runs))
    try:
        figures = {CURVES_FILE: plots.curves(runs), SHRINK_FILE: plots.shrink(runs)}
    except ImportError as error:
        return [f"there are no plots: {error}; pip install matplotlib"]
    for name, figure in figures.items():
        if figure is not None:
            _replace(
                workdir / name,
                lambda path, figure=figure: figure.savefig(path, dpi=110, format="png"),
            )
    return []


def _write(path: pathlib.Path, text: str) -> None:
    _replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    # A name of its own, for a report may be written beside a study that is running.
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
