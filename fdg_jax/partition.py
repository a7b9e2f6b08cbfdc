"""Where to cut a network: explicit positions, the paper's, or balanced by cost.

A cut is a position in the list [stem, block 1, ..., block N, head]: the stage that
begins there. K stages have K - 1 cuts.
"""

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax.blocks import Block
from fdg_jax.words import (
    describe,
    describe_positions,
    did_you_mean,
    parse_integers,
)

PAPER_CUTS = {
    "resnet20": {2: (5,), 3: (4, 7)},
    "resnet56": {2: (14,), 3: (10, 19), 4: (7, 14, 21)},
    "resnet110": {2: (28,), 3: (19, 37), 4: (14, 28, 42), 5: (11, 22, 33, 44)},
    "resnet1202": {
        2: (251,),
        3: (201, 401),
        4: (76, 251, 426),
        5: (61, 221, 281, 441),
    },
    "resnet18": {2: (5,), 3: (3, 6)},
    "resnet50": {2: (8,), 3: (6, 11), 4: (5, 9, 13)},
    "resnet101": {2: (17,), 3: (12, 23), 4: (9, 17, 25), 5: (7, 14, 21, 28)},
    "wrn28_10": {2: (7,), 3: (5, 9), 4: (4, 7, 10)},
}
"""The cuts of the authors' published program, by network and number of stages."""


def resolve_cuts(
    cuts: str | Sequence[int],
    *,
    num_stages: int,
    num_blocks: int,
    network_name: str | None = None,
) -> tuple[int, ...] | None:
    """Returns the positions that a user's word for the cuts means.

    Args:
        cuts: positions, as a sequence or as text "4,7"; "paper"; or "balanced".
        num_stages: K.
        num_blocks: length of the network.
        network_name: whose published cuts "paper" means.

    Returns:
        K - 1 increasing positions, or None for "balanced", which needs measurements.

    Raises:
        ValueError: unknown word; wrong number of positions; positions that do not
            increase or leave a stage empty; more stages than blocks; no published cuts.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be at least 1; got {num_stages}")
    if num_stages > num_blocks:
        raise ValueError(
            f"every stage needs a block of its own; got num_stages={num_stages} for a "
            f"network of {num_blocks} blocks; use at most {num_blocks} stages"
        )
    if num_stages == 1 and cuts in ("paper", "balanced", ""):
        return ()
    if isinstance(cuts, str) and cuts == "balanced":
        return None
    if isinstance(cuts, str) and cuts == "paper":
        cuts = _paper(network_name, num_stages)
    elif isinstance(cuts, str) or not isinstance(cuts, Iterable):
        cuts = _parse(cuts)
    cuts = tuple(cuts)
    _validate(cuts, num_stages, num_blocks)
    return tuple(map(operator.index, cuts))


def _paper(network_name: str | None, num_stages: int) -> tuple[int, ...]:
    published = PAPER_CUTS.get(network_name, {})
    if num_stages not in published:
        known = "; ".join(f"{n}: K={list(by_k)}" for n, by_k in PAPER_CUTS.items())
        raise ValueError(
            f"cuts='paper' needs published cuts; got network {network_name!r} with "
            f"num_stages={num_stages}, but they exist for {known}; use 'balanced' or "
            f"positions"
        )
    return published[num_stages]


def _parse(text: object) -> tuple[int, ...]:
    try:
        return parse_integers(text)
    except ValueError:
        raise ValueError(
            f"cuts must be 'paper', 'balanced' or positions such as '4,7'; got "
            f"{text!r}{did_you_mean(text, ('paper', 'balanced'))}"
        ) from None


def _validate(cuts: tuple[int, ...], num_stages: int, num_blocks: int) -> None:
    def refuse(rule):
        raise ValueError(
            f"{rule}; got cuts={cuts} for num_stages={num_stages} and {num_blocks} "
            f"blocks; a cut is the position, 1 to {num_blocks - 1}, at which a stage "
            f"begins"
        )

    if any(isinstance(c, bool) or not hasattr(c, "__index__") for c in cuts):
        refuse("cuts must be integers")
    if len(cuts) != num_stages - 1:
        refuse(f"K stages need K - 1 cuts, here {num_stages - 1}")
    if any(a >= b for a, b in zip(cuts, cuts[1:], strict=False)):
        refuse("cuts must increase")
    if any(not 1 <= c < num_blocks for c in cuts):
        refuse("cuts must lie inside the network")


_RULE = (
    "what crosses a cut must be floating-point arrays, since their gradient comes back"
)


def possible_cuts(
    blocks: Sequence[Block], shapes: Sequence[Any], num_stages: int
) -> tuple[int, ...]:
    """Finds where a stage may begin: where what crosses has a gradient to send back.

    Args:
        blocks: the blocks of a network.
        shapes: abstract input of every block and output of the last, as
            ``blocks.trace_shapes`` returns it.
        num_stages: K.

    Returns:
        At least K - 1 increasing positions.

    Raises:
        ValueError: there are fewer; says which there are, and which block is in the way
            of the others.
    """
    obstacles = {cut: _obstacle(shapes[cut]) for cut in range(1, len(blocks))}
    possible = tuple(cut for cut, obstacle in obstacles.items() if obstacle is None)
    if len(possible) >= num_stages - 1:
        return possible
    listed = f" ({describe_positions(possible)})" if possible else ""
    raise ValueError(
        f"{_RULE}; num_stages={num_stages} needs {num_stages - 1} positions where it "
        f"is, and this network has {len(possible)}{listed}: "
        f"{_tell_obstacles(blocks, obstacles)}; use at most {len(possible) + 1} "
        f"stage(s), or compute integers and booleans in the blocks that need them"
    )


def _obstacle(x: Any) -> str | None:
    """What of an activation has no gradient; None if all of it has one."""
    leaves = jax.tree.leaves(x)
    others = [a for a in leaves if not jnp.issubdtype(a.dtype, jnp.floating)]
    return describe(others) if others or not leaves else None


def _tell_obstacles(blocks: Sequence[Block], obstacles: dict[int, str | None]) -> str:
    """Says which block gives what; neighbours that give the same are told together."""
    told = []
    for obstacle, cuts in itertools.groupby(obstacles, obstacles.get):
        names = [blocks[cut - 1].name for cut in cuts]
        if obstacle is not None and len(names) == 1:
            told.append(f"{names[0]} gives {obstacle}")
        elif obstacle is not None:
            told.append(f"{names[0]} to {names[-1]} give {obstacle}")
    return ", ".join(told)


def check_activations(
    blocks: Sequence[Block], shapes: Sequence[Any], cuts: Sequence[int]
) -> None:
    """Checks that what crosses a cut has a gradient to send back.

    Args:
        blocks: the blocks of a network.
        shapes: as for ``possible_cuts``.
        cuts: where stages begin.

    Raises:
        ValueError: an activation is not floating point; names the block, and the
            nearest positions that are possible.
    """
    possible = possible_cuts(blocks, shapes, len(cuts) + 1)
    for cut in cuts:
        if cut not in possible:
            free = [other for other in possible if other not in cuts]
            above = [other for other in free if other < cut][-1:]
            below = [other for other in free if other > cut][:1]
            raise ValueError(
                f"{_RULE}; {blocks[cut - 1].name} gives {describe(shapes[cut])}; move "
                f"the cut at {cut} to {' or '.join(map(str, above + below))}, or let "
                f"cuts='balanced' choose"
            )


def balanced_cuts(seconds: np.ndarray, num_stages: int) -> tuple[int, ...]:
    """Cuts a network so that the costliest stage is as cheap as possible, exactly.

    ``best[k][j] = min_i max(best[k-1][i], seconds[i, j])``, the least maximum over k
    stages of the first j blocks, by dynamic programming in O(K N^2). It takes any cost
    of a stage, so what the cuts themselves cost counts in full.

    Args:
        seconds: [N + 1, N + 1], at [i, j] the cost of a stage of the blocks i to j - 1,
            in any unit; read only if i < j.
        num_stages: K, at most the number of blocks N.

    Returns:
        K - 1 increasing positions.
    """
    num_blocks = len(seconds) - 1
    assert 1 <= num_stages <= num_blocks, (num_stages, num_blocks)
    i, j = np.ogrid[: num_blocks + 1, : num_blocks + 1]
    seconds = np.where(i < j, seconds, np.inf)
    best, begins = seconds[0], []
    for _ in range(num_stages - 1):
        slowest = np.maximum(best[:, None], seconds)
        begins.append(slowest.argmin(axis=0))
        best = slowest.min(axis=0)
    cuts, end = [], num_blocks
    for begin in reversed(begins):
        end = int(begin[end])
        cuts.append(end)
    return tuple(reversed(cuts))
