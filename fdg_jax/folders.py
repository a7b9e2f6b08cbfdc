"""Folders and files that a user names: where they are, and whether they will do."""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator


def local(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns what a path means on this machine, with ``~`` as a home folder.

    Args:
        path: as the user gives it.

    Raises:
        ValueError: it is an address such as ``gs://bucket``, or in the home of nobody.
    """
    text = os.fspath(path)
    # pathlib has made "gs:/bucket" of the address where it is not a string any more.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(/|$)", text):
        raise ValueError(
            f"files are read and written on this machine; got {text!r}, which is an "
            f"address; mount it and name the folder, or, if a folder here has that "
            f"name, give its absolute path"
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"a path that begins with ~ is in somebody's home; got {text!r}, and there "
            f"is no such home; give the absolute path"
        ) from error


def nearest(path: pathlib.Path) -> pathlib.Path:
    """Returns a path, or what exists of the folders above it."""
    places = (path.absolute(), *path.absolute().parents)
    return next(place for place in places if os.path.exists(place))


def can_be_written(folder: pathlib.Path) -> bool:
    """Whether a folder, or where it is missing the one to hold it, can be written."""
    try:
        folder.lstat()
    except FileNotFoundError:
        pass  # it can be made, if its name is one
    except OSError:
        return False
    existing = nearest(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def is_text(path: pathlib.Path) -> bool:
    """Whether a path is UTF-8, as much of what is written in C++ wants it."""
    return not re.search("[\ud800-\udfff]", str(path))


@contextlib.contextmanager
def for_a_while(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder if it is missing, and takes away afterwards what it has made."""
    missing = [p for p in (folder, *folder.parents) if not os.path.exists(p)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for made in missing:
            # It was not made, or somebody else has put something into it by now.
            with contextlib.suppress(OSError):
                made.rmdir()


@contextlib.contextmanager
def plain_name(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path to a folder that no library takes for a pattern or an address.

    Args:
        folder: that exists. Where there are other characters in its path than letters,
            digits and a few signs, a link to it from the system's temporary folder
            stands for it.
    """
    folder = folder.absolute()
    if re.fullmatch(r"([A-Za-z]:)?(?!//)[\w./+=,@ -]*", folder.as_posix()):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fdg_jax_") as links:
        link = pathlib.Path(links, "folder")
        link.symlink_to(folder, target_is_directory=True)
        yield link
