"""Losses and metrics: functions of a network's outputs and a batch's labels.

Each returns a scalar, the mean over the examples of the batch, or a pair
``(sum, count)`` if it is a mean over something else, such as the tokens that a mask
leaves. Of pairs, sums are added to sums and counts to counts, over the batches of an
evaluation and over those that make an update together::

    scalar         sum_b size_b * value_b / sum_b size_b
    (sum, count)   sum_b sum_b / sum_b count_b
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdg_jax.words import describe

Metric = Callable[[Any, Any], Any]
"""``metric(outputs, label)`` returns a scalar mean, or ``(sum, count)``."""

RESERVED = ("loss", "batch", "nonfinite")
"""Names that no metric of the user's may have."""


class Total(NamedTuple):
    """A sum, and over how many it is."""

    sum: jax.Array
    count: jax.Array


def softmax_cross_entropy(outputs: jax.Array, label: jax.Array) -> jax.Array:
    """Mean cross-entropy of softmax(outputs) against integer labels.

    ``mean_i(logsumexp(outputs_i) - outputs_i[label_i])``, in float32 at least.

    Args:
        outputs: logits, [..., num_classes], any float type.
        label: classes, [...], integers in [0, num_classes). A label out of range
            makes the loss NaN, which stops a pipeline.

    Returns:
        The scalar mean over the batch.

    Raises:
        ValueError: there is one class only, or the labels have another shape.
    """
    _check_classes("softmax_cross_entropy", outputs, label)
    logits = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    # Indexing would count a negative label from the end.
    return jnp.where(_in_range(logits, label), losses, jnp.nan).mean()


def accuracy(outputs: jax.Array, label: jax.Array) -> Total:
    """Counts the labels at which the largest output is.

    Args:
        outputs: class scores, [..., num_classes].
        label: classes, [...], integers; one out of range, such as -100, is not counted.

    Returns:
        How many are right, and of how many; float32 scalars.

    Raises:
        ValueError: there is one class only, or the labels have another shape.
    """
    _check_classes("accuracy", outputs, label)
    in_range = _in_range(outputs, label)
    right = in_range & (outputs.argmax(-1) == label)
    return Total(right.sum(dtype=jnp.float32), in_range.sum(dtype=jnp.float32))


def _check_classes(name: str, outputs: jax.Array, label: jax.Array) -> None:
    if outputs.shape[:-1] != label.shape or outputs.shape[-1] < 2:
        raise ValueError(
            f"{name} wants outputs [..., num_classes] of two or more classes for "
            f"labels [...]; got {describe(outputs)} and {describe(label)}; one logit "
            f"is for optax.sigmoid_binary_cross_entropy and a threshold, in a loss and "
            f"a metric of yours"
        )


def _in_range(outputs: jax.Array, label: jax.Array) -> jax.Array:
    return (label >= 0) & (label < outputs.shape[-1])


def metrics_of(
    loss_fn: Callable, metrics: Mapping[str, Metric] | None
) -> dict[str, Metric]:
    """Returns the metrics that a pipeline computes beside its loss.

    Args:
        loss_fn: of the pipeline. Whether outputs are class scores no shape can tell,
            but ``softmax_cross_entropy`` takes nothing else.
        metrics: by name; None for the accuracy, if the loss is that one.

    Raises:
        ValueError: they are not functions by name, or a name is taken.
    """
    if metrics is None:
        return {"accuracy": accuracy} if loss_fn is softmax_cross_entropy else {}
    named = isinstance(metrics, Mapping) and all(isinstance(n, str) for n in metrics)
    if not (named and all(map(callable, metrics.values()))):
        raise ValueError(
            f"metrics is a dict from names to functions of outputs and label; got "
            f"{metrics!r}"
        )
    if taken := sorted(set(metrics) & set(RESERVED)):
        raise ValueError(
            f"a metric's name is none of {', '.join(RESERVED)}; got {taken[0]!r}; "
            f"choose another"
        )
    return dict(metrics)


def as_total(value: Any) -> Any:
    """Marks a pair that a loss or a metric returned; leaves a scalar as it is."""
    return Total(*value) if isinstance(value, tuple) else value


def count(value: Any) -> jax.Array | None:
    """Returns what a loss's pair is a mean over; None for a scalar."""
    if not isinstance(value, tuple):
        return None
    return jnp.asarray(value[1], jnp.result_type(float))


def num_examples(label: Any, x: Any) -> int | None:
    """Returns the size of a batch; None if neither tells.

    Args:
        label: of the batch; arrays [batch, ...], or none.
        x: what comes with it, in which there may be scalars.
    """
    return next((a.shape[0] for a in jax.tree.leaves((label, x)) if a.ndim), None)


def mean(value: Any, count: jax.Array | None = None) -> jax.Array:
    """Returns the mean that a loss's or a metric's value stands for.

    Args:
        value: a scalar, or ``(sum, count)``.
        count: in place of that of a pair.

    Returns:
        A scalar; of a pair with a count of 0 its sum, which is 0 too.
    """
    if not isinstance(value, tuple):
        return value
    count = value[1] if count is None else count
    return value[0] / jnp.where(count > 0, count, 1)


def check_loss(loss_fn: Callable, outputs: Any, label: Any) -> None:
    """Checks that a loss takes a network's outputs and gives what can be learned from.

    Args:
        loss_fn: ``loss_fn(outputs, label)``.
        outputs: abstract outputs of the network.
        label: labels, arrays or abstract.

    Raises:
        ValueError: it fails on them, gives something else, or has no gradient.
    """
    value = _call("loss_fn", loss_fn, outputs, label)
    loss = value[0] if isinstance(value, tuple) else value
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(
            f"loss_fn must return a floating-point number, since its gradient is "
            f"taken; got {describe(loss)}; return a mean, not a count"
        )
    if isinstance(value, tuple) and (
        _counts_outputs(loss_fn, outputs, label)
        or _has_gradient(lambda *given: loss_fn(*given)[1], outputs, label)
    ):
        raise ValueError(
            "of a pair (sum, count) that loss_fn returns, the count must not depend on "
            "the network's outputs, since it has no gradient; return the loss and give "
            "what else is to be reported as metrics={name: function}"
        )
    if not _has_gradient(lambda *given: mean(loss_fn(*given)), outputs, label):
        raise ValueError(
            f"loss_fn must have a gradient; its value does not depend on the network's "
            f"outputs, {describe(outputs)}, in a way that can be differentiated, so "
            f"nothing would be learned; look for argmax, comparisons, stop_gradient or "
            f"integers on the way"
        )


def check_metrics(metrics: Mapping[str, Metric], outputs: Any, label: Any) -> None:
    """Checks that metrics take a network's outputs and give what can be averaged.

    Raises:
        ValueError: one fails on them, or gives something else.
    """
    for name, metric in metrics.items():
        _call(f"metric {name!r}", metric, outputs, label)


def _call(name: str, function: Callable, outputs: Any, label: Any) -> Any:
    """Returns a function's abstract result, a scalar or a pair of scalars."""
    try:
        value = jax.eval_shape(function, outputs, label)
    except Exception as error:
        raise ValueError(
            f"{name} must take the network's outputs, {describe(outputs)}, and the "
            f"labels, {describe(label)}, but it failed: {error}"
        ) from error
    pair = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    if any(getattr(part, "shape", None) != () for part in pair):
        raise ValueError(
            f"{name} must return the scalar mean over the batch, or a pair of scalars "
            f"(sum, count); got {describe(value) or value!r}"
        )
    return value


def _has_gradient(function: Callable, outputs: Any, label: Any) -> bool:
    """Whether a gradient flows from a function's value to any of the outputs.

    In the program of the vjp, what is zero by its structure does not depend on the
    cotangent.
    """
    value = jax.eval_shape(function, outputs, label)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return False
    leaves, treedef = jax.tree.flatten(outputs)
    floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

    def gradient(leaves, label, cotangent):
        given = [
            a for a, is_floating in zip(leaves, floating, strict=True) if is_floating
        ]

        def of_floating(given):
            given = iter(given)
            pairs = zip(leaves, floating, strict=True)
            whole = [next(given) if is_floating else a for a, is_floating in pairs]
            return function(jax.tree.unflatten(treedef, whole), label)

        return jax.vjp(of_floating, given)[1](cotangent)

    program = jax.make_jaxpr(gradient)(leaves, label, value).jaxpr
    sources = [False] * (len(program.invars) - 1) + [True]
    return any(_reached(program, sources, through_loops=True))


def _counts_outputs(loss_fn: Callable, outputs: Any, label: Any) -> bool:
    """Whether the second of the two numbers depends on the outputs."""
    program = jax.make_jaxpr(loss_fn)(outputs, label).jaxpr
    num_outputs = len(jax.tree.leaves(outputs))
    sources = [i < num_outputs for i in range(len(program.invars))]
    return _reached(program, sources, through_loops=False)[1]


def _reached(program: Any, sources: Sequence[bool], through_loops: bool) -> list[bool]:
    """Which results of a jaxpr depend on which of its arguments.

    Args:
        program: a jaxpr.
        sources: per argument, whether it is looked at.
        through_loops: whether the results of a loop, a branch or a custom derivative,
            which are not looked into, depend on what goes in; it must err on the side
            that refuses nothing.

    Returns:
        Per result, whether it depends on any of these.
    """
    reached = {v for v, source in zip(program.invars, sources, strict=True) if source}

    def depends(variable):
        # Literals are no variables, and cannot be hashed.
        return not hasattr(variable, "val") and variable in reached

    for equation in program.eqns:
        inputs = [depends(v) for v in equation.invars]
        outputs = [any(inputs)] * len(equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            inner = equation.params["jaxpr"].jaxpr
            outputs = _reached(inner, inputs, through_loops)
        elif any("jaxpr" in key or key == "branches" for key in equation.params):
            outputs = [through_loops and any(inputs)] * len(equation.outvars)
        pairs = zip(equation.outvars, outputs, strict=True)
        reached.update(v for v, is_reached in pairs if is_reached)
    return [depends(v) for v in program.outvars]
