"""Snapshots: all that a pipeline in motion is made of, as one consistent cut.

A marker travels down the activation channels behind batch n - 1 (Chandy and Lamport,
1985). When it reaches stage k, the stage has done the forwards of the batches before n
and the updates of the batches before n - s_k. Nothing is in the activation channels of
the cut, since the marker is behind everything in them, and the cotangents on their way
up are known to their senders. So the cut at n is the same however the threads were
scheduled, whichever engine runs, and the stages need not wait for each other::

    state      of stage k
    stash      its entries of the batches n - s_k, ..., n - 1
    sent       the cotangents of the batches n - s_{k-1}, ..., n - 1 - s_k, which stage
               k has sent up and stage k - 1 has not used

To files and back a snapshot goes as named arrays; names are paths such as
``0/state/params/1/conv/kernel``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fdg_jax.stage import Activation, Stage, StageState, StashEntry
from fdg_jax.words import describe, path_name


class StageSnapshot(NamedTuple):
    """One stage where the marker passed it.

    Attributes:
        state: what the stage carries from batch to batch.
        stash: entries that still wait for their cotangents, the oldest first.
        sent: cotangents that it has sent up and the stage above has not used, the
            oldest first.
    """

    state: StageState
    stash: tuple[StashEntry, ...] = ()
    sent: tuple[Any, ...] = ()


class Snapshot(NamedTuple):
    """A pipeline between two batches.

    Attributes:
        batch: n, number of the batch that comes next.
        stages: one per stage.
        nonfinite: batches in a row, up to n - 1, whose loss was not finite.
    """

    batch: int
    stages: tuple[StageSnapshot, ...]
    nonfinite: int = 0

    @property
    def in_flight(self) -> bool:
        """Whether gradients are still to be applied."""
        return any(stage.stash for stage in self.stages)

    def lengths(self) -> list[list[int]]:
        """Returns per stage how many entries its stash and its ``sent`` have."""
        return [[len(stage.stash), len(stage.sent)] for stage in self.stages]


def most_lengths(staleness: Sequence[int]) -> list[list[int]]:
    """Returns the ``lengths`` of a filled pipeline.

    Args:
        staleness: s_k.
    """
    before = [staleness[0], *staleness[:-1]]
    return [[s, b - s] for s, b in zip(staleness, before, strict=True)]


def abstract(
    stages: Sequence[Stage],
    states: Sequence[StageState],
    image: Any,
    batch: int,
    lengths: Sequence[Sequence[int]],
) -> Snapshot:
    """Returns a snapshot's structure and shapes, computing nothing.

    Args:
        stages: of the pipeline.
        states: their states, arrays or abstract.
        image: images of a batch, arrays or abstract.
        batch: number of the batch that comes next.
        lengths: as ``Snapshot.lengths`` returns them.

    Returns:
        A snapshot with a ``jax.ShapeDtypeStruct`` in place of every array.
    """
    activation, received, taken = Activation(image), None, []
    for stage, state, (stashed, sent) in zip(stages, states, lengths, strict=True):
        entry = None
        if not stage.is_last:
            activation, _, entry = jax.eval_shape(stage.forward, state, activation)
        state = jax.eval_shape(lambda a: a, state)
        taken.append(StageSnapshot(state, (entry,) * stashed, (received,) * sent))
        received = stage.cotangent_like(activation.x)
    return Snapshot(batch, tuple(taken))


def to_arrays(snapshot: Snapshot) -> dict[str, jax.Array]:
    """Returns a snapshot's arrays by name; those without elements are left out."""
    paths, _ = jax.tree_util.tree_flatten_with_path(snapshot.stages)
    return {path_name(path): array for path, array in paths if array.size}


def from_arrays(arrays: Mapping[str, Any], like: Snapshot) -> Snapshot:
    """Puts a snapshot together again; the inverse of ``to_arrays``.

    Args:
        arrays: by name.
        like: result of ``abstract`` for the pipeline that is to go on.

    Returns:
        A snapshot of the given arrays.

    Raises:
        ValueError: an array is missing, unknown, or of another shape or type.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(like.stages)
    expected = {path_name(path): value for path, value in paths}
    empty = {n: np.zeros(a.shape, a.dtype) for n, a in expected.items() if not a.size}
    arrays = {**arrays, **empty}
    for name in sorted(expected.keys() ^ arrays.keys()):
        where = "lacks" if name in expected else "has, which this pipeline has not,"
        raise ValueError(f"a snapshot must be of the same pipeline; it {where} {name}")
    for name, value in expected.items():
        if describe(arrays[name]) != describe(value):
            raise ValueError(
                f"a snapshot must be of the same pipeline; its {name} is "
                f"{describe(arrays[name])} where {describe(value)} is needed"
            )
    stages = jax.tree.unflatten(treedef, [arrays[name] for name in expected])
    return Snapshot(like.batch, stages)
