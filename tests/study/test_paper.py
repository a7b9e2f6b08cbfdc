import csv
import importlib.resources

import pytest

import study_folders as folders
from fdg_jax.study import paper, results

FILE = importlib.resources.files("fdg_jax.study") / "paper_results.csv"


def test_every_number_of_the_paper_is_found_by_a_cell_like_its_own():
    rows = list(csv.DictReader(FILE.read_text("utf-8").splitlines()))
    assert len(rows) == len(paper.results()) == 82
    for row in rows:
        (cell,) = folders.cells(
            {
                "dataset": row["dataset"],
                "network": row["network"],
                "method": row["method"].lower(),
                "num_stages": int(row["num_stages"]),
                "shrink": float(row["shrink"] or 1.0),
                "batch_size": 120,  # for "dp" to share out
            }
        )
        found = paper.find(row["metric"], results.columns(cell))
        assert (found.table, found.value) == (int(row["table"]), float(row["value"]))


def _find(**changes):
    known = {"method": "fdg", "shrink": 0.5, "num_stages": 3}
    (cell,) = folders.cells(known | changes, base="cifar10_resnet56")
    row = results.columns(cell)
    found = paper.find(paper.ERROR, row)
    # The row of a CSV is text.
    assert found == paper.find(paper.ERROR, {key: str(row[key]) for key in row})
    return found


@pytest.mark.parametrize(
    "same",
    [
        {},
        {"num_train": 50_000},
        {"schedule": "paper"},
        {"schedule": "3,1,0"},
        {"backward": "recompute"},
        {"accumulation": 1},
    ],
)
def test_a_number_is_found_for_what_trains_as_the_paper(same):
    assert (
        _find(**same)
        == paper.results()[paper.ERROR, "cifar10", "resnet56", 3, "fdg", 0.5]
    )


@pytest.mark.parametrize(
    "other",
    [
        {"method": "adl"},
        {"shrink": 0.51},
        {"num_stages": 5},
        {"network": "resnet8"},
        {"dataset": "digits"},
        {"num_train": 5000},
        {"remedy": "dc_asgd"},
        {"accumulation": 4},
        {"schedule": "minimal"},
        {"schedule": "bp"},
        {"schedule": "5,1,0"},
        {"backward": "replay"},
    ],
)
def test_nothing_is_found_for_what_the_paper_has_not(other):
    assert _find(**other) is None


def test_back_propagation_of_accumulated_batches_is_not_the_papers():
    bp = {"method": "bp", "num_stages": 1, "shrink": 1.0}
    assert _find(**bp).value == 6.19
    assert _find(**bp, accumulation=4) is None
