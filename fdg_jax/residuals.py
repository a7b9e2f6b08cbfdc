"""Residuals: what a forward keeps for its backward, without needless copies.

``jax.vjp`` inside ``jit`` may return its closure, a pytree of residuals. Among them
are the weights and the input themselves, and the output where a ReLU comes last, which
would leave the compiled function as copies. Here they are recognised while tracing and
left out; the caller, who holds them anyway, hands them back to the backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Residuals:
    """The residuals of one forward, less those that its caller has.

    Attributes:
        kept: arrays that the forward computed.
        positions: for each leaf of the closure, its place in ``at_hand + kept``.
        treedef: structure of the closure.
    """

    kept: list[jax.Array]
    positions: tuple[int, ...] = field(metadata={"static": True})
    treedef: Any = field(metadata={"static": True})


def pack(vjp: Callable, at_hand: Any) -> Residuals:
    """Takes a vjp closure apart, while it is being traced.

    Args:
        vjp: second result of ``jax.vjp``.
        at_hand: pytree of the traced arrays that the backward will be given again: the
            function's inputs and output.
    """
    leaves, treedef = jax.tree.flatten(vjp)
    pool = jax.tree.leaves(at_hand)
    num_at_hand = len(pool)
    place = {id(a): i for i, a in enumerate(pool)}
    positions = []
    for leaf in leaves:
        if id(leaf) not in place:
            place[id(leaf)] = len(pool)
            pool.append(leaf)
        positions.append(place[id(leaf)])
    return Residuals(pool[num_at_hand:], tuple(positions), treedef)


def needed(residuals: Residuals, at_hand: Any) -> list[jax.Array | None]:
    """Returns the caller's arrays, with None for each that ``unpack`` can do without.

    Args:
        residuals: result of ``pack``.
        at_hand: pytree of arrays, the first of those that were given to ``pack``.
    """
    wanted = set(residuals.positions)
    leaves = jax.tree.leaves(at_hand)
    return [leaf if i in wanted else None for i, leaf in enumerate(leaves)]


def unpack(residuals: Residuals, at_hand: Sequence[jax.Array | None]) -> Callable:
    """Puts a vjp closure together again; the inverse of ``pack``.

    Args:
        residuals: result of ``pack``.
        at_hand: the leaves of what was given to ``pack``, or what of them is
            ``needed``. They are leaves, since None in a pytree is structure.
    """
    pool = [*at_hand, *residuals.kept]
    leaves = [pool[i] for i in residuals.positions]
    return jax.tree.unflatten(residuals.treedef, leaves)
