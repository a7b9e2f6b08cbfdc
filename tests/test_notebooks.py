"""Every notebook runs from top to bottom."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
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
    assert float(re.search(r"[\d.]+", shown)[0]) > 0.9  # the last cell's accuracy
