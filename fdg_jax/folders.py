"""Folders that are to be written: whether they can be, before anything is."""

import os
import pathlib


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
