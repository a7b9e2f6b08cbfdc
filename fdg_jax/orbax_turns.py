"""Orbax, by one thread at a time.

Orbax counts its operations for the process as a whole, so two threads that save at the
same time, as two pipelines in one process do, get into each other's folders.
"""

import contextlib
import pathlib
import threading
from collections.abc import Iterator

import orbax.checkpoint as ocp

_TURN = threading.RLock()


@contextlib.contextmanager
def manager(directory: pathlib.Path) -> Iterator[ocp.CheckpointManager]:
    """Opens a folder of checkpoints; its files are whole when it is left.

    Args:
        directory: made when missing.
    """
    with (
        _TURN,
        ocp.CheckpointManager(pathlib.Path(directory).absolute()) as checkpoints,
    ):
        yield checkpoints


@contextlib.contextmanager
def checkpointer() -> Iterator[ocp.Checkpointer]:
    """Opens what saves and restores one pytree of arrays at a time."""
    with _TURN, ocp.PyTreeCheckpointer() as opened:
        yield opened
