import errno
import json
import os
import pathlib
import subprocess
import sys

import pytest

import study_folders as folders
from fdg_jax import data
from fdg_jax.study import __main__ as command_line

STUDY = """
from fdg_jax.study import Study
def get_study():
    return Study(name="s", base="digits", grids=[{%s}])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a study file in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.py").write_text(STUDY % "")
    return tmp_path


@pytest.mark.parametrize(
    ("grid", "flags", "message"),
    [
        ("", [], "--study"),
        ("", ["--study=t.py"], "there is no 't.py'"),
        ("", ["--study=s.py", "--wrkdir=w"], "--wrkdir=w"),
        ("", ["--study=s.py", "--workdir=s.py"], "a folder that can be written"),
        ("", ["--study=s.py", "--report"], "there is no runs/s"),
        ("", ["--study=gs://bucket/s.py"], "which is an address"),
        ("", ["--study=s.py", "--workdir=gs://bucket"], "which is an address"),
        ("'dataset': 'cifar10'", ["--study=s.py", "--data_dir=s3://b"], "an address"),
        ("'shrik': 1", ["--study=s.py"], "did you mean 'shrink'"),
        ("'shrink': []", ["--study=s.py"], "shrink=[]"),
        ("'shrink': 7.0", ["--study=s.py"], "shrink"),
        ("'shrink': [0.5, 0.5]", ["--study=s.py"], "remove one of them"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_run(
    folder, capsys, grid, flags, message
):
    (folder / "s.py").write_text(STUDY % grid)
    assert command_line.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert err.startswith("study: ") and err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["s.py"]


def test_a_study_may_be_in_a_home(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (folder / "w").mkdir()
    assert command_line.main(["--study=~/s.py", "--workdir=~/w", "--report"]) == 0
    assert (folder / "w" / "table.md").exists()


def test_a_workdir_whose_files_cannot_be_renamed_is_refused(
    folder, capsys, monkeypatch
):
    def rename(path, target):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    assert command_line.main(["--study=s.py"]) == 2
    assert "in runs/s that failed with OSError" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["s.py"]


def test_data_that_is_missing_is_told_once_before_any_run(folder, capsys, monkeypatch):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        raise ValueError("cifar10 is not there")

    monkeypatch.setattr(data, "load", load)
    (folder / "s.py").write_text(
        STUDY % "'dataset': 'cifar10', 'shrink': [1.0, 0.5], 'seed': [0, 1]"
    )
    assert command_line.main(["--study=s.py", "--data_dir=there"]) == 2
    assert asked == [("cifar10", "there")]
    assert capsys.readouterr() == ("", "study: cifar10 is not there\n")
    assert [path.name for path in folder.iterdir()] == ["s.py"]


def _start(folder, module, *flags, platforms="cpu"):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    root = str(pathlib.Path(command_line.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=folder,
        env=environment | {"JAX_PLATFORMS": platforms, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_platforms_that_no_run_could_start_on_are_told_before_any(folder):
    process = _start(folder, "fdg_jax.study", "--study=s.py", platforms="nonsense")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("study: JAX_PLATFORMS must name platforms")
    assert [path.name for path in folder.iterdir()] == ["s.py"]


def test_a_cell_tells_the_platforms_that_it_cannot_start_in_one_line(folder):
    process = _start(folder, "fdg_jax.study.cell", "w", platforms="nonsense")
    config = {"num_stages": 2, "compilation_cache": "off"}
    process.stdin.write(json.dumps(config) + "\n")
    process.stdin.flush()  # left open: at its end the cell would stop
    assert process.wait(timeout=200) == 1
    out, err = process.communicate()
    assert err == "" and out.count("\n") == 1
    assert out.startswith("JAX_PLATFORMS must name platforms")


def test_a_folder_of_the_users_with_the_name_of_ours_is_not_taken_for_it(folder):
    for name in ("configs", "tests", "benchmarks", "train"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('a stranger')")
    (folder / "configs" / "digits.py").write_text("raise RuntimeError('a stranger')")
    (folder / "configs" / "mine.py").write_text("GRID = {'shrink': [1.0, 0.5]}")
    (folder / "s.py").write_text(
        "from configs import default, mine\n"
        + (STUDY % "**mine.GRID, 'seed': default.get_config().seed")
    )
    (folder / "runs" / "s").mkdir(parents=True)
    process = _start(folder, "fdg_jax.study", "--study=s.py", "--report")
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")
    assert "0 of 2 runs are done" in out


def test_a_report_is_made_of_what_is_there(folder, capsys):
    (cell,) = folders.cells({})
    folders.write_run(folder / "runs" / "s", cell, [0.5], finished=False)
    assert command_line.main(["--study=s.py", "--report"]) == 0
    out = capsys.readouterr().out
    assert "1 unfinished" in out
    assert (folder / "runs" / "s" / "table.md").read_text() == out[:-1]
    assert (folder / "runs" / "s" / "results.csv").exists()
