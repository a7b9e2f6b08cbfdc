"""The project's configs, whatever else is called so."""

import sys

import pytest

import train
from fdg_jax import config_files, study


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A package `configs` of the user's, in the current folder, already imported."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "default.py").write_text("raise RuntimeError('a stranger')")
    (folder / "mine.py").write_text("SHRINK = 0.5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in list(sys.modules):
        if name.split(".")[0] == "configs":
            monkeypatch.delitem(sys.modules, name)
    import configs

    assert configs.__path__ == [str(folder)]
    return configs


CONFIG = """
from configs import default, mine
def get_config():
    from configs import digits
    config = digits.get_config()
    config.shrink = mine.SHRINK
    return config
"""


def test_a_config_file_gets_the_projects_configs_and_then_the_users(stranger, tmp_path):
    path = tmp_path / "a.py"
    path.write_text(CONFIG)
    config, _ = train.parse(["train.py", f"--config={path}"])
    assert (config.dataset, config.shrink) == ("digits", 0.5)
    assert sys.modules["configs"] is stranger  # afterwards it is what it was
    assert {m for m in sys.modules if m.startswith("configs.")} == set()


def test_the_base_of_a_study_is_one_of_the_projects(stranger):
    for base, dataset in {"digits": "digits", "cifar10_resnet20": "cifar10"}.items():
        (cell,) = study.grid.expand(study.Study(name="s", base=base, grids=[{}]))
        assert cell.config.dataset == dataset
    with pytest.raises(ValueError, match="one of configs/: .*; got 'mine'"):
        study.grid.expand(study.Study(name="s", base="mine", grids=[{}]))


def test_what_fails_within_leaves_the_imports_as_they_were(stranger, tmp_path):
    path = tmp_path / "a.py"
    path.write_text("import configs.default\nimport configs.no_such_thing")
    with pytest.raises(ValueError, match="No module named 'configs.no_such_thing'"):
        train.parse(["train.py", f"--config={path}"])
    assert sys.modules["configs"] is stranger


def test_a_package_without_configs_says_so(tmp_path, monkeypatch, capsys):
    """As where a wheel is installed; what is called so there is somebody else's."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.py").write_text("")
    monkeypatch.setattr(config_files, "FOLDER", tmp_path / "configs")
    told = f"there is no {tmp_path / 'configs'}; run from a clone"
    with pytest.raises(ValueError, match=told):
        study.grid.expand(study.Study(name="s", grids=[{}]))
    assert train.main(["train.py"]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
