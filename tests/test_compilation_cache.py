import os
import pathlib
import sys

import jax
import pytest

from fdg_jax import compilation_cache

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def fresh_jax(monkeypatch, tmp_path):
    """JAX as it starts, a user's cache folder of its own, and no say of the user's."""
    before = _settings()
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    for name, value in zip(SETTINGS, (True, None, 1.0, 0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def _settings():
    return {name: getattr(jax.config, name) for name in SETTINGS}


def test_auto_is_a_folder_of_the_user_and_keeps_every_program(tmp_path):
    folder = compilation_cache.enable("auto")
    assert folder == tmp_path / "caches" / "fdg_jax"
    assert list(_settings().values()) == [True, str(folder), 0, -1]


def test_a_folder_may_be_named(tmp_path, monkeypatch):
    assert compilation_cache.enable(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    assert compilation_cache.enable("a/b") == tmp_path / "a" / "b"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert compilation_cache.enable("~/c") == tmp_path / "c"
    assert list(tmp_path.iterdir()) == []  # JAX makes it when it has something to keep


def test_off_is_off_even_where_the_user_has_a_cache(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compilation_cache.enable("off") is None
    assert not jax.config.jax_enable_compilation_cache


def test_a_cache_of_the_users_own_is_left_as_it_is(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    before = _settings()
    assert compilation_cache.enable("auto") == tmp_path / "own"
    assert _settings() == before


def test_limits_that_the_user_has_set_stay(monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "5")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compilation_cache.enable("auto")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 5.0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1


@pytest.fixture
def file(tmp_path):
    """A file where a folder would have to be; nobody can write below it, not root."""
    path = tmp_path / "file"
    path.touch()
    return path


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_named_folder_that_cannot_be_written_is_refused(file, below):
    with pytest.raises(ValueError, match="'auto', 'off' or a folder.*; got") as refused:
        compilation_cache.enable(str(file / below))
    assert str(file / below) in str(refused.value)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_name_that_is_no_folder_here_is_refused():
    with pytest.raises(ValueError, match="which is an address"):
        compilation_cache.enable("gs://bucket")
    with pytest.raises(ValueError, match="a name in UTF-8; got"):
        compilation_cache.enable("\udcff")
    assert jax.config.jax_compilation_cache_dir is None


def test_no_name_is_refused():
    with pytest.raises(ValueError, match="got ''"):
        compilation_cache.enable("")


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root"
)
def test_a_folder_of_others_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can be written"):
        compilation_cache.enable(str(tmp_path / "a"))


def test_the_users_folder_that_cannot_be_written_is_done_without(monkeypatch, file):
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    before = _settings()
    with pytest.warns(UserWarning, match="going on without") as warned:
        assert compilation_cache.enable("auto") is None
    assert len(warned) == 1 and warned[0].filename == __file__
    assert "\n" not in str(warned[0].message)
    assert _settings() == before


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "~/.cache/fdg_jax"),
        ("linux", {"XDG_CACHE_HOME": "/big"}, "/big/fdg_jax"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "~/.cache/fdg_jax"),
        ("linux", {"XDG_CACHE_HOME": ""}, "~/.cache/fdg_jax"),
        ("darwin", {}, "~/Library/Caches/fdg_jax"),
        ("darwin", {"XDG_CACHE_HOME": "/big"}, "/big/fdg_jax"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fdg_jax"),
        ("win32", {}, "~/AppData/Local/fdg_jax"),
    ],
)
def test_where_a_platform_keeps_caches(monkeypatch, platform, environment, expected):
    monkeypatch.setattr(sys, "platform", platform)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compilation_cache.user_folder() == pathlib.Path(expected).expanduser()


def test_without_a_home_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where unknown
    with pytest.warns(UserWarning, match="going on without"):
        assert compilation_cache.enable("auto") is None
