"""The studies that come with the project."""

import pathlib

import pytest

import configs
from fdg_jax import methods, study
from fdg_jax.study import grid, paper

FOLDER = pathlib.Path(configs.__file__).parent / "studies"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
COVERED = ("bp", "dp", "ddg", "dgl", "fr", "fdg")


def _cells(name):
    return grid.expand(study.load(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_study_could_run_as_it_is(name):
    cells = _cells(name)
    # Networks that are slow to make are for the command line to check.
    quick = [c for c in cells if c.config.network in ("resnet8", "resnet20")]
    grid.check_settings(quick)
    by_setting = {}
    for cell in cells:
        by_setting.setdefault(cell.setting, []).append(cell.config.seed)
        milestones = cell.config.learning_rate_milestones
        assert all(epoch < cell.config.num_epochs for epoch in milestones)
    assert {len(set(seeds)) for seeds in by_setting.values()} == {3}


@pytest.mark.parametrize("name", NAMES)
def test_a_study_tells_its_command_and_has_its_files_name(name):
    defined = study.load(FOLDER / f"{name}.py")
    assert defined.name == name
    source = (FOLDER / f"{name}.py").read_text()
    assert f"python -m fdg_jax.study --study=configs/studies/{name}.py" in source


@pytest.mark.parametrize(
    ("number", "metric"),
    [(1, paper.ERROR), (2, paper.ERROR)] + [(3, paper.ERROR), (6, paper.SECONDS)],
)
def test_a_table_has_a_setting_for_each_number_of_the_paper(number, metric):
    found = {paper.find(metric, cell) for cell in _cells(f"table{number}")}
    wanted = {
        published
        for key, published in paper.results().items()
        if published.table == number and key[4] in COVERED
    }
    assert len(wanted) > 5
    assert wanted <= found


def test_small_is_small():
    cells = _cells("small")
    assert {(c.config.dataset, c.config.num_train) for c in cells} == {
        ("digits", 0),
        ("cifar10", 5000),
    }
    assert {c.config.num_stages for c in cells} == {1, 2, 3}
    assert {c.method for c in cells} == set(methods.METHODS)
