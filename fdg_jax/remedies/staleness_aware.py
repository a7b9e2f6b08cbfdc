"""Staleness-aware SGD: the learning rate over the staleness.

Zhang, Gupta, Lian, Liu, "Staleness-aware Async-SGD for Distributed Deep Learning",
IJCAI 2016, arXiv 1511.05950: a gradient that is tau updates old is applied with the
learning rate ``lr / tau``. Here stage k's gradient is always ``s_k`` updates old::

    u <- u / max(1, s_k)          u: the update, learning rate included

The paper divides by tau only where there is any staleness; that tau = 0 leaves the
learning rate alone is our reading of it, and so tau = 0 and tau = 1 are the same.
"""

import optax

from fdg_jax.remedies.arguments import check_staleness


def scale_by_staleness(staleness: int) -> optax.GradientTransformation:
    """Divides updates by the staleness.

    Chain it last. It is the learning rate that shrinks, weight decay included; before
    an optimizer such as Adam, which normalizes gradients, it would do nothing.

    Args:
        staleness: s_k, in updates.

    Returns:
        An Optax transform.

    Raises:
        ValueError: the staleness is negative.
    """
    check_staleness(staleness)
    return optax.scale(1.0 / max(1, staleness))
