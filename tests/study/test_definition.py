import pytest

from fdg_jax import study


def test_a_study_file_is_executed(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from fdg_jax.study import Study\n"
        "def get_study():\n"
        "    return Study(name='mine', grids=[{'shrink': [1.0]}], seeds=range(3))\n"
    )
    loaded = study.load(path)
    assert (loaded.name, loaded.base, list(loaded.seeds)) == (
        "mine",
        "default",
        [0, 1, 2],
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_study(): return 3", "returned 3"),
        (
            "\ndef get_study():\n    return 1 / 0",
            "line 3 failed with ZeroDivisionError",
        ),
        ("x = 1", "failed with KeyError: 'get_study'"),
        ("import nothing_there", "ModuleNotFoundError"),
        ("def get_study(:", "SyntaxError"),
    ],
)
def test_a_file_that_gives_no_study_is_refused(tmp_path, source, message):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(ValueError, match=message):
        study.load(path)


def test_a_near_miss_of_a_file_name_is_told(tmp_path):
    (tmp_path / "small.py").touch()
    with pytest.raises(ValueError, match="did you mean 'small'.* has small"):
        study.load(tmp_path / "smal.py")
