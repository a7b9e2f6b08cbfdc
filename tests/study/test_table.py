import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import study_folders as folders
from fdg_jax import study
from fdg_jax.study import results, table


def _table(cells, workdir, **changes):
    """The table's rows as dicts, and the whole text."""
    defined = study.Study(**{"name": "s", "grids": [{}]} | changes)
    text = table.markdown(defined, results.read_all(cells, workdir))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(header, row, strict=True)) for row in rows], text


@given(st.lists(st.floats(0.0, 100.0), min_size=2, max_size=9))
def test_mean_and_sample_deviation_are_numpys(values):
    mean, deviation = map(float, table.mean_and_deviation(values).split(" ± "))
    assert mean == pytest.approx(np.mean(values), abs=0.0051)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=0.0051)


def test_one_value_has_no_deviation():
    assert table.mean_and_deviation([7.231]) == "7.23"
    assert table.mean_and_deviation([7.231, None]) == "7.23"
    assert table.mean_and_deviation([]) == ""


def test_a_row_per_setting_over_its_seeds(tmp_path):
    cells = folders.cells(
        {"method": "bp", "num_stages": 1, "cuts": ""},
        {"shrink": [1.0, 0.5], "schedule": ["paper"]},
        seeds=(0, 1, 2),
    )
    accuracies = np.random.default_rng(0).uniform(size=(len(cells), 4))
    for cell, drawn in zip(cells, accuracies.tolist(), strict=True):
        folders.write_run(tmp_path, cell, drawn)
    rows, text = _table(cells, tmp_path, note="A note.")
    settings = [(r["K"], r["method"], r["beta"], r["schedule"], r["n"]) for r in rows]
    assert settings == [
        ("1", "bp", "", "", "3"),
        ("2", "fdg", "1", "paper", "3"),
        ("2", "fdg", "0.5", "paper", "3"),
    ]
    for i, row in enumerate(rows):
        errors = 100 * (1 - accuracies[3 * i : 3 * i + 3])
        for column, values in (
            ("final error", errors[:, -1]),
            ("best error", errors.min(1)),
        ):
            expected = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
            assert row[column] == expected
    assert "remarks" not in rows[0] and "paper" not in rows[0]
    assert "A note." in text
    assert (
        "9 runs on cpu devices of a machine with some CPU, 2 cores; jax 0.10." in text
    )


def test_engines_are_told_where_they_differ(tmp_path):
    cells = folders.cells({"engine": "fused"}, {"method": "gpipe", "engine": "serial"})
    rows, _ = _table(cells, tmp_path)
    assert [row["engine"] for row in rows] == ["fused", "serial"]
    rows, _ = _table(cells[:1], tmp_path)
    assert "engine" not in rows[0]


def test_only_finished_runs_count_and_the_others_are_told(tmp_path):
    cells = folders.cells({}, seeds=range(5))
    folders.write_run(tmp_path, cells[0], [0.9])
    folders.write_run(tmp_path, cells[1], [0.1], finished=False)
    for cell, state in zip(cells[2:4], ("diverged", "failed"), strict=True):
        folders.write_failure(tmp_path, cell, state, "because")
    (row,), text = _table(cells, tmp_path)
    assert (row["n"], row["final error"]) == ("1", "10.00")
    wanted = "1 unfinished, 1 diverged, 1 failed, 1 not begun"
    assert row["remarks"] == wanted
    assert f"- {cells[2].name} diverged: because" in text
    assert "not complete: 1 of 5 runs" in text


def test_a_study_that_has_not_begun_has_a_table(tmp_path):
    (row,), _ = _table(folders.cells({}), tmp_path)
    assert row["n"] == "0"


def test_the_papers_numbers_stand_beside(tmp_path):
    cells = folders.cells(
        {"method": "bp", "num_stages": 1, "shrink": 1.0},
        {"shrink": [1.0, 0.5, 0.3], "schedule": ["reference", "paper"]},
        {"method": "ddg", "num_stages": [2, 4], "shrink": 1.0},
        base="cifar10_resnet56",
    )
    rows, text = _table(cells, tmp_path)
    assert [(r["paper"], r["paper s/epoch"]) for r in rows] == [
        ("6.19 (table 1)", "30.2 (table 6)"),
        *[("6.2 (table 1)", "29.6 (table 6)")] * 2,
        *[("5.9 (table 1)", "29.6 (table 6)")] * 2,
        *[("", "29.6 (table 6)")] * 2,
        ("6.63 (table 1)", "30 (table 6)"),
        ("6.61 (table 3)", ""),
    ]
    assert re.search("Paper: arXiv 1906.09108, 300 epochs .* here 300 epochs", text)
