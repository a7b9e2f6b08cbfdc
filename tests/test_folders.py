import os
import pathlib

import pytest

from fdg_jax import folders

ODD_NAMES = ["a[1]", "*", "?", "{a,b}", "\\", "gs:", "a\nb", "%2F", "\udcff"]


@pytest.mark.parametrize(
    "address", ["gs://bucket/a", "s3://b", "file:///tmp/a", "hf://", "gs:/a", "s3:"]
)
@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_an_address_is_no_folder_of_this_machine(address, kind):
    with pytest.raises(ValueError, match="which is an address; mount it"):
        folders.local(kind(address))


@pytest.mark.parametrize("path", ["a/b", "/gs:/a", "a:b", "C:/a", "a/~", "."])
def test_other_paths_stay_as_they_are(path):
    assert folders.local(path) == pathlib.Path(path)


def test_a_home_is_found_or_missed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert folders.local("~/a") == tmp_path / "a"
    with pytest.raises(ValueError, match="got '~nobody-at-all/a', and there is no"):
        folders.local("~nobody-at-all/a")


def test_a_folder_is_there_for_a_while(tmp_path):
    with folders.for_a_while(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with folders.for_a_while(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    with folders.for_a_while(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "mine").exists()


@pytest.mark.parametrize("name", [*ODD_NAMES, "a/../b"])
def test_another_name_leads_to_a_folder(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / "file").touch()
    with folders.plain_name(folder) as plain:
        assert [path.name for path in plain.iterdir()] == ["file"]
        if name in ODD_NAMES:
            assert plain != folder and folders.is_text(plain)
    assert (folder / "file").exists()
    assert os.path.lexists(plain) == (name not in ODD_NAMES)


def test_a_plain_name_is_left_alone(tmp_path):
    folder = tmp_path / "Größe 1.5,k=2"
    folder.mkdir()
    with folders.plain_name(folder) as plain:
        assert plain == folder
    with folders.plain_name(pathlib.Path(f"/{folder}")) as plain:
        assert not str(plain).startswith("//")
