"""Linear weight prediction: forward with the weights that the gradient will meet.

Chen, Yang, Cheng, "Efficient and Robust Parallel DNN Training through Model Parallelism
on Multi-GPU Platform" (SpecTrain), arXiv 1809.02839, and Kosson, Chiley, Venigalla,
Hestness, Koester, "Pipelined Backpropagation at Scale: Training Large Models without
Batches", MLSys 2021, arXiv 2003.11666. A batch that stage k forwards after t updates
has its gradient used s_k updates later; if these all were like the last one, it would
then meet::

    p_t = w_t + s_k * u_{t-1}          u_t = w_{t+1} - w_t,  u_{-1} = 0

This is the weight-difference form. SpecTrain extrapolates along the velocity,
``p_t = w_t - s * lr * v``, which is the same for SGD with momentum while the learning
rate is constant. The form here fits every optimizer, as PipeOptim (Guan et al., arXiv
2312.00839) wants it too. SpecTrain counts s by a clock of its own, and predicts in the
backward also; here s is the stage's staleness, and the backward stays with the
forward's weights p. None of the papers' full texts was at hand; the equations are as
others implement and describe them.

**No engine needs to know.** The parameters that a stage holds *are* p; the optimizer's
state keeps u, from which w follows. So evaluation, checkpoints and ``Pipeline.network``
see the predicted weights, s_k updates ahead of ``actual_params``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.remedies.arguments import check_params, check_staleness


class PredictWeightsState(NamedTuple):
    """State of ``predict_weights``.

    Attributes:
        inner: state of the optimizer, which works on the actual weights.
        last_update: u_{t-1}, like the parameters; zeros at first.
    """

    inner: optax.OptState
    last_update: optax.Updates


def predict_weights(
    optimizer: optax.GradientTransformation, staleness: int
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer's parameters run ahead by its last update, s times.

    With p the parameters and w the actual weights::

        w  = p - s * u_prev
        u  = optimizer(g, w)
        p <- (w + u) + s * u

    Nothing may be chained after it: its last update is the one that is applied to w.

    Args:
        optimizer: turns gradients into updates of w, learning rate included.
        staleness: s_k, in updates. 0 leaves the optimizer as it is.

    Returns:
        An Optax transform, whose updates are those of p.

    Raises:
        ValueError: the staleness is negative.
    """
    check_staleness(staleness)
    optimizer = optax.with_extra_args_support(optimizer)
    if staleness == 0:
        return optimizer

    def init(params):
        return PredictWeightsState(
            inner=optimizer.init(params),
            last_update=jax.tree.map(jnp.zeros_like, params),
        )

    def update(updates, state, params=None, **extra_args):
        check_params(params)
        weights = actual_params(params, state, staleness)
        new, inner = optimizer.update(updates, state.inner, weights, **extra_args)
        updates = jax.tree.map(
            lambda u, last: u + staleness * (u - last), new, state.last_update
        )
        return updates, PredictWeightsState(inner, new)

    return optax.GradientTransformationExtraArgs(init, update)


def actual_params(
    params: optax.Params, state: PredictWeightsState, staleness: int
) -> optax.Params:
    """Returns the weights without the prediction, ``w = p - s * u_prev``.

    Args:
        params: p, what a stage of a pipeline holds.
        state: of ``predict_weights``.
        staleness: s_k, as it was given to ``predict_weights``.
    """
    return jax.tree.map(lambda p, u: p - staleness * u, params, state.last_update)
