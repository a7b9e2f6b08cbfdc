import csv
import io
import json

import numpy as np
import pytest

import study_folders as folders
from fdg_jax.study import results


def _rows(runs):
    return list(csv.DictReader(io.StringIO(results.write_csv("s", runs))))


def test_a_row_per_run_and_epoch_with_what_was_measured(tmp_path):
    cells = folders.cells({"learning_rate": [0.5], "schedule": ["3,0"]}, seeds=(0, 1))
    for cell in cells:
        folders.write_run(tmp_path, cell, [0.5, 0.75], rate=2000.0)
    rows = _rows(results.read_all(cells, tmp_path))
    assert [(r["seed"], r["epoch"], r["step"]) for r in rows] == [
        *(("0", "1.0", "22"), ("0", "2.0", "44")),
        *(("1", "1.0", "22"), ("1", "2.0", "44")),
    ]
    row = rows[1]
    text = {"study": "s", "cell": cells[0].name, "setting": cells[0].setting}
    text |= {"state": "finished", "method": "fdg", "network": "resnet8"}
    text |= {"dataset": "digits", "schedule": "3,0", "backward": "stored"}
    text |= {"staleness": "3,0", "remedy": "none", "engine": "threads"}
    assert {key: row[key] for key in text} == text
    numbers = {"num_train": 1437, "num_stages": 2, "shrink": 1.0, "train_loss": 0.5}
    numbers |= {"test_loss": 1.0, "test_accuracy": 0.75, "test_error_percent": 25.0}
    numbers |= {"images_per_second": 2000.0, "seconds": 22 * 64 / 2000.0}
    numbers |= {"learning_rate": 0.5}
    assert {key: float(row[key]) for key in numbers} == pytest.approx(numbers)


def test_the_train_loss_of_an_epoch_is_the_mean_over_its_steps(tmp_path):
    (cell,) = folders.cells({})
    folders.write_run(tmp_path, cell, [0.5], finished=False)
    rng = np.random.default_rng(0)
    losses = rng.uniform(size=30)  # of each step, logged every 7 steps and at the end
    ends = [7, 14, 21, 28, 30]
    lines = [
        {"step": end, "epoch": end / 30, "train_loss": losses[begin:end].mean()}
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
    lines.append({"step": 30, "epoch": 1.0, "test_loss": 1.0, "test_accuracy": 0.5})
    path = tmp_path / cell.name / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = results.read(cell, tmp_path).epochs
    assert row["train_loss"] == pytest.approx(losses.mean())
    assert row["images_per_second"] is None and row["seconds"] is None


def test_a_line_that_a_kill_has_cut_is_not_there(tmp_path):
    (cell,) = folders.cells({})
    folders.write_run(tmp_path, cell, [0.5, 0.6], finished=False)
    path = tmp_path / cell.name / "metrics.jsonl"
    path.write_text(path.read_text()[:-5])
    assert len(results.read(cell, tmp_path).epochs) == 1


def test_what_a_folder_says_of_its_run(tmp_path):
    cells = folders.cells({"network": ["a", "b", "c", "d", "e"]})
    folders.write_run(tmp_path, cells[0], [0.5])
    folders.write_run(tmp_path, cells[1], [0.5], finished=False)
    folders.write_run(tmp_path, cells[2], [0.5], finished=False)
    folders.write_failure(tmp_path, cells[2], results.DIVERGED, "it is nan")
    folders.write_failure(tmp_path, cells[3], results.FAILED, "no data")
    runs = results.read_all(cells, tmp_path)
    assert [(run.state, run.reason) for run in runs] == [
        ("finished", ""),
        ("unfinished", ""),
        ("diverged", "it is nan"),
        ("failed", "no data"),
        ("not begun", ""),
    ]
    assert [len(run.epochs) for run in runs] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("content", ["{}", "", '{"final_test_acc', "[1]", "\xff"])
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "failure.json"])
def test_a_damaged_file_is_told_with_its_path(tmp_path, name, content):
    (cell,) = folders.cells({})
    folders.write_run(tmp_path, cell, [0.5], finished=False)
    path = tmp_path / cell.name / name
    path.write_bytes(content.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match="remove the folder .* run again") as raised:
        results.read(cell, tmp_path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
