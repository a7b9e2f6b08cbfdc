"""Orbax, by one thread at a time, in folders of any name.

Orbax counts its operations for the process as a whole, so two threads that save at the
same time, as two pipelines in one process do, get into each other's folders. It matches
whole paths as patterns, and TensorStore takes no path that is not UTF-8 or has a
backslash: so they see a link where a name is not plain.
"""

import asyncio
import contextlib
import pathlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import orbax.checkpoint as ocp

from fdg_jax import folders

_TURN = threading.RLock()
_FINISH_SECONDS = 10.0


@contextlib.contextmanager
def manager(directory: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
    """Opens a folder of checkpoints; its files are whole when it is left.

    Args:
        directory: made when missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (
        _turn(),
        folders.plain_name(directory) as place,
        ocp.CheckpointManager(place) as checkpoints,
    ):
        yield checkpoints


def save(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Saves one pytree of arrays.

    Args:
        path: of a folder that is made, in one that exists.
        values: nested dicts of arrays.
    """
    with _checkpointer(path) as (checkpointer, place):
        checkpointer.save(place, values)


def restore(path: pathlib.Path) -> dict[str, Any]:
    """Reads what ``save`` has saved.

    Args:
        path: as given to ``save``.

    Returns:
        The same nested dicts, of NumPy arrays.
    """
    with _checkpointer(path) as (checkpointer, place):
        return checkpointer.restore(place)


@contextlib.contextmanager
def _checkpointer(
    path: pathlib.Path,
) -> Iterator[tuple[ocp.Checkpointer, pathlib.Path]]:
    with (
        _turn(),
        folders.plain_name(path.parent) as parent,
        ocp.PyTreeCheckpointer() as opened,
    ):
        yield opened, parent / path.name


@contextlib.contextmanager
def _turn() -> Iterator[None]:
    with _TURN:
        before = asyncio.get_event_loop_policy()
        asyncio.set_event_loop_policy(_Policy(before))
        try:
            yield
        finally:
            asyncio.set_event_loop_policy(before)


class _Loop(asyncio.SelectorEventLoop):
    """A loop that first finishes what was begun in it, and closes then.

    Orbax closes its loops at the first array that fails. When the others come to their
    end, TensorStore would call into a closed loop, and print a traceback for each.
    """

    def close(self) -> None:
        begun = set() if self.is_closed() else asyncio.all_tasks(self)
        if begun:
            ended, _ = self.run_until_complete(
                asyncio.wait(begun, timeout=_FINISH_SECONDS)
            )
            for task in ended:
                task.cancelled() or task.exception()  # else asyncio complains of it
        super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
    """Makes new loops of that kind; all else is as it was."""

    def __init__(self, before: asyncio.AbstractEventLoopPolicy):
        super().__init__()
        self._before = before

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Loop()

    def get_event_loop(self) -> asyncio.AbstractEventLoop:
        return self._before.get_event_loop()

    def set_event_loop(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self._before.set_event_loop(loop)
