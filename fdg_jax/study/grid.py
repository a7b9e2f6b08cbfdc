"""From a study to its cells: a full config each, and a name that is also its folder."""

import dataclasses
import importlib
import itertools
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from flax import nnx

from fdg_jax import config_keys, from_config
from fdg_jax.study.definition import Study
from fdg_jax.words import did_you_mean

METHOD = "method"
"""Key of a grid that is a label where the config has no such key."""

_NAMED = ("dataset", "network", METHOD, "num_stages", "shrink", "seed")
_FORBIDDEN = {"mode": "a study trains", "restart": "remove a cell's folder instead"}
_LONGEST_NAME = 200  # file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        setting: what it has in common with the cells that differ in the seed alone.
        method: what trains, such as "fdg".
        axes: by key, what it has of its grid's axes, other than those which every
            setting is named by.
        config: every key.
        together: whether it is trained at the same time as those of other seeds.
    """

    setting: str
    method: str
    axes: Mapping[str, Any]
    config: ml_collections.ConfigDict
    together: bool = False

    @property
    def name(self) -> str:
        """Of the cell and of its folder: no other cell of the study has it."""
        return f"{self.setting}-seed{self.config.seed}"


def expand(study: Study, data_dir: str | None = None) -> tuple[Cell, ...]:
    """Returns the cells of a study: all settings with the first seed, then the second.

    Args:
        study: what to run.
        data_dir: in place of the config's.

    Raises:
        ValueError: the study is empty somewhere, a key or a value's type is wrong, or
            two cells cannot be told apart.
    """
    _check(study)
    default = _config("default")
    overrides = dict(study.overrides)
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    base = config_keys.complete(
        default, _config(study.base).copy_and_resolve_references(), study.base
    )
    label = overrides.get(METHOD, "fdg")
    _check_keys(overrides, default, "the overrides")
    base = config_keys.complete(
        base, _without_label(overrides, default), f"the overrides of {study.name!r}"
    )
    cells = []
    for number, grid in enumerate(study.grids):
        source = f"grid {number} of study {study.name!r}"
        _check_keys(grid, default, source)
        for turn, cell in _cells({"seed": list(study.seeds), **grid}, base, label):
            config = config_keys.complete(base, _without_label(cell, default), source)
            method = str(config.get(METHOD, cell[METHOD]))
            together = study.seeds_together and config.engine == "fused"
            cell = dataclasses.replace(_named(config, method, grid), together=together)
            cells.append((turn, cell))
    cells = tuple(c for _, c in sorted(cells, key=lambda pair: pair[0]))
    _check_names(cells)
    return cells


def check_settings(cells: Sequence[Cell]) -> None:
    """Refuses values that a run would refuse, loading no data.

    Args:
        cells: from ``expand``.

    Raises:
        ValueError: a value is wrong; names the setting.
    """
    for setting, cell in {cell.setting: cell for cell in cells}.items():
        try:
            _check_config(cell.config)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from error


def _check_config(config: ml_collections.ConfigDict) -> None:
    from_config.check_numbers(config)
    rate = from_config.learning_rate(config, from_config.steps_per_epoch(config))
    network = nnx.eval_shape(lambda: from_config.create_network(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this process has too few devices
        from_config.create_pipeline(config, rate, cuts=config.cuts, network=network)


def _config(name: str) -> ml_collections.ConfigDict:
    """The config that a module of configs/ makes."""
    try:
        configs = importlib.import_module("configs")
    except ImportError as error:
        raise ValueError(
            "studies change the configs in the folder configs/ of the repository, "
            "which is not there; run the study from a clone of it"
        ) from error
    folder = pathlib.Path(configs.__file__).parent
    names = sorted(path.stem for path in folder.glob("[!_]*.py"))
    if name not in names:
        raise ValueError(
            f"the base of a study must be one of configs/: {', '.join(names)}; got "
            f"{name!r}{did_you_mean(name, names)}"
        )
    return importlib.import_module(f"configs.{name}").get_config()


def _check(study: Study) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(study.name)):
        raise ValueError(
            f"a study's name, which is also its folder's, has letters, digits, '_', "
            f"'-' and '.'; got {study.name!r}"
        )
    for what, entries in (("grid", study.grids), ("seed", study.seeds)):
        if isinstance(entries, (str, Mapping)) or not len(entries):
            raise ValueError(
                f"a study has a sequence of at least one {what}; {study.name!r} has "
                f"{entries!r}"
            )


def _check_keys(
    values: Mapping[str, Any], default: ml_collections.ConfigDict, source: str
) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must map config keys to values; got {values!r}")
    for key, value in values.items():
        config_keys.check(key, [*default, METHOD])
        if key in _FORBIDDEN:
            raise ValueError(f"{source} cannot set {key}: {_FORBIDDEN[key]}")
        if isinstance(value, list) and not value:
            raise ValueError(
                f"an axis needs at least one value; {source} has {key}=[]; remove it"
            )


def _cells(
    grid: Mapping[str, Any], base: ml_collections.ConfigDict, label: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields a grid's products, each with the position of its seed."""
    grid = {METHOD: base.get(METHOD, label), **grid}
    axes = [value if isinstance(value, list) else [value] for value in grid.values()]
    seeds = axes[list(grid).index("seed")]
    for values in itertools.product(*axes):
        cell = dict(zip(grid, values, strict=True))
        yield seeds.index(cell["seed"]), cell


def _without_label(
    values: Mapping[str, Any], default: ml_collections.ConfigDict
) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != METHOD or METHOD in default}


def _named(
    config: ml_collections.ConfigDict, method: str, grid: Mapping[str, Any]
) -> Cell:
    """Names a cell by itself alone, so that it keeps its name when a study grows."""
    axes = {
        key: config[key]
        for key in sorted(grid)
        if isinstance(grid[key], list) and key not in _NAMED
    }
    parts = [config.dataset, config.network, method, f"k{config.num_stages}"]
    # With one stage nothing crosses a cut.
    if config.num_stages > 1 and (method == "fdg" or config.shrink != 1.0):
        parts.append(f"beta{_written(config.shrink)}")
    parts += [f"{key}_{_written(value)}" for key, value in axes.items()]
    setting = "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)
    return Cell(setting, method, axes, config)


def _written(value: Any) -> str:
    """A value as a part of a name: 0.5 and 1, but all digits where they matter."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple):
        return "_".join(map(_written, value)) or "none"
    return str(value)


def _check_names(cells: Sequence[Cell]) -> None:
    known = {}
    for cell in cells:
        if len(cell.name.encode()) > _LONGEST_NAME:
            raise ValueError(
                f"a cell's name has at most {_LONGEST_NAME} bytes; got {cell.name!r}; "
                f"give long values as they are, not as an axis [...]"
            )
        # Some file systems do not tell upper from lower case.
        other = known.setdefault(cell.name.lower(), cell)
        if other is cell:
            continue
        differ = [k for k in cell.config if cell.config[k] != other.config[k]]
        way_out = "remove one of them"
        if set(differ) - set(_NAMED):
            way_out = "give one of these keys as a list, so that names tell it"
        raise ValueError(
            f"no two cells of a study are the same; two are {cell.name!r}"
            f"{' and differ in ' if differ else ''}{', '.join(differ)}; {way_out}"
        )
