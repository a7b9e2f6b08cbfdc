import dataclasses
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default, digits
from fdg_jax import study
from fdg_jax.study import grid


def _study(*grids, **changes):
    given = {"name": "s", "base": "digits", "grids": grids}
    return study.Study(**given | changes)


def _names(*grids, **changes):
    return [cell.name for cell in grid.expand(_study(*grids, **changes))]


AXES = {
    "method": st.sampled_from(["fdg", "adl"]),  # which leave beta open
    "network": st.sampled_from(["resnet8", "resnet20"]),
    "num_stages": st.integers(2, 4),
    "shrink": st.floats(0.001, 1.0),
    "schedule": st.sampled_from(["bp", "minimal", "paper", "5,3,1"]),
    "learning_rate": st.floats(1e-30, 1e30),
    "num_train": st.integers(1, 1437),
    "seed": st.integers(0, 2**32 - 1),
}
grids = st.dictionaries(st.sampled_from(sorted(AXES)), st.none(), min_size=1).flatmap(
    lambda keys: st.fixed_dictionaries(
        {
            key: st.one_of(
                st.lists(AXES[key], min_size=1, max_size=3, unique=True), AXES[key]
            )
            for key in keys
        }
    )
)


@settings(max_examples=15)
@given(grids)
def test_a_grid_gives_the_product_of_its_axes(drawn):
    cells = grid.expand(_study(drawn))
    axes = [v if isinstance(v, list) else [v] for v in drawn.values()]
    wanted = [dict(zip(drawn, v, strict=True)) for v in itertools.product(*axes)]
    base = digits.get_config().to_dict()
    got = []
    for cell in cells:
        config = cell.config.to_dict()
        got.append({k: cell.method if k == "method" else config[k] for k in drawn})
        assert {k for k in base if config[k] != base[k]} <= drawn.keys()
        assert sorted(config) == sorted(default.get_config())
    assert sorted(map(str, got)) == sorted(map(str, wanted))


@settings(max_examples=15)
@given(grids)
def test_names_are_unique_folders_and_do_not_depend_on_the_other_cells(drawn):
    names = _names(drawn)
    assert len({name.lower() for name in names}) == len(names)
    assert all(re.fullmatch(r"[\w.+-]{1,200}", name) for name in names)
    # With fewer values on each axis, those that are left keep their names.
    fewer = {k: v[:1] if isinstance(v, list) else v for k, v in drawn.items()}
    assert set(_names(fewer)) <= set(names)


def test_names_read_well():
    assert _names(
        {"method": "bp", "num_stages": 1, "cuts": ""},
        {"num_stages": [2, 3], "shrink": [1.0, 0.2]},
        {"method": "ddg", "schedule": ["minimal"], "backward": "stored"},
    ) == [
        "digits-resnet8-bp-k1-seed0",
        "digits-resnet8-fdg-k2-beta1-seed0",
        "digits-resnet8-fdg-k2-beta0.2-seed0",
        "digits-resnet8-fdg-k3-beta1-seed0",
        "digits-resnet8-fdg-k3-beta0.2-seed0",
        "digits-resnet8-ddg-k2-schedule_minimal-seed0",
    ]


def test_the_seeds_of_a_setting_come_one_after_the_other():
    names = _names(
        {"method": ["ddg", "fr"]}, {"seed": [7], "method": "bp"}, seeds=(5, 3)
    )
    ends = [re.search(r"-(\w+)-k2-seed(\d)", name).groups() for name in names]
    wanted = [("ddg", "5"), ("ddg", "3"), ("fr", "5"), ("fr", "3"), ("bp", "7")]
    assert ends == wanted


def test_beta_stands_in_the_name_where_it_is_open():
    assert [n.split("-")[2:5] for n in _names({"method": ["fdg", "adl", "fr"]})] == [
        ["fdg", "k2", "beta1"],
        ["adl", "k2", "beta1"],
        ["fr", "k2", "seed0"],
    ]


def test_overrides_and_the_place_of_the_data_reach_every_cell():
    cells = grid.expand(
        _study({}, {"shrink": 0.5}, overrides={"num_epochs": 3}), data_dir="/data"
    )
    assert {(c.config.num_epochs, c.config.data_dir) for c in cells} == {(3, "/data")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": []}, "at least one grid"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": 0}, "at least one seed; 's' has 0; give a list or a tuple"),
        ({"seeds": None}, "at least one seed; 's' has None"),
        ({"seeds": (seed for seed in (0, 1))}, "at least one seed; 's' has <gen"),
        ({"grids": 3}, "at least one grid; 's' has 3"),
        ({"overrides": None}, "the overrides .* must map config keys .* got None"),
        ({"grids": [{"method": "fgd"}]}, "did you mean 'fdg'"),
        ({"grids": {"shrink": [1.0]}}, "sequence of at least one grid"),
        ({"grids": [["shrink"]]}, "must map config keys to values"),
        ({"grids": [{"shrink": []}]}, r"shrink=\[\]; remove it"),
        ({"grids": [{"shrik": [1.0]}]}, "'shrik'; did you mean 'shrink'"),
        ({"overrides": {"shrik": 1.0}}, "'shrik'; did you mean 'shrink'"),
        ({"grids": [{"shrink": ["x"]}]}, "grid 0 of study 's' has the wrong type"),
        ({"grids": [{"seed": ["x"]}]}, "wrong type"),
        ({"grids": [{"restart": True}]}, "cannot set restart"),
        ({"base": "digit"}, "did you mean 'digits'"),
        ({"name": "a/b"}, "'a/b'"),
        ({"grids": [{}, {}]}, "two are 'digits-.*'; remove one of them"),
        ({"grids": [{"seed": [1, 1]}]}, "remove one of them"),
        ({"grids": [{"num_stages": 1, "shrink": [1.0, 0.5]}]}, "differ in shrink"),
        (
            {"grids": [{}, {"schedule": "bp"}]},
            "differ in schedule; give one of these keys as a list",
        ),
        ({"grids": [{"data_dir": ["x" * 300]}]}, "at most 200 bytes"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_a_line(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        grid.expand(dataclasses.replace(_study({}), **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"network": "resnet9"}, "resnet9"),
        ({"schedule": ["reference", "minimall"]}, "did you mean 'minimal'"),
        ({"shrink": 2.0}, "shrink"),
        ({"num_stages": 3}, "K stages need K - 1 cuts"),
        ({"num_train": 1438}, r"\[0, 1437\]"),
        ({"batch_size": 2000}, "2000"),
        ({"optimizer": "sgdd"}, "sgdd"),
        ({"backward": "store"}, "store"),
        ({"seed": -1}, "seed"),
    ],
)
def test_values_that_a_run_would_refuse_are_refused_before(wrong, message):
    cells = grid.expand(_study({"method": "bp", "num_stages": 1, "cuts": ""}, wrong))
    with pytest.raises(ValueError, match=f"^digits-.*: .*{message}"):
        grid.check_settings(cells)
