"""Gradient shrinking, FDG's remedy for staleness, as an Optax transform.

FDG multiplies the cotangent by beta each time it crosses a cut. The backward pass is
linear in its cotangent, so this equals scaling the gradient of stage k by
``beta ** (K - 1 - k)``, which is what the transform here does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class ShrinkGradientsState(NamedTuple):
    """State of ``shrink_gradients``.

    Attributes:
        count: int32 scalar, the number of updates that the stage has applied.
    """

    count: jax.Array


def shrink_gradients(
    shrink: float | optax.Schedule, power: int
) -> optax.GradientTransformation:
    """Scales gradients by ``shrink ** power``.

    ``g <- beta ** (K - 1 - k) * g`` for stage k of K (arXiv 1906.09108, section on
    gradient shrinking). Chain it before everything else: weight decay is not shrunk.

    Args:
        shrink: beta, in (0, 1], or an Optax schedule from the stage's update count to
            beta.
        power: the number of cuts that the cotangent has crossed, ``K - 1 - k``.

    Returns:
        An Optax transform.

    Raises:
        ValueError: beta is outside (0, 1], or the power is negative.
    """
    validate_shrink(shrink)
    if power < 0:
        raise ValueError(f"the power of shrink cannot be negative; got {power}")

    def init(params):
        del params
        return ShrinkGradientsState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        beta = shrink(state.count) if callable(shrink) else shrink
        factor = beta**power
        updates = jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), updates)
        return updates, ShrinkGradientsState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def validate_shrink(shrink: float | optax.Schedule) -> None:
    """Checks that a constant beta lies in (0, 1]; a schedule is taken at its word.

    Raises:
        ValueError: otherwise.
    """
    if callable(shrink):
        return
    if not (isinstance(shrink, (int, float)) and 0.0 < shrink <= 1.0):
        raise ValueError(
            f"shrink (beta) must be a number in (0, 1]; got {shrink!r}; 1.0 leaves "
            f"gradients as they are, the paper uses 0.2 to 0.8"
        )
