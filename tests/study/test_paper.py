import csv
import importlib.resources

import study_folders as folders
from fdg_jax.study import paper

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
            }
        )
        found = paper.find(row["metric"], cell)
        assert (found.table, found.value) == (int(row["table"]), float(row["value"]))


def test_nothing_is_found_for_what_the_paper_has_not():
    known = {"method": "fdg", "shrink": 0.5, "num_stages": 2}

    def find(**changes):
        (cell,) = folders.cells(known | changes, base="cifar10_resnet56")
        return paper.find(paper.ERROR, cell)

    assert find().value == 5.90
    assert find(num_train=50_000).value == 5.90
    others = [{"method": "adl"}, {"shrink": 0.51}, {"num_stages": 5}]
    others += [{"network": "resnet8"}, {"dataset": "digits"}, {"num_train": 5000}]
    assert [find(**other) for other in others] == [None] * len(others)
