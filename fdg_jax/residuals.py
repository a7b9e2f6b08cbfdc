"""Residuals: what a forward keeps for its backward, without a copy of its inputs.

``jax.vjp`` inside ``jit`` may return its closure, a pytree of residuals. Among them
are the weights and the input themselves, which would leave the compiled function as
copies. Here they are recognised while tracing and left out; the caller, who holds the
inputs anyway, hands them back to the backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """The residuals of one forward, less those that are among its inputs.

    Attributes:
        kept: arrays that the forward computed.
        positions: for each leaf of the closure, its place in ``inputs + kept``.
        treedef: structure of the closure.
    """

    kept: list[jax.Array]
    positions: tuple[int, ...] = field(metadata={"static": True})
    treedef: Any = field(metadata={"static": True})


def pack(vjp: Callable, inputs: Any) -> Residuals:
    """Takes a vjp closure apart, while it is being traced.

    Args:
        vjp: second result of ``jax.vjp``.
        inputs: pytree of the traced arrays that the backward will be given again.
    """
    leaves, treedef = jax.tree.flatten(vjp)
    pool = jax.tree.leaves(inputs)
    num_inputs = len(pool)
    place = {id(a): i for i, a in enumerate(pool)}
    positions = []
    for leaf in leaves:
        if id(leaf) not in place:
            place[id(leaf)] = len(pool)
            pool.append(leaf)
        positions.append(place[id(leaf)])
    return Residuals(pool[num_inputs:], tuple(positions), treedef)


def unpack(residuals: Residuals, inputs: Any) -> Callable:
    """Puts a vjp closure together again; the inverse of ``pack``.

    Args:
        residuals: result of ``pack``.
        inputs: the same pytree of arrays as given to ``pack``.
    """
    pool = jax.tree.leaves(inputs) + residuals.kept
    leaves = [pool[i] for i in residuals.positions]
    return jax.tree.unflatten(residuals.treedef, leaves)
