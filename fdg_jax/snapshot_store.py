"""Snapshots on disk: folders that are either whole or not there.

A snapshot of step n is the folder ``<directory>/<n>``::

    arrays/          the arrays, written by Orbax
    record.json      what is no array: the config, the cuts, the state of the logs
    manifest.json    the SHA-256 of every other file

It is written under another name, and renamed when all of it is there. Whatever happens
to its files afterwards shows when they are compared with the manifest, and then the
snapshot before is used. All of it is data: nothing in it is ever executed.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from fdg_jax import orbax_turns

_ARRAYS, _RECORD, _MANIFEST = "arrays", "record.json", "manifest.json"
_PARTIAL = ".partial"


class DamagedSnapshotError(Exception):
    """The files of a snapshot are not those that were written."""


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot whose files have been found to be whole.

    Attributes:
        step: batches trained before it.
        record: what is no array.
        folder: where it is.
    """

    step: int
    record: dict[str, Any]
    folder: pathlib.Path

    def arrays(self) -> dict[str, np.ndarray]:
        """Reads the arrays, by name."""
        values = orbax_turns.restore(self.folder / _ARRAYS)
        return traverse_util.flatten_dict(values, sep="/")


class SnapshotStore:
    """The snapshots of one run."""

    def __init__(self, directory: pathlib.Path, keep: int):
        """Names the place; nothing is made before the first ``write``.

        Args:
            directory: where the snapshots are.
            keep: how many of the newest to keep.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep

    def steps(self) -> list[int]:
        """Returns the steps of all snapshots, whole or damaged, the newest first."""
        if not self._directory.is_dir():
            return []
        names = (entry.name for entry in self._directory.iterdir())
        return sorted((int(n) for n in names if re.fullmatch(r"\d+", n)), reverse=True)

    def write(
        self, step: int, arrays: Mapping[str, jax.Array], record: Mapping[str, Any]
    ) -> None:
        """Writes a snapshot; ``remove_old`` makes room for the next one.

        Args:
            step: batches trained before it. Where one of the same step is whole, it
                stays: a run that goes on does what it did before.
            arrays: by name.
            record: to be read back as JSON gives it.

        Raises:
            OSError: it cannot be written; nothing of it is left.
        """
        if self._is_whole(step):
            return
        partial = self._directory / f"{step}{_PARTIAL}"
        try:
            for left in self._directory.glob(f"*{_PARTIAL}"):  # by a process that died
                shutil.rmtree(left)
            partial.mkdir(parents=True)
            values = traverse_util.unflatten_dict(jax.device_get(arrays), sep="/")
            _save(partial / _ARRAYS, values)
            _write_json(partial / _RECORD, record)
            _write_json(partial / _MANIFEST, dict(_digests(partial)))
            final = self._directory / str(step)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def remove_old(self) -> None:
        """Removes the snapshots that are not to be kept.

        Raises:
            OSError: one cannot be removed.
        """
        for old in self.steps()[self._keep :]:
            shutil.rmtree(self._directory / str(old))

    def remove_after(self, step: int) -> None:
        """Removes the snapshots of later steps, which are damaged or of another run.

        Args:
            step: of the snapshot that the run goes on from; 0 removes all.
        """
        for later in self.steps():
            if later > step:
                shutil.rmtree(self._directory / str(later))

    def _is_whole(self, step: int) -> bool:
        try:
            self.read(step)
        except DamagedSnapshotError:
            return False
        return True

    def read(self, step: int) -> StoredSnapshot:
        """Returns a snapshot, once all its files are known to be whole.

        Raises:
            DamagedSnapshotError: says what is wrong.
        """
        folder = self._directory / str(step)
        manifest = _read_json(folder / _MANIFEST)
        try:
            found = dict(_digests(folder))
        except OSError as error:
            raise DamagedSnapshotError(f"{folder} cannot be read: {error}") from error
        for name in sorted(manifest.keys() | found.keys()):
            if name not in found:
                raise DamagedSnapshotError(f"{folder}: {name} is missing")
            if manifest.get(name) != found[name]:
                raise DamagedSnapshotError(f"{folder}: {name} is not what was written")
        return StoredSnapshot(step, _read_json(folder / _RECORD), folder)


def _save(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    try:
        orbax_turns.save(path, values)
    except ValueError as error:  # what TensorStore makes of a disk that is full
        raise OSError(f"{path} cannot be written: {error}") from error


def _digests(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields name and SHA-256 of every file of a snapshot but the manifest."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != _MANIFEST:
            with open(path, "rb") as file:
                yield name, hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + os.linesep, encoding="utf-8")


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedSnapshotError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DamagedSnapshotError(f"{path} is not what was written")
    return value
