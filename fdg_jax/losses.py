"""Loss functions of the last stage: ``loss_fn(outputs, label) -> scalar mean``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fdg_jax.words import describe


def softmax_cross_entropy(outputs: jax.Array, label: jax.Array) -> jax.Array:
    """Mean cross-entropy of softmax(outputs) against integer labels.

    ``mean_i(logsumexp(outputs_i) - outputs_i[label_i])``, in float32 at least.

    Args:
        outputs: logits, [batch, num_classes], any float type.
        label: classes, [batch], integers in [0, num_classes). A label out of range
            makes the loss NaN, which stops a pipeline.

    Returns:
        The scalar mean over the batch.
    """
    logits = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    # Indexing would count a negative label from the end.
    in_range = (label >= 0) & (label < logits.shape[-1])
    return jnp.where(in_range, losses, jnp.nan).mean()


def accuracy(outputs: jax.Array, label: jax.Array) -> jax.Array:
    """Share of the batch whose largest output is at the label.

    Args:
        outputs: logits, [..., num_classes].
        label: classes, [...], integers.

    Returns:
        A float32 scalar in [0, 1].
    """
    return (outputs.argmax(-1) == label).mean(dtype=jnp.float32)


def is_classification(outputs: Any, label: Any) -> bool:
    """Whether outputs are scores [..., num_classes] for integer labels [...]."""
    return (
        isinstance(outputs, jax.Array)
        and isinstance(label, jax.Array)
        and jnp.issubdtype(label.dtype, jnp.integer)
        and outputs.shape[:-1] == label.shape
        and outputs.ndim == label.ndim + 1
    )


def check_loss(loss_fn: Callable, outputs: Any, label: Any) -> None:
    """Checks that a loss takes a network's outputs and gives a scalar.

    Args:
        loss_fn: ``loss_fn(outputs, label)``.
        outputs: abstract outputs of the network.
        label: labels, arrays or abstract.

    Raises:
        ValueError: it fails on them, or gives something else.
    """
    try:
        loss = jax.eval_shape(loss_fn, outputs, label)
    except Exception as error:
        raise ValueError(
            f"loss_fn must take the network's outputs, {describe(outputs)}, and the "
            f"labels, {describe(label)}, but it failed: {error}"
        ) from error
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != ():
        raise ValueError(
            f"loss_fn must return the scalar mean over the batch; got {describe(loss)}"
        )
