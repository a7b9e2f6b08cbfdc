"""The table of the README is what the study's CSV holds."""

import collections
import csv
import pathlib
import re
import statistics

ROOT = pathlib.Path(__file__).parents[2]
PANELS = [("digits", 2), ("digits", 3), ("cifar10", 2), ("cifar10", 3)]
"""Of the table's columns; what has one stage stands in the column of two."""


def _errors():
    """By data set, K, method and beta, the last epoch's error of every seed."""
    with open(ROOT / "docs/studies/small/results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row["cell"]: row for row in rows}  # rows are in the order of epochs
    errors = collections.defaultdict(list)
    for row in last.values():
        place = (row["dataset"], int(row["num_stages"]))
        key = (*place, row["method"], float(row["shrink"]))
        errors[key].append(float(row["test_error_percent"]))
    return errors


def _table():
    """By method and beta, the numbers of a row of the README's table."""
    table = {}
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        label, *numbers = [part.strip() for part in line.split("|")[1:-1]] or [""]
        if not any("±" in number for number in numbers):
            continue
        beta = re.search(r"beta ([\d.]+)", label)
        for method in re.findall(r"`(\w+)`", label):
            table[method, float(beta[1]) if beta else 1.0] = numbers
    return table


def test_the_table_of_the_small_study_is_that_of_its_csv():
    table, errors = _table(), _errors()
    assert table.keys() == {key[2:] for key in errors}
    for (dataset, num_stages, *row), found in errors.items():
        assert len(found) == 3
        written = table[tuple(row)][PANELS.index((dataset, max(2, num_stages)))]
        mean, deviation = statistics.fmean(found), statistics.stdev(found)
        assert written == f"{mean:.2f} ± {deviation:.2f}", (
            dataset,
            num_stages,
            row,
        )
