"""The optimizer that every stage runs, and the learning rate that it follows.

A stage's n-th update uses the gradient of batch n, however late that came, so the
learning rate of a batch is the same at all stages: the one at its update count.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import optax

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class LearningRate:
    """A piecewise constant learning rate, as a function of the update count.

    Attributes:
        values: the learning rate of each piece, one more than there are boundaries.
        boundaries: the update counts, increasing, at which the next piece starts.
    """

    values: tuple[float, ...]
    boundaries: tuple[int, ...]

    def at(self, count: int) -> float:
        """Returns the learning rate of update ``count``, computed on the host."""
        return self.values[bisect.bisect_right(self.boundaries, count)]

    def schedule(self) -> optax.Schedule:
        """Returns the same function as an Optax schedule, to be compiled."""
        pieces = [optax.constant_schedule(value) for value in self.values]
        return optax.join_schedules(pieces, self.boundaries)


def learning_rate(
    initial: float,
    *,
    steps_per_epoch: int,
    accumulation: int = 1,
    milestones: Sequence[int] = (),
    decay: float = 0.1,
    warmup_epochs: int = 0,
    warmup_factor: float = 0.1,
) -> LearningRate:
    """Returns the learning rate of the paper: constant, times ``decay`` at milestones.

    ``initial * decay**(milestones passed)``, times ``warmup_factor`` in the first
    ``warmup_epochs`` epochs. This is the one place where epochs become update counts.

    Args:
        initial: the learning rate after the warm-up, positive.
        steps_per_epoch: batches in an epoch.
        accumulation: batches that make an update.
        milestones: epochs, increasing, counted from the start of training.
        decay: factor at each milestone, positive.
        warmup_epochs: epochs of warm-up; 0 for none.
        warmup_factor: factor during the warm-up, positive.

    Raises:
        ValueError: a number is not positive, or the milestones are not whole epochs
            that increase and come after the warm-up.
    """
    for name, value in (
        ("learning_rate", initial),
        ("learning_rate_decay", decay),
        ("warmup_factor", warmup_factor),
    ):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite; got {value}")
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs cannot be negative; got {warmup_epochs}")
    epochs = (warmup_epochs, *milestones)
    if not all(isinstance(epoch, int) for epoch in epochs) or any(
        late <= early for early, late in zip(epochs, milestones, strict=False)
    ):
        raise ValueError(
            "learning_rate_milestones must be whole epochs that increase and come "
            f"after the warm-up; got {tuple(milestones)} with warmup_epochs="
            f"{warmup_epochs}"
        )
    values = list(
        itertools.accumulate(milestones, lambda rate, _: rate * decay, initial=initial)
    )
    epochs = list(milestones)
    if warmup_epochs:
        values.insert(0, warmup_factor * initial)
        epochs.insert(0, warmup_epochs)
    # The update that an epoch's last batch takes part in belongs to that epoch.
    boundaries = [-(-epoch * steps_per_epoch // accumulation) for epoch in epochs]
    if not all(0 < value < math.inf for value in values):
        raise ValueError(
            f"the learning rate must stay positive and finite; with learning_rate="
            f"{initial} and learning_rate_decay={decay} it becomes {values[-1]}"
        )
    if boundaries and boundaries[-1] >= 2**31:
        raise ValueError(
            f"updates are counted up to 2**31; learning_rate_milestones="
            f"{tuple(milestones)} are beyond, with {steps_per_epoch} batches in an "
            f"epoch"
        )
    return LearningRate(tuple(values), tuple(boundaries))


def momentum_sgd(
    learning_rate: float | optax.Schedule, momentum: float
) -> optax.GradientTransformation:
    """Returns ``m <- momentum * m + g``, ``w <- w - lr * m``; no m without momentum."""
    return optax.sgd(learning_rate, momentum=momentum or None)


def create(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    sgd: Callable[..., optax.GradientTransformation] = momentum_sgd,
) -> optax.GradientTransformation:
    """Returns an optimizer by name.

    ``"sgd"`` is PyTorch's, with the decay inside the momentum:
    ``g <- g + weight_decay * w``, ``m <- momentum * m + g``, ``w <- w - lr * m``.
    ``"adam"`` decouples the decay (AdamW): ``w <- w - lr * (adam(g) + decay * w)``.

    Args:
        name: ``"sgd"`` or ``"adam"``.
        learning_rate: a number, or a schedule from the update count to one.
        momentum: of ``"sgd"``, in [0, 1).
        weight_decay: on every parameter, at least 0.
        clip_norm: of a longer gradient, before the decay is added:
            ``g <- g * clip_norm / |g|``, over all parameters of a stage; 0 for none.
        sgd: what "sgd" does with the decayed gradient; makes a transform from the
            learning rate and the momentum.

    Raises:
        ValueError: an unknown name, or a number out of its range.
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}"
        )
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum must lie in [0, 1); got {momentum}")
    if not (weight_decay >= 0.0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay cannot be negative; got {weight_decay}")
    if not (clip_norm >= 0.0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm must be 0 (none) or positive; got {clip_norm}")
    if name == "adam" and weight_decay:
        optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)
    elif name == "adam":
        optimizer = optax.adam(learning_rate)
    else:
        optimizer = optax.chain(
            optax.add_decayed_weights(weight_decay),
            sgd(learning_rate, momentum),
        )
    if clip_norm:
        return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)
    return optimizer
