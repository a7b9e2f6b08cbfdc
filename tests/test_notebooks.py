"""Every notebook runs from top to bottom."""

import csv
import os
import pathlib
import re
import signal
import textwrap
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import study_folders as folders
from fdg_jax.study import __main__ as command_line
from fdg_jax.study import results

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


def _run(path, monkeypatch, shown="None"):
    """Executes a notebook and, after it, an expression.

    Returns:
        The accuracy that its last cell shows, and the expression's text.
    """
    # The package need not be installed where the tests are run from a checkout.
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}{os.pathsep}")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"print({shown})"))
    client = NotebookClient(
        notebook,
        timeout=250,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute()  # raises CellExecutionError with the cell and its traceback
    *_, last, added = notebook.cells
    accuracy = last.outputs[-1]["data"]["text/plain"]
    return float(re.search(r"[\d.]+", accuracy)[0]), added.outputs[0]["text"]


@pytest.mark.slow
def test_the_quick_start_runs(monkeypatch):
    assert _run(FOLDER / "quickstart.ipynb", monkeypatch)[0] > 0.9


def test_the_notebook_of_a_study_runs_on_a_tiny_one(tiny_study, monkeypatch):
    monkeypatch.setenv("FDG_STUDY", str(tiny_study))
    assert _run(FOLDER / "study.ipynb", monkeypatch)[0] > 0.5


def test_the_notebook_of_a_study_runs_on_the_one_that_comes_with_it(monkeypatch):
    monkeypatch.delenv("FDG_STUDY", raising=False)
    accuracy, settings = _run(FOLDER / "study.ipynb", monkeypatch, "len(runs)")
    with open(FOLDER.parent / "docs/studies/small/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(settings) == len({row["setting"] for row in rows}) > 30
    assert accuracy > 0.98


def test_a_notebook_tells_settings_apart_by_all_that_differs(tmp_path, monkeypatch):
    cells = folders.cells(
        {"shrink": [1.0, 0.5], "remedy": ["none", "dc_asgd"]},
        {"shrink": [1.0, 0.5], "schedule": ["minimal"], "backward": ["replay"]},
        {"method": "bp", "num_stages": 1, "cuts": "", "shrink": 1.0},
        base="cifar10_resnet56",
        seeds=(0, 1),
    )
    for cell in cells:
        folders.write_run(tmp_path, cell, [0.9, 0.95])
    runs = results.read_all(cells, tmp_path)
    (tmp_path / "results.csv").write_text(results.write_csv("s", runs))
    monkeypatch.setenv("FDG_STUDY", str(tmp_path))
    shown = "len(runs), {len(seeds) for seeds in runs.values()}, sorted(sweeps), sum("
    shown += "paper.find(paper.ERROR, row) is not None for row in of_setting.values())"
    _, text = _run(FOLDER / "study.ipynb", monkeypatch, shown)
    prefix = "cifar10-resnet56-fdg-k2"
    lines = [f"{prefix}-backward_replay-schedule_minimal", f"{prefix}-remedy_dc_asgd"]
    lines.append(f"{prefix}-remedy_none")
    # The paper has bp, and fdg with these betas, but with nothing else done.
    assert text == f"7 {{2}} {lines} 3\n"


INTERRUPTED = {
    "set up": """
        import itertools, jax
        jax.config.update("jax_num_cpu_devices", 2)
        import optax
        import fdg_jax as fdg
        from fdg_jax import checkpoint
        digits = fdg.data.load("digits")

        def make_pipeline():
            network = fdg.models.create("resnet8", num_classes=10, in_channels=1)
            return fdg.Pipeline(
                network, loss_fn=fdg.softmax_cross_entropy, optimizer=optax.adam(1e-3),
                num_stages=2, cuts=(2,), engine={engine!r})

        def batches(first):
            shuffled = fdg.data.TrainBatches(digits, 64, seed=0)
            return itertools.islice(shuffled, first, 30)

        pipeline, losses = make_pipeline(), {{}}
    """,
    "interrupted": """
        with {block}:
            for metrics in pipeline.train(batches(0)):
                losses[metrics["batch"]] = metrics["loss"]
                if metrics["batch"] == 5:
                    open("reached", "w").close()
                if metrics["batch"] == 15:
                    import time; time.sleep(60)  # until the interrupt comes
    """,
    "look": """
        count = pipeline.num_batches
        assert 6 <= count < 30, count
        metrics = pipeline.evaluate_metrics(fdg.data.test_batches(digits, 360))
        assert metrics["batch"] == count and metrics["accuracy"] > 0
        checkpoint.save_network(pipeline.network, "saved", count)
        print(count, pipeline.batches_applied)
    """,
    "go on": """
        for metrics in pipeline.train(batches(pipeline.num_batches)):
            losses[metrics["batch"]] = metrics["loss"]
        pipeline.close()
    """,
    "compare": """
        other = make_pipeline()
        expected = [m["loss"] for m in other.train(batches(0))]
        print([losses.get(n, loss) for n, loss in enumerate(expected)] == expected)
    """,
}


@pytest.mark.parametrize(
    ("block", "engine"),
    [
        ("pipeline", "threads"),
        pytest.param("contextlib.nullcontext()", "threads", marks=pytest.mark.slow),
        pytest.param("contextlib.nullcontext()", "fused", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_cell_loses_nothing(tmp_path, monkeypatch, block, engine):
    """The kernel is interrupted in a training loop; the next cells look and go on."""
    monkeypatch.setenv("PYTHONPATH", f"{FOLDER.parent}{os.pathsep}")
    sources = {
        name: "import contextlib\n" + textwrap.dedent(text)
        for name, text in INTERRUPTED.items()
    }
    sources = {
        n: text.format(block=block, engine=engine) for n, text in sources.items()
    }
    cells = {n: nbformat.v4.new_code_cell(text) for n, text in sources.items()}
    notebook = nbformat.v4.new_notebook(cells=list(cells.values()))
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources=resources
    )

    def interrupt(process, ended):
        while not (tmp_path / "reached").exists() and not ended.is_set():
            time.sleep(0.02)
        os.kill(process, signal.SIGINT)

    with client.setup_kernel():
        ended = threading.Event()
        for index, (name, cell) in enumerate(cells.items()):
            if name != "interrupted":
                client.execute_cell(cell, index)  # raises what the cell raises
                continue
            process = client.km.provisioner.process.pid
            thread = threading.Thread(target=interrupt, args=(process, ended))
            thread.start()
            try:
                with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
                    client.execute_cell(cell, index)
            finally:
                ended.set()
                thread.join()
    count, applied = cells["look"].outputs[-1]["text"].split(maxsplit=1)
    assert (tmp_path / "saved" / count).is_dir()
    if block == "pipeline":  # drained as it was left, so it goes on like a new filling
        assert applied == f"[{count}, {count}]\n"
    else:
        assert applied == f"[{int(count) - 1}, {count}]\n"
        assert cells["compare"].outputs[-1]["text"] == "True\n"
