"""Delay compensation: move a late gradient to today's weights, to first order.

Zheng, Meng, Wang, Chen, Yu, Ma, Liu, "Asynchronous Stochastic Gradient Descent with
Delay Compensation" (DC-ASGD), ICML 2017, arXiv 1609.08326. The gradient at today's
weights w is, with the Hessian H at the forward's weights w', about ``g + H (w - w')``;
the paper estimates H by lambda times the squares of g, element by element::

    g <- g + lambda * g * g * (w - w')                    constant, DC-ASGD-c
    m <- decay * m + (1 - decay) * g * g                  adaptive, DC-ASGD-a
    g <- g + strength / sqrt(m + 1e-7) * g * g * (w - w')

The paper's text was not at hand: (c) and its lambda = 0.04 are as in MXNet's DCASGD,
(a) with strength 2, decay 0.95 and the place of 1e-7 as in Multiverso's updater. There
are programs with ``|g|`` in place of ``g * g``. MXNet adds the weight decay to g before
it compensates; here, as a transform of its own, it comes after.

**No engine needs to know.** A gradient that is used after t updates belongs to a batch
that was forwarded after ``max(0, t - s_k)`` of them. So w' are the parameters that the
optimizer was called with s_k calls ago, and the first ones before that: a ring of s_k
parameters holds them. That is exact from the first update to the end of the drain, as
long as each call is one update: not with ``accumulation``, nor, for the s_k updates
after one, where a batch was left out (``skip_nonfinite``) or the pipeline was drained
and filled again; the ring then holds older weights than the forward had.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdg_jax.remedies.arguments import (
    check_params,
    check_staleness,
    check_strength,
)

CONSTANT_STRENGTH = 0.04
ADAPTIVE_STRENGTH = 2.0


class CompensateDelayState(NamedTuple):
    """State of ``compensate_delay`` and of ``compensate_delay_adaptively``.

    Attributes:
        ring: the last s_k parameters, each with a leading axis of length s_k.
        oldest: int32 scalar, where in it the oldest are.
        mean_square: of the gradients, a moving mean; None with a constant strength.
    """

    ring: optax.Params
    oldest: jax.Array
    mean_square: optax.Updates | None


def compensate_delay(
    staleness: int, strength: float = CONSTANT_STRENGTH
) -> optax.GradientTransformation:
    """Compensates gradients with a constant strength, DC-ASGD-c.

    Chain it first: the gradients are to be the network's.

    Args:
        staleness: s_k, in updates. 0 leaves gradients as they are.
        strength: lambda, at least 0.

    Returns:
        An Optax transform, which holds s_k times the parameters.

    Raises:
        ValueError: a number is out of its range.
    """
    check_strength(strength)

    def estimate(gradients, mean_square):
        return jax.tree.map(lambda g: strength * g * g, gradients), mean_square

    return _compensate(staleness, estimate, lambda params: None)


def compensate_delay_adaptively(
    staleness: int,
    strength: float = ADAPTIVE_STRENGTH,
    decay: float = 0.95,
    eps: float = 1e-7,
) -> optax.GradientTransformation:
    """Compensates gradients less where they are large, DC-ASGD-a.

    Chain it first: the gradients are to be the network's.

    Args:
        staleness: s_k, in updates. 0 leaves gradients as they are.
        strength: lambda_0, at least 0.
        decay: of the moving mean of squared gradients, in [0, 1).
        eps: added to that mean, positive.

    Returns:
        An Optax transform, which holds s_k + 1 times the parameters.

    Raises:
        ValueError: a number is out of its range.
    """
    check_strength(strength)
    if not (0.0 <= decay < 1.0 and eps > 0.0):
        raise ValueError(
            f"a moving mean of squares wants decay in [0, 1) and eps > 0; got "
            f"decay={decay}, eps={eps}"
        )

    def estimate(gradients, mean_square):
        mean_square = jax.tree.map(
            lambda g, m: decay * m + (1 - decay) * g * g, gradients, mean_square
        )
        hessian = jax.tree.map(
            lambda g, m: strength / jnp.sqrt(m + eps) * g * g, gradients, mean_square
        )
        return hessian, mean_square

    return _compensate(staleness, estimate, _zeros_like)


def _zeros_like(params):
    return jax.tree.map(jnp.zeros_like, params)


def _compensate(
    staleness: int,
    estimate: Callable[[Any, Any], tuple[Any, Any]],
    init_mean_square: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """``g + hessian * (w - w')``, by an estimate of the Hessian's diagonal.

    Args:
        staleness: s_k.
        estimate: from gradients and their mean square, the Hessian's diagonal and the
            new mean square.
        init_mean_square: the first mean square, of the parameters.
    """
    check_staleness(staleness)
    if staleness == 0:
        return optax.identity()

    def init(params):
        return CompensateDelayState(
            ring=jax.tree.map(
                lambda p: jnp.broadcast_to(p, (staleness, *p.shape)), params
            ),
            oldest=jnp.zeros((), jnp.int32),
            mean_square=init_mean_square(params),
        )

    def update(updates, state, params=None):
        check_params(params)
        slot = state.oldest
        hessian, mean_square = estimate(updates, state.mean_square)

        def compensate(g, h, p, ring):
            before = lax.dynamic_index_in_dim(ring, slot, keepdims=False)
            return g + h * (p - before).astype(g.dtype)

        def put(ring, p):
            return lax.dynamic_update_index_in_dim(ring, p, slot, 0)

        updates = jax.tree.map(compensate, updates, hessian, params, state.ring)
        ring = jax.tree.map(put, state.ring, params)
        slot = (slot + 1) % staleness
        return updates, CompensateDelayState(ring, slot, mean_square)

    return optax.GradientTransformation(init, update)
