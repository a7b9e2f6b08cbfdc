"""What a study is: plain data, which a file in configs/studies/ returns."""

import dataclasses
import pathlib
import runpy
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fdg_jax import config_files, folders
from fdg_jax.words import did_you_mean


@dataclasses.dataclass(frozen=True)
class Study:
    """A union of grids over the keys of a config.

    Example::

        Study(
            name="sweep",
            base="cifar10_resnet20",
            grids=[
                {"method": "bp", "num_stages": 1},
                {"method": "fdg", "num_stages": [2, 3], "shrink": [1.0, 0.5, 0.2]},
            ],
            seeds=(0, 1, 2),
        )

    Attributes:
        name: of the study and of its folder.
        grids: each from a config key to its value. A list is an axis: the grid's cells
            are the product of its axes, and what a cell has of an axis stands in its
            name. Where the config has no key "method", it is only a label.
        base: the config that the grids change, one of the project's configs/.
        overrides: keys that all cells change.
        seeds: of the cells of every grid that has no "seed" of its own.
        seeds_together: whether cells that differ only in their seeds are trained at
            the same time, as one program vmapped over the seeds, where their engine is
            "fused". They come out equal to rounding; which way is faster depends on
            the network and the device.
        note: what a reader of the table must know.
    """

    name: str
    grids: Sequence[Mapping[str, Any]]
    base: str = "default"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    seeds_together: bool = False
    note: str = ""


def load(path: str | pathlib.Path) -> Study:
    """Executes a study file and returns its study.

    Args:
        path: of a Python file that defines ``get_study()``.

    Raises:
        ValueError: there is no such file, it fails, or it returns something else.
    """
    path = folders.local(path)
    if not path.is_file():
        names = sorted(file.stem for file in path.parent.glob("[!_]*.py"))
        held = f"; {path.parent} has {', '.join(names)}" if names else ""
        raise ValueError(
            f"a study must be a file; there is no {str(path)!r}"
            f"{did_you_mean(path.stem, names)}{held}"
        )
    try:
        with config_files.importable():
            study = runpy.run_path(str(path))["get_study"]()
    except Exception as error:  # the user's code may fail in any way
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if call.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(
            f"a study file defines get_study(); {path}{where} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(study, Study):
        raise ValueError(
            f"get_study() of a study file returns a fdg_jax.study.Study; that of "
            f"{path} returned {study!r}"
        )
    return study
