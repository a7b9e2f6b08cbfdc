"""From a study to its cells: a full config each, and a name that is also its folder."""

import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from flax import nnx

from fdg_jax import config_files, config_keys, data, from_config, methods
from fdg_jax.study.definition import Study
from fdg_jax.words import did_you_mean

_NAMED = ("dataset", "network", "method", "num_stages", "shrink", "seed")
_FORBIDDEN = {"mode": "a study trains", "restart": "remove a cell's folder instead"}
_LONGEST_NAME = 200  # file systems take 255 bytes


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        axes: by key, what it has of its grid's axes, other than those which every
            setting is named by.
        config: every key.
        together: whether it is trained at the same time as those of other seeds.
    """

    axes: Mapping[str, Any]
    config: ml_collections.ConfigDict
    together: bool = False

    @property
    def name(self) -> str:
        """Of the cell and of its folder: no other cell of the study has it.

        It says nothing of the other cells, so it stays when the study grows.
        """
        return f"{self.setting}-seed{self.config.seed}"

    @property
    def setting(self) -> str:
        """The name without the seed: cells that have it in common differ in that."""
        config = self.config
        parts = [config.dataset, config.network, self.method, f"k{config.num_stages}"]
        if self.shrinks:
            parts.append(f"beta{_written(config.shrink)}")
        parts += [f"{key}_{_written(value)}" for key, value in self.axes.items()]
        return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)

    @property
    def method(self) -> str:
        """What trains, such as "fdg"."""
        return self.config.method

    @property
    def shrinks(self) -> bool:
        """Whether beta is open: there are cuts, and the method does not set it."""
        leaves_open = methods.get(self.method).leaves_open
        return self.config.num_stages > 1 and "shrink" in leaves_open


def expand(study: Study, data_dir: str | None = None) -> tuple[Cell, ...]:
    """Returns the cells of a study: setting by setting, each with all its seeds.

    Args:
        study: what to run.
        data_dir: in place of the config's.

    Raises:
        ValueError: the study is empty somewhere, a key or a value's type is wrong, or
            two cells cannot be told apart.
    """
    _check(study)
    default = _config("default")
    base = config_keys.complete(
        default, _config(study.base).copy_and_resolve_references(), study.base
    )
    source = f"the overrides of study {study.name!r}"
    _check_keys(study.overrides, default, source)
    base = config_keys.complete(base, study.overrides, source)
    if data_dir is not None:
        base.data_dir = data_dir
    cells = []
    for number, grid in enumerate(study.grids):
        source = f"grid {number} of study {study.name!r}"
        _check_keys(grid, default, source)
        for values in _products(grid, study.seeds):
            config = config_keys.complete(base, values, source)
            together = study.seeds_together and config.engine == "fused"
            axes = {
                key: config[key]
                for key in sorted(grid)
                if isinstance(grid[key], list) and key not in _NAMED
            }
            cells.append(Cell(axes, config, together))
    _check_names(cells)
    return tuple(cells)


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


def check_data(cells: Sequence[Cell]) -> None:
    """Refuses data that cannot be had, loading every data set once.

    Args:
        cells: from ``expand``, those that are to run.

    Raises:
        ValueError: a data set is neither there nor can be downloaded.
    """
    for dataset, data_dir in {(c.config.dataset, c.config.data_dir) for c in cells}:
        data.load(dataset, data_dir)


def _check_config(config: ml_collections.ConfigDict) -> None:
    from_config.check_numbers(config)
    rate = from_config.learning_rate(config, from_config.steps_per_epoch(config))
    network = nnx.eval_shape(lambda: from_config.create_network(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this process has too few devices
        from_config.create_pipeline(config, rate, cuts=config.cuts, network=network)


def _config(name: str) -> ml_collections.ConfigDict:
    names = config_files.names()
    if name not in names:
        raise ValueError(
            f"the base of a study must be one of configs/: {', '.join(names)}; got "
            f"{name!r}{did_you_mean(name, names)}"
        )
    return config_files.load(name)


def _check(study: Study) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(study.name)):
        raise ValueError(
            f"a study's name, which is also its folder's, has letters, digits, '_', "
            f"'-' and '.'; got {study.name!r}"
        )
    for what, entries in (("grid", study.grids), ("seed", study.seeds)):
        is_sequence = isinstance(entries, Sequence) and not isinstance(entries, str)
        if not is_sequence or not entries:
            raise ValueError(
                f"a study has a sequence of at least one {what}; {study.name!r} has "
                f"{entries!r}; give a list or a tuple"
            )


def _check_keys(
    values: Mapping[str, Any], default: ml_collections.ConfigDict, source: str
) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} must map config keys to values; got {values!r}")
    for key, value in values.items():
        config_keys.check(key, list(default))
        if key in _FORBIDDEN:
            raise ValueError(f"{source} cannot set {key}: {_FORBIDDEN[key]}")
        if isinstance(value, list) and not value:
            raise ValueError(
                f"an axis needs at least one value; {source} has {key}=[]; remove it"
            )


def _products(
    grid: Mapping[str, Any], seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yields the products of a grid's axes; the seed varies fastest."""
    seed = {"seed": grid.get("seed", list(seeds))}
    grid = {key: value for key, value in grid.items() if key != "seed"} | seed
    axes = [value if isinstance(value, list) else [value] for value in grid.values()]
    for values in itertools.product(*axes):
        yield dict(zip(grid, values, strict=True))


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
