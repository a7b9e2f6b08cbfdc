"""From a name to a network: which names there are, and how parameters are drawn."""

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.models import resnet, wide_resnet
from fdg_jax.models.layers import Options
from fdg_jax.models.network import Network
from fdg_jax.words import did_you_mean


def names() -> tuple[str, ...]:
    """Returns the names of the paper's networks.

    `create` also takes every other depth and width of the two families: "resnet{6n+2}"
    and "wrn{6n+4}_{width}".
    """
    return (
        *(f"resnet{depth}" for depth in (20, 56, 110, 1202, 18, 50, 101)),
        "wrn28_10",
    )


def _find_layout(name: str) -> Callable[[int, int], list[tuple]]:
    """Returns the function of (in_channels, num_classes) that lists name's blocks."""
    number = "([1-9][0-9]*)"
    if match := re.fullmatch(f"resnet{number}", name):
        depth = int(match[1])
        if resnet.is_valid_depth(depth):
            return functools.partial(resnet.layout, depth)
    if match := re.fullmatch(f"wrn{number}_{number}", name):
        depth, width = map(int, match.groups())
        if wide_resnet.is_valid_depth(depth):
            return functools.partial(wide_resnet.layout, depth, width)
    raise ValueError(
        f"Unknown network {name!r}: valid are 'resnet<depth>' of depth 6n+2 (n >= 1), "
        "18 or 101, and 'wrn<depth>_<width>' of depth 6n+4 (n >= 1), such as "
        f"{', '.join(names())}{did_you_mean(name, names())}"
    )


@functools.partial(jax.jit, static_argnames=("block", "options"))
def _initialize(key, *, block, options):
    """Builds one block. Compiled once per kind of block, however often it occurs."""
    constructor, *arguments = block
    return nnx.split(constructor(*arguments, options=options, rngs=nnx.Rngs(key)))


def create(
    name: str,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    dropout_rate: float = 0.0,
    init: str = "torch",
    dtype: jax.typing.DTypeLike = jnp.float32,
    param_dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
) -> Network:
    """Creates a network with freshly drawn parameters, in training mode.

    A block's parameters depend on the seed, the block and its position only, so they
    are the same however the network is cut.

    Args:
      name: "resnet20", "resnet50", "wrn28_10", ...; see `names`.
      num_classes: number of logits.
      in_channels: channels of the images; the network takes [batch, height, width,
        in_channels] and is made for 32x32 pixels, but any size will do.
      dropout_rate: probability that dropout zeroes an element (wide ResNets, inside
        each block) or a whole channel of an image (ResNets, after each block).
      init: "torch", uniform within +-1/sqrt(fan_in), or "he_normal".
      dtype: the type that layers compute in; logits are at least float32.
      param_dtype: the type of parameters; BatchNorm statistics are at least float32.
      seed: of the parameters' randomness (in a pipeline, its own seed decides the
        dropout masks).

    Returns:
      A `Network` of [stem, block 1, ..., block N, head].

    Raises:
      ValueError: if the name is unknown, or another argument is outside its range.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}.")
    layout = _find_layout(name)(in_channels, num_classes)
    options = Options(dropout_rate, init, dtype, param_dtype)
    key = jax.random.key(seed)
    blocks = (
        nnx.merge(
            *_initialize(
                jax.random.fold_in(key, position), block=block, options=options
            )
        )
        for position, block in enumerate(layout)
    )
    return Network(name, blocks)
