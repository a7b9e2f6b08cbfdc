"""Remedies for staleness by name, each with the optimizer that it is to help."""

import functools
from collections.abc import Callable

import optax

from fdg_jax import optimizers
from fdg_jax.remedies.delay_compensation import (
    compensate_delay,
    compensate_delay_adaptively,
)
from fdg_jax.remedies.nesterov_lookahead import nesterov_lookahead
from fdg_jax.remedies.pipemare import reschedule_learning_rate
from fdg_jax.remedies.spike_compensation import spike_compensated_sgd
from fdg_jax.remedies.staleness_aware import scale_by_staleness
from fdg_jax.remedies.weight_prediction import predict_weights
from fdg_jax.stage import StageInfo
from fdg_jax.words import did_you_mean

NAMES = (
    "none",
    "staleness_aware",
    "weight_prediction",
    "spike_compensation",
    "nesterov_lookahead",
    "pipemare",
    "dc_asgd",
    "dc_asgd_adaptive",
)
REPLACE_MOMENTUM = ("spike_compensation", "nesterov_lookahead")
WANT_THE_FORWARDS_WEIGHTS = ("weight_prediction", "dc_asgd", "dc_asgd_adaptive")


def names() -> tuple[str, ...]:
    """Returns the names that ``create`` knows."""
    return NAMES


def create(
    name: str,
    optimizer: str,
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    strength: float | None = None,
    num_updates: int = 1,
    backward: str = "stored",
    accumulation: int = 1,
) -> Callable[[StageInfo], optax.GradientTransformation]:
    """Returns a remedy together with an optimizer, for each stage its own.

    Shrinking comes before all of it; that is ``Pipeline(shrink=...)``. ::

        "none"                the optimizer
        "staleness_aware"     optimizer, then scale_by_staleness
        "weight_prediction"   predict_weights around the optimizer
        "spike_compensation"  spike_compensated_sgd in place of SGD's momentum
        "nesterov_lookahead"  nesterov_lookahead in place of SGD's momentum
        "pipemare"            optimizer, then reschedule_learning_rate
        "dc_asgd"             compensate_delay, then optimizer
        "dc_asgd_adaptive"    compensate_delay_adaptively, then optimizer

    Args:
        name: of the remedy.
        optimizer: "sgd" or "adam", as in ``optimizers.create``.
        learning_rate: a number, or a schedule from the update count to one.
        momentum: of "sgd"; gamma of "nesterov_lookahead", whose paper has 0.99.
        weight_decay: as in ``optimizers.create``.
        clip_norm: as in ``optimizers.create``; of a gradient compensated for its delay.
        strength: lambda of "dc_asgd", lambda_0 of "dc_asgd_adaptive"; None for the
            0.04 and 2.0 of their authors.
        num_updates: T of "pipemare".
        backward: the pipeline's.
        accumulation: the pipeline's.

    Returns:
        What ``Pipeline`` takes as its optimizer.

    Raises:
        ValueError: an unknown name, a number out of its range, or things that do not
            go together.
    """
    _check(name, optimizer, backward, accumulation)
    build = functools.partial(
        optimizers.create,
        optimizer,
        learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )
    given = () if strength is None else (strength,)

    def for_stage(stage: StageInfo) -> optax.GradientTransformation:
        staleness = stage.staleness
        match name:
            case "staleness_aware":
                return optax.chain(build(), scale_by_staleness(staleness))
            case "weight_prediction":
                return predict_weights(build(), staleness)
            case "spike_compensation":
                sgd = functools.partial(spike_compensated_sgd, staleness=staleness)
                return build(sgd=sgd)
            case "nesterov_lookahead":
                return build(sgd=nesterov_lookahead)
            case "pipemare":
                rescheduled = reschedule_learning_rate(staleness, num_updates)
                return optax.chain(build(), rescheduled)
            case "dc_asgd":
                return optax.chain(compensate_delay(staleness, *given), build())
            case "dc_asgd_adaptive":
                compensated = compensate_delay_adaptively(staleness, *given)
                return optax.chain(compensated, build())
        return build()

    for_stage(StageInfo(index=0, num_stages=1, staleness=0))  # refuses wrong numbers
    return for_stage


def _check(name: str, optimizer: str, backward: str, accumulation: int) -> None:
    if name not in NAMES:
        raise ValueError(
            f"remedy must be one of {', '.join(NAMES)}; got {name!r}"
            f"{did_you_mean(name, NAMES)}"
        )
    if name in REPLACE_MOMENTUM and optimizer != "sgd":
        others = [other for other in NAMES if other not in REPLACE_MOMENTUM]
        raise ValueError(
            f"remedy {name!r} replaces the momentum of 'sgd'; got optimizer "
            f"{optimizer!r}; use 'sgd', or one of the remedies {', '.join(others)}"
        )
    if name in WANT_THE_FORWARDS_WEIGHTS and backward == "replay":
        others = [other for other in NAMES if other not in WANT_THE_FORWARDS_WEIGHTS]
        raise ValueError(
            f"remedy {name!r} wants gradients at the forward's weights; got backward "
            f"'replay', which takes today's; use 'stored' or 'recompute', or one of "
            f"the remedies {', '.join(others)}"
        )
    if name != "none" and accumulation > 1:
        raise ValueError(
            f"a remedy counts staleness in updates, one per batch; got {name!r} with "
            f"accumulation {accumulation}; use accumulation 1, or remedy 'none'"
        )
