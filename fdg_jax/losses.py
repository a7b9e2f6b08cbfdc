"""Loss functions of the last stage: ``loss_fn(outputs, label) -> scalar mean``."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


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
