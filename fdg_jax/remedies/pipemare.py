"""PipeMare's rescheduled learning rate: small where gradients are late, at first.

Yang, Zhang, Li, Re, Aberger, De Sa, "PipeMare: Asynchronous Pipeline Parallel DNN
Training", MLSys 2021, arXiv 1910.05124, technique T1. Stage k's learning rate starts at
``lr / tau_k`` and has come back to lr after T updates::

    u <- u / tau_k ** (1 - min(t / T, 1))          tau_k = s_k + 1

The paper's text was not at hand; the equation is that of "PipeMare type LR correction"
in the program of AsyncPP (arXiv 2505.01099), which has ``tau_k = s_k`` and leaves out
the last stage. PipeMare counts the update itself as well, ``tau = 2 (K-1-k) + 1`` with
one micro-batch per update: that is s_k + 1 for the schedule "paper", hence the choice.
Its other techniques are not here: T2 corrects the weights of the backward, which with
``backward="stored"`` are right anyway, and T3 begins without delay, as
``schedule="bp"`` trains.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.remedies.arguments import check_staleness


class RescheduleState(NamedTuple):
    """State of ``reschedule_learning_rate``.

    Attributes:
        count: int32 scalar, t, the number of updates that the stage has applied.
    """

    count: jax.Array


def reschedule_learning_rate(
    staleness: int, num_updates: int
) -> optax.GradientTransformation:
    """Divides updates by the delay, less and less.

    Chain it last: it is the learning rate that is divided.

    Args:
        staleness: s_k, in updates. 0 leaves updates as they are.
        num_updates: T, after how many of them nothing is divided any more.

    Returns:
        An Optax transform.

    Raises:
        ValueError: a number is out of its range.
    """
    check_staleness(staleness)
    if num_updates < 1:
        raise ValueError(
            f"the learning rate is rescheduled for at least 1 update; got {num_updates}"
        )
    if staleness == 0:
        return optax.identity()

    def init(params):
        del params
        return RescheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params

        def scale(u):
            dtype = jnp.promote_types(u.dtype, jnp.float32)
            progress = jnp.minimum(state.count.astype(dtype) / num_updates, 1)
            return u * ((staleness + 1.0) ** (progress - 1)).astype(u.dtype)

        updates = jax.tree.map(scale, updates)
        return updates, RescheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
