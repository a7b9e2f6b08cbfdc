"""Local heads: what gives a stage a loss of its own, so that it waits for no cotangent.

A head is a block from a stage's output to the network's kind of output. It is trained
with its stage, on the same labels, and is no part of the network.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from fdg_jax import losses
from fdg_jax.blocks import Run, split_network, trace_shapes

LocalHead = Callable[[Any, Any, nnx.Rngs], nnx.Module]
"""Makes a head, given a stage's output and the network's, both abstract."""


class Head(NamedTuple):
    """A head and its first values.

    Attributes:
        run: the head as what a stage is made of.
        params: its parameters.
        batch_stats: its other state.
    """

    run: Run
    params: Any
    batch_stats: Any


def make(
    local_head: LocalHead,
    x: Any,
    outputs: Any,
    label: Any,
    loss_fn: Callable,
    *,
    position: int,
    seed: int,
) -> Head:
    """Makes the head of a stage.

    Args:
        local_head: what makes the module.
        x: the stage's output, abstract.
        outputs: the network's output, abstract.
        label: labels of a batch, arrays or abstract.
        loss_fn: takes the head's output.
        position: a number that no block and no other head has; with the seed it tells
            the head's random numbers.
        seed: of its parameters.

    Raises:
        ValueError: it is no module, or its output does not suit the loss.
    """
    key = jax.random.fold_in(jax.random.key(seed), position)
    module = local_head(x, outputs, nnx.Rngs(key))
    (block,), params, batch_stats = split_network([module])
    block = dataclasses.replace(
        block, index=position, name=f"local head {position} ({type(module).__name__})"
    )
    *_, y = trace_shapes([block], params, batch_stats, x, "its stage gives")
    losses.check_loss(loss_fn, y, label)
    return Head(Run(block, 1), params[0], batch_stats[0])
