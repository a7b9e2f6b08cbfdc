"""Spike compensation: what momentum would have done meanwhile, done at once.

Kosson, Chiley, Venigalla, Hestness, Koester, "Pipelined Backpropagation at Scale:
Training Large Models without Batches", MLSys 2021, arXiv 2003.11666. Had a gradient not
been D updates late, momentum m would have applied ``1 + m + ... + m**(D-1)`` of it by
now. The compensated step applies that much in one spike, and goes on as if in time::

    v <- m * v + g
    w <- w - lr * (a * v + b * g)          a = m**D,  b = (1 - m**D) / (1 - m)

D = 0 is SGD with momentum, D = 1 Nesterov's. The paper's text was not at hand; the
coefficients are checked by their purpose: from its arrival on, a late gradient has
moved the weights exactly as far as a timely one. Weight decay, which the paper's method
leaves open, is part of g here, as it is in ``optimizers.create``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.remedies.arguments import check_momentum, check_staleness


class SpikeCompensationState(NamedTuple):
    """State of ``scale_by_spike_compensation``.

    Attributes:
        velocity: v, like the parameters.
    """

    velocity: optax.Updates


def scale_by_spike_compensation(
    momentum: float, staleness: int
) -> optax.GradientTransformation:
    """Replaces ``optax.trace(momentum)`` where gradients are late.

    Args:
        momentum: m, in [0, 1).
        staleness: D = s_k, in updates.

    Returns:
        An Optax transform.

    Raises:
        ValueError: a number is out of its range.
    """
    check_momentum(momentum)
    check_staleness(staleness)
    a = momentum**staleness
    b = (1 - a) / (1 - momentum)

    def init(params):
        return SpikeCompensationState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        velocity = jax.tree.map(lambda g, v: g + momentum * v, updates, state.velocity)
        updates = jax.tree.map(lambda g, v: a * v + b * g, updates, velocity)
        return updates, SpikeCompensationState(velocity)

    return optax.GradientTransformation(init, update)


def spike_compensated_sgd(
    learning_rate: float | optax.Schedule, momentum: float, staleness: int
) -> optax.GradientTransformation:
    """Returns SGD with momentum and spike compensation.

    Args:
        learning_rate: a number, or a schedule from the update count to one.
        momentum: m, in [0, 1).
        staleness: D = s_k, in updates.

    Raises:
        ValueError: a number is out of its range.
    """
    return optax.chain(
        scale_by_spike_compensation(momentum, staleness),
        optax.scale_by_learning_rate(learning_rate),
    )
