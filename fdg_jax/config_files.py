"""The project's own configs, in configs/ beside the package.

They have a common name. A folder or package of the user's that has it too, in the
current folder or elsewhere on ``sys.path``, is not taken for them.
"""

import contextlib
import importlib
import importlib.util
import pathlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

import ml_collections

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "configs"
"""Where they are in a clone of the repository; an installed wheel has none."""

_PACKAGE = "configs"


def names() -> list[str]:
    """Returns the names of the configs.

    Raises:
        ValueError: the folder is not there.
    """
    if not _is_there():
        raise ValueError(
            f"the configs are in the folder configs/ of the repository, beside the "
            f"package fdg_jax; there is no {FOLDER}; run from a clone, installed with "
            f"pip install -e"
        )
    return sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def load(name: str) -> ml_collections.ConfigDict:
    """Returns the config that a file of configs/ makes.

    Args:
        name: one of ``names``.

    Raises:
        ValueError: the folder is not there.
    """
    names()
    with importable():
        return importlib.import_module(f"{_PACKAGE}.{name}").get_config()


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """Has ``configs`` be the project's for all that is imported within.

    So ``from configs import default`` means the same in a config file wherever the file
    is, and whatever the current folder holds. A user's own package of that name is
    searched too, after the project's; afterwards it is again what it was.
    """
    before = _imported()
    if not _is_there() or _is_ours(before.get(_PACKAGE)):
        yield
        return
    for name in before:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(_PACKAGE, FOLDER / "__init__.py")
    package = sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    package.__path__ = pkgutil.extend_path(package.__path__, _PACKAGE)
    try:
        spec.loader.exec_module(package)
        yield
    finally:
        for name in _imported():
            del sys.modules[name]
        sys.modules.update(before)


def _is_there() -> bool:
    # Beside an installed package there may be a stranger's configs/, but no train.py.
    return (FOLDER / "default.py").is_file() and (FOLDER.parent / "train.py").is_file()


def _is_ours(package: ModuleType | None) -> bool:
    file = getattr(package, "__file__", None)
    return file is not None and pathlib.Path(file).resolve().parent == FOLDER


def _imported() -> dict[str, ModuleType]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name.split(".")[0] == _PACKAGE
    }
