"""Words from and for users: near misses, numbers, shapes of arrays, tables."""

import ast
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import jax


def did_you_mean(word: object, words: Iterable[str]) -> str:
    """Returns ``"; did you mean 'threads'?"`` for a near miss of a word, else ``""``.

    Args:
        word: what the user wrote.
        words: the valid words.
    """
    nearest = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def parse_integers(text: object) -> tuple[int, ...]:
    """Reads ``"4,7"``, ``"(4, 7)"``, ``"[4,7]"`` or a single integer.

    Raises:
        ValueError: it is none of these.
    """
    try:
        value = ast.literal_eval(str(text))
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"{text!r} is not a list of integers") from error
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(type(number) is int for number in values):
        raise ValueError(f"{text!r} is not a list of integers")
    return values


def describe(x: Any) -> str:
    """Formats a pytree of arrays by type and shape, as in ``float32[8,32,32,16]``."""
    arrays = [f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in jax.tree.leaves(x)]
    return ", ".join(arrays) or "no arrays"


def first_batches(counts: Sequence[int]) -> str:
    """Names the first batches, as many as each stage has used."""
    if len(set(counts)) == 1:
        return f"the first {counts[0]} batches"
    return f"the first {', '.join(map(str, counts))} batches by stage"


def describe_positions(positions: Sequence[int]) -> str:
    """Formats increasing integers as in ``1, 3-5``."""
    spans = []
    for position in positions:
        if spans and position == spans[-1][-1] + 1:
            spans[-1] = (spans[-1][0], position)
        else:
            spans.append((position,))
    return ", ".join("-".join(map(str, span)) for span in spans)


def path_name(path: Sequence[Any]) -> str:
    """Joins a path of ``jax.tree_util`` to a name, such as ``0/conv/kernel``."""
    keys = (
        getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))
        for key in path
    )
    return "/".join(map(str, keys))


def tabulate(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows of cells, all of one length, as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
