"""Nesterov's look-ahead as delay correction, with a discounted gradient.

Ajanthan, Ramasinghe, Zuo, Avraham, Long, "Nesterov Method for Asynchronous Pipeline
Parallel Optimization" (AsyncPP), ICML 2025, arXiv 2505.01099. The forward looks ahead
along the last step, by a momentum gamma close to 1, and a gradient that is s_k updates
late counts ``1 - gamma``::

    y_t     = w_t + gamma * (w_t - w_{t-1})          what the forward and backward see
    w_{t+1} = y_t - lr * (1 - gamma) * g             g at y_{t - s_k}

The discount is all that is changed of Nesterov's method. The equation is from notes on
the paper, and agrees with the authors' program. That runs Adam with Nesterov momentum:
``optax.nadamw(lr, b1=0.99)``, but that PyTorch's lets the momentum grow on the way.

**No engine needs to know.** The parameters that a stage holds *are* y, and then these
lines are ``optax.sgd(lr * (1 - gamma), momentum=gamma, nesterov=True)`` while the
learning rate is constant. So evaluation sees the look-ahead point.
"""

import optax

from fdg_jax.remedies.arguments import check_momentum
from fdg_jax.stage_optimizer import StageInfo

MOMENTUM = 0.99
"""The paper's gamma."""


def nesterov_lookahead(
    learning_rate: float | optax.Schedule, momentum: float = MOMENTUM
) -> optax.GradientTransformation:
    """Returns SGD that keeps its parameters at Nesterov's look-ahead point.

    The learning rate is applied before the momentum, so that a change of it does not
    rescale the step from w_{t-1} to w_t, and the two lines above hold for schedules.

    Args:
        learning_rate: a number, or a schedule from the update count to one.
        momentum: gamma, in [0, 1).

    Raises:
        ValueError: the momentum is out of its range.
    """
    check_momentum(momentum)
    discount = 1 - momentum
    if callable(learning_rate):

        def discounted(count):
            return discount * learning_rate(count)
    else:
        discounted = discount * learning_rate
    return optax.chain(
        optax.scale_by_learning_rate(discounted),
        optax.trace(decay=momentum, nesterov=True),
    )


def stage_momentum(
    stage: StageInfo, smallest: float = 0.9, largest: float = MOMENTUM
) -> float:
    """Returns a momentum that grows with the distance from the last stage.

    ``smallest + (K - 1 - k) / K * (largest - smallest)``, as in the authors' program
    with ``--adaptive_momentum``: for ``optimizer=lambda stage: nesterov_lookahead(
    learning_rate, stage_momentum(stage))``.

    Args:
        stage: of which k and K count.
        smallest: gamma of the last stage.
        largest: gamma that stage 0 would have of infinitely many.
    """
    distance = stage.num_stages - 1 - stage.index
    return smallest + distance / stage.num_stages * (largest - smallest)
