"""A network: the sequence of blocks that partitioning cuts into stages."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from flax import nnx


class Network(nnx.Module, Sequence):
    """An ordered sequence of blocks; calling them in order is the forward pass.

    It is a Python sequence (`len`, indexing, slices as lists, `index`, `reversed`) and
    an `nnx.Module`, so `nnx.split`, `nnx.eval_shape`, `train()` and `eval()` apply.
    """

    def __init__(self, name: str, blocks: Iterable[Callable[[jax.Array], jax.Array]]):
        """Joins blocks into a network.

        Args:
          name: what the network is called; the paper's cuts are looked up under it.
          blocks: the pieces that are never cut, each called as `block(x)`.

        Raises:
          ValueError: if there is no block, or one of them cannot be called.
        """
        blocks = list(blocks)
        if not blocks:
            raise ValueError(
                f"Network {name!r} must have at least one block, got none; pass a "
                "sequence of nnx.Modules that are called one after the other."
            )
        for position, block in enumerate(blocks):
            if not callable(block):
                raise ValueError(
                    f"Every block of network {name!r} must be callable as block(x), "
                    f"got a {type(block).__name__} at position {position}; pass "
                    "nnx.Modules with a __call__ method."
                )
        self.name = name
        self.blocks = nnx.List(blocks)

    def __len__(self) -> int:
        """Returns the number of blocks."""
        return len(self.blocks)

    def __getitem__(self, index):
        """Returns the block at an integer, or the list of blocks at a slice."""
        return self.blocks[index if isinstance(index, slice) else operator.index(index)]

    def __iter__(self) -> Iterator[Callable[[jax.Array], jax.Array]]:
        """Iterates over the blocks in the order of the forward pass."""
        return iter(self.blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the last block's output for the first block's input `x`."""
        for block in self.blocks:
            x = block(x)
        return x


def count_parameters(network: nnx.Module) -> int:
    """Returns how many numbers the optimizer updates (BatchNorm statistics excluded).

    Args:
      network: any module; also an abstract one, from `nnx.eval_shape`.
    """
    return sum(
        math.prod(p.shape) for p in jax.tree.leaves(nnx.state(network, nnx.Param))
    )
