"""What a batch is: a dict with "image" and "label", as TFDS names them."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from fdg_jax.words import describe

Batch = dict[str, Any]
"""Pytrees of arrays, [batch, ...] each, under "image" and "label"."""


def own(values: Any) -> Any:
    """Copies NumPy arrays, which a device on the host may share and a user reuse."""
    return jax.tree.map(lambda a: a.copy() if isinstance(a, np.ndarray) else a, values)


def signature(values: Any) -> Hashable:
    """Returns what a compiled function depends on: structure, shapes and types."""
    leaves, treedef = jax.tree.flatten(values)
    return treedef, tuple((a.shape, np.dtype(a.dtype)) for a in leaves)


def batch_size(batch: Batch) -> int:
    """Returns the number of examples of a batch."""
    return jax.tree.leaves(batch["image"])[0].shape[0]


def check_batch(batch: Batch) -> None:
    """Checks that a batch is what a pipeline takes.

    Raises:
        ValueError: a key is missing, or an array is no array or of another length.
    """
    if not isinstance(batch, dict) or not {"image", "label"} <= batch.keys():
        got = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"a batch is a dict with 'image' and 'label'; got {got}")
    leaves = jax.tree.leaves((batch["image"], batch["label"]))
    for leaf in leaves:
        if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
            raise ValueError(
                f"'image' and 'label' must be NumPy or JAX arrays; got a "
                f"{type(leaf).__name__}"
            )
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
        raise ValueError(
            f"'image' and 'label' must have the same, non-empty leading axis; got "
            f"{describe(batch['image'])} and {describe(batch['label'])}"
        )
