"""What a stage does with the gradient of a batch: accumulate, shrink, apply, or refuse.

The mean of M batches' gradients makes an update, each weighted by what its loss is a
mean over (``losses``): with weights w_1, ..., w_M the optimizer gets
``sum_m w_m g_m / sum_m w_m``. A gradient that is not finite is not used, nor is one
whose update would make a parameter that is not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdg_jax.reroll import reroll


class StageInfo(NamedTuple):
    """What an optimizer may want to know of the stage that it works for.

    Attributes:
        index: k, counted from 0.
        num_stages: K.
        staleness: s_k, batches between a batch's forward and its gradient's use; as
            many updates where each batch makes one.
        accumulation: M, batches that make an update.
        backward: "stored", "recompute" or "replay": which weights the backward uses.
    """

    index: int
    num_stages: int
    staleness: int
    accumulation: int = 1
    backward: str = "stored"


Optimizer = (
    optax.GradientTransformation | Callable[[StageInfo], optax.GradientTransformation]
)
"""An Optax transform, or a function that makes one for a stage."""


def optimizer_of(
    optimizer: Optimizer, stage: StageInfo
) -> optax.GradientTransformation:
    """Returns the Optax transform that an optimizer is for a stage.

    Raises:
        ValueError: it is none, or refuses the stage.
    """
    factory = optimizer
    while isinstance(factory, functools.partial):
        factory = factory.func
    if callable(factory) and factory.__module__.partition(".")[0] == "optax":
        name = getattr(factory, "__name__", type(factory).__name__)
        raise ValueError(
            f"an optimizer is what Optax's functions return; got the function {name} "
            f"itself; call it, as in optax.{name}(1e-3)"
        )
    transform = optimizer(stage) if callable(optimizer) else optimizer
    if isinstance(transform, optax.MultiSteps):
        raise ValueError(
            "an optimizer is an Optax transform; got an optax.MultiSteps; use "
            "Pipeline(accumulation=M), which also knows the staleness of the schedule"
        )
    if not isinstance(transform, optax.GradientTransformation):
        raise ValueError(
            f"an optimizer is an Optax transform, such as optax.sgd(0.1), or a "
            f"function from StageInfo to one; got {transform!r}"
        )
    return transform


def check_optimizer(
    transform: optax.GradientTransformation, params: Any, stage: int
) -> None:
    """Checks that a transform makes updates of gradients and parameters only.

    Args:
        transform: of a stage.
        params: of the stage, arrays or abstract.
        stage: its index.

    Raises:
        ValueError: it wants more, or fails on the stage's parameters.
    """

    def step(params):
        updates, _ = transform.update(params, transform.init(params), params)
        return optax.apply_updates(params, updates)

    try:
        jax.eval_shape(step, params)
    except Exception as error:
        raise ValueError(
            f"an optimizer must make its updates of gradients and parameters; that of "
            f"stage {stage} failed: {error}; the parameters are a dict from the "
            f"positions of the stage's blocks to those of each block, so masks and "
            f"labels are functions of such a dict, not trees; a transform that wants"
            f" the loss's value or the objective (reduce_on_plateau, polyak_sgd, "
            f"lbfgs) cannot have it: use a schedule of the learning rate"
        ) from error


class Gradient(NamedTuple):
    """The gradient of a batch, as a stage's backward gives it.

    Attributes:
        params: gradients of the parameters, unshrunk.
        is_finite: boolean scalar, whether it is, and the loss and the cotangent that
            it comes of were: ReLU makes zeros of a NaN, so it may only look well.
        weight: what the batch counts where several make an update; None if one does.
    """

    params: Any
    is_finite: jax.Array
    weight: jax.Array | None


class Progress(NamedTuple):
    """How far a stage has come with its updates.

    Attributes:
        next_gradient: uint32 scalar, number of the batch whose gradient is next.
        skipped: int32 scalar, how many batches were left out.
        in_a_row: int32 scalar, how many of the last ones were not finite.
        is_halted: boolean scalar: more in a row were not finite than may be left out,
            so the last of them and all after it are not used, and ``next_gradient``
            stays the number of its batch.
    """

    next_gradient: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    is_halted: jax.Array


class Accumulated(NamedTuple):
    """Gradients that wait for others to make an update with.

    Attributes:
        count: int32 scalar, how many there are.
        weight: their weights' sum.
        mean: their weighted mean, in JAX's widest floating-point type.
        opt_state: state of the optimizer.
    """

    count: jax.Array
    weight: jax.Array
    mean: Any
    opt_state: optax.OptState


_MOST_IN_A_ROW = 2**31 - 2  # which an int32 can exceed


class StageOptimizer:
    """An Optax transform with what every stage does before and after it."""

    def __init__(
        self,
        transform: optax.GradientTransformation,
        runs: Sequence[range] = (),
        *,
        accumulation: int,
        skip_nonfinite: int,
    ):
        """Wraps a transform.

        Args:
            transform: makes an update of a gradient.
            runs: positions of equal blocks, whose parameters come joined (``reroll``).
            accumulation: M; the mean of so many batches' gradients makes one update.
            skip_nonfinite: how many batches in a row are left out if their gradients
                are not finite; the stage halts at the next one.
        """

        def step(gradients, state, params):
            updates, state = transform.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self._init, self._step = reroll(transform.init, step, runs)
        self._accumulation = accumulation
        self._skip_nonfinite = min(skip_nonfinite, _MOST_IN_A_ROW)

    def init(self, params: Any) -> optax.OptState | Accumulated:
        """Returns the state before the first batch."""
        opt_state = self._init(params)
        if self._accumulation == 1:
            return opt_state
        widest = jnp.result_type(float)
        mean = optax.tree.zeros_like(params, dtype=widest)
        return Accumulated(
            jnp.zeros((), jnp.int32), jnp.zeros((), widest), mean, opt_state
        )

    def without_gathered(
        self, state: optax.OptState | Accumulated
    ) -> optax.OptState | Accumulated:
        """Returns the state without the gradients that wait for others."""
        if self._accumulation == 1:
            return state
        empty = optax.tree.zeros_like((state.count, state.weight, state.mean))
        return Accumulated(*empty, state.opt_state)

    def update(
        self, params: Any, state: Any, progress: Progress, gradient: Gradient
    ) -> tuple[Any, Any, Progress]:
        """Uses the gradient of a batch, if it is finite.

        Returns:
            The new parameters, state and progress.
        """
        # Jitted, so that it is traced once for both its uses.
        update = jax.jit(self._apply if self._accumulation == 1 else self._accumulate)
        new_params, _ = update(params, state, gradient)
        is_finite = gradient.is_finite & ~loses(params, new_params)
        is_used = is_finite & ~progress.is_halted
        # The new parameters are computed once to be looked at and once to be kept:
        # choosing between two sets of arrays would cost the memory of both.
        params, state = lax.cond(
            is_used, update, lambda *old: old[:2], params, state, gradient
        )
        in_a_row = jnp.where(is_finite, 0, progress.in_a_row + 1)
        is_halted = progress.is_halted | (in_a_row > self._skip_nonfinite)
        progress = Progress(
            next_gradient=progress.next_gradient + ~is_halted,
            skipped=progress.skipped + ~(is_halted | is_finite),
            in_a_row=in_a_row,
            is_halted=is_halted,
        )
        return params, state, progress

    def _apply(self, params, opt_state, gradient):
        return self._step(gradient.params, opt_state, params)

    def _accumulate(self, params, state, gradient):
        weight = state.weight + gradient.weight
        share = jnp.where(gradient.weight > 0, weight / gradient.weight, jnp.inf)
        mean = jax.tree.map(
            lambda m, g: m + (g - m) / share, state.mean, gradient.params
        )

        def add(params, opt_state, mean):
            return params, Accumulated(state.count + 1, weight, mean, opt_state)

        def make_update(params, opt_state, mean):
            whole = gradient._replace(params=optax.tree.cast_like(mean, params))
            params, opt_state = self._apply(params, opt_state, whole)
            return params, self.without_gathered(state._replace(opt_state=opt_state))

        is_complete = state.count == self._accumulation - 1
        return lax.cond(is_complete, make_update, add, params, state.opt_state, mean)


def all_finite(tree: Any) -> jax.Array:
    """Whether a pytree holds no NaN and no infinity."""
    return _all([jnp.isfinite(a) for (a,) in _joined(tree)])


def loses(old: Any, new: Any) -> jax.Array:
    """Whether numbers that were finite are not any more.

    Others may stay what they are: a mask of a block's own holds infinities.
    """
    pairs = _joined(old, new)
    return ~_all([jnp.isfinite(b) | ~jnp.isfinite(a) for a, b in pairs])


_SMALL = 2**16


def _joined(*trees: Any) -> list[tuple[jax.Array, ...]]:
    """The floating-point arrays of pytrees alike, side by side, small ones as one.

    XLA compiles a look at all of them sooner than one at each: it takes 15 s, not 17 s,
    for all functions of a ResNet-110 in four stages.
    """
    result, small = [], {}
    for arrays in zip(*map(jax.tree.leaves, trees), strict=True):
        if not jnp.issubdtype(arrays[0].dtype, jnp.inexact):
            continue
        if arrays[0].size >= _SMALL:
            result.append(arrays)
        else:
            small.setdefault(tuple(a.dtype for a in arrays), []).append(arrays)
    for group in small.values():
        columns = zip(*group, strict=True)
        result.append(tuple(jnp.concatenate([a.ravel() for a in c]) for c in columns))
    return result


def _all(conditions: list[jax.Array]) -> jax.Array:
    """Whether all elements of boolean arrays are true."""
    return (
        jnp.stack([a.all() for a in conditions]).all()
        if conditions
        else jnp.bool_(True)
    )
