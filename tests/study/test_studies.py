"""The studies that come with the project."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import configs
from fdg_jax import StageInfo, methods, remedies, study
from fdg_jax.study import grid, paper, results

FOLDER = pathlib.Path(configs.__file__).parent / "studies"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
COVERED = ("bp", "dp", "ddg", "dgl", "fr", "fdg")


def _cells(name):
    return grid.expand(study.load(FOLDER / f"{name}.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_study_could_run_as_it_is(name):
    cells = _cells(name)
    # Networks that are slow to make have a test of their own.
    quick = [c for c in cells if c.config.network in ("resnet8", "resnet20")]
    grid.check_settings(quick)
    by_setting = {}
    for cell in cells:
        by_setting.setdefault(cell.setting, []).append(cell.config.seed)
        milestones = cell.config.learning_rate_milestones
        assert all(epoch < cell.config.num_epochs for epoch in milestones)
    assert {len(set(seeds)) for seeds in by_setting.values()} == {3}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_a_study_could_run_on_all_its_networks(name):
    grid.check_settings(_cells(name))


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
    cells = _cells(f"table{number}")
    found = {paper.find(metric, results.columns(cell)) for cell in cells}
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


def test_remedies_compare_at_the_same_step():
    """What a gradient moves the weights by in the end, times lr, is lr / (1 - m)."""
    for cell in _cells("remedies"):
        config = cell.config
        damped = config.remedy == "nesterov_lookahead"
        assert config.momentum == (0.99 if damped else 0.9)
        transform = remedies.create(
            config.remedy,
            config.optimizer,
            config.learning_rate,
            momentum=config.momentum,
            num_updates=1,
        )(StageInfo(0, 2, staleness=0))

        def step(carry, gradient, transform=transform):
            state, moved = carry
            update, state = transform.update(gradient, state, jnp.zeros(()))
            return (state, moved - update), None

        start = transform.init(jnp.zeros(())), jnp.zeros(())
        (_, moved), _ = jax.lax.scan(step, start, jnp.zeros(4001).at[0].set(1.0))
        assert moved == pytest.approx(1.0), cell.name
