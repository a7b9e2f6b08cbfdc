"""Every notebook runs from top to bottom."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

from fdg_jax.study import __main__ as command_line

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
STUDY = """
from fdg_jax.study import Study
def get_study():
    short = dict(num_epochs=3, learning_rate_milestones=())
    grids = [dict(method="bp", num_stages=1, cuts=""), dict(shrink=[0.5])]
    return Study(name="tiny", base="digits", overrides=short, grids=grids)
"""


@pytest.fixture
def tiny_study(tmp_path):
    """A folder with what a study has written."""
    (tmp_path / "tiny.py").write_text(STUDY)
    flags = [f"--study={tmp_path / 'tiny.py'}", f"--workdir={tmp_path}", "--jobs=2"]
    assert command_line.main(flags) == 0
    return tmp_path


def _run(path, monkeypatch):
    """Executes a notebook; returns the accuracy that its last cell shows."""
    # The package need not be installed where the tests are run from a checkout.
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}{os.pathsep}")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=250,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    shown = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    return float(re.search(r"[\d.]+", shown)[0])


@pytest.mark.slow
def test_the_quick_start_runs(monkeypatch):
    assert _run(FOLDER / "quickstart.ipynb", monkeypatch) > 0.9


def test_the_notebook_of_a_study_runs_on_a_tiny_one(tiny_study, monkeypatch):
    monkeypatch.setenv("FDG_STUDY", str(tiny_study))
    assert _run(FOLDER / "study.ipynb", monkeypatch) > 0.5
