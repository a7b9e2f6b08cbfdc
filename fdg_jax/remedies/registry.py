"""Remedies for staleness by name, each with the optimizer that it is to help."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax

from fdg_jax import optimizers
from fdg_jax.remedies.delay_compensation import (
    ADAPTIVE_STRENGTH,
    CONSTANT_STRENGTH,
    compensate_delay,
    compensate_delay_adaptively,
)
from fdg_jax.remedies.nesterov_lookahead import nesterov_lookahead
from fdg_jax.remedies.pipemare import reschedule_learning_rate
from fdg_jax.remedies.spike_compensation import spike_compensated_sgd
from fdg_jax.remedies.staleness_aware import scale_by_staleness
from fdg_jax.remedies.weight_prediction import predict_weights
from fdg_jax.stage_optimizer import StageInfo
from fdg_jax.words import did_you_mean


class _Request(NamedTuple):
    """What a remedy is made of, for one stage.

    Attributes:
        optimizer: makes the plain optimizer; its argument ``sgd`` replaces momentum.
        staleness: s_k, in updates.
        strength: as given to ``create``.
        num_updates: as given to ``create``.
    """

    optimizer: Callable[..., optax.GradientTransformation]
    staleness: int
    strength: float | None
    num_updates: int | None


class _Remedy(NamedTuple):
    """How a remedy is made, and what it does not go with."""

    build: Callable[[_Request], optax.GradientTransformation]
    replaces_momentum: bool = False
    wants_the_forwards_weights: bool = False


def _none(request: _Request) -> optax.GradientTransformation:
    return request.optimizer()


def _staleness_aware(request: _Request) -> optax.GradientTransformation:
    return optax.chain(request.optimizer(), scale_by_staleness(request.staleness))


def _weight_prediction(request: _Request) -> optax.GradientTransformation:
    return predict_weights(request.optimizer(), request.staleness)


def _spike_compensation(request: _Request) -> optax.GradientTransformation:
    sgd = functools.partial(spike_compensated_sgd, staleness=request.staleness)
    return request.optimizer(sgd=sgd)


def _nesterov_lookahead(request: _Request) -> optax.GradientTransformation:
    return request.optimizer(sgd=nesterov_lookahead)


def _pipemare(request: _Request) -> optax.GradientTransformation:
    if request.num_updates is None:
        raise ValueError(
            "remedy 'pipemare' needs num_updates, after how many updates the learning "
            "rate is whole at every stage; got None; give it a number of at least 1"
        )
    rescheduled = reschedule_learning_rate(request.staleness, request.num_updates)
    return optax.chain(request.optimizer(), rescheduled)


def _dc_asgd(request: _Request) -> optax.GradientTransformation:
    strength = CONSTANT_STRENGTH if request.strength is None else request.strength
    compensated = compensate_delay(request.staleness, strength)
    return optax.chain(compensated, request.optimizer())


def _dc_asgd_adaptive(request: _Request) -> optax.GradientTransformation:
    strength = ADAPTIVE_STRENGTH if request.strength is None else request.strength
    compensated = compensate_delay_adaptively(request.staleness, strength)
    return optax.chain(compensated, request.optimizer())


_REMEDIES = {
    "none": _Remedy(_none),
    "staleness_aware": _Remedy(_staleness_aware),
    "weight_prediction": _Remedy(_weight_prediction, wants_the_forwards_weights=True),
    "spike_compensation": _Remedy(_spike_compensation, replaces_momentum=True),
    "nesterov_lookahead": _Remedy(_nesterov_lookahead, replaces_momentum=True),
    "pipemare": _Remedy(_pipemare),
    "dc_asgd": _Remedy(_dc_asgd, wants_the_forwards_weights=True),
    "dc_asgd_adaptive": _Remedy(_dc_asgd_adaptive, wants_the_forwards_weights=True),
}


def names() -> tuple[str, ...]:
    """Returns the names that ``create`` knows."""
    return tuple(_REMEDIES)


def create(
    name: str,
    optimizer: str,
    learning_rate: float | optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
    strength: float | None = None,
    num_updates: int | None = None,
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
        num_updates: T of "pipemare", which needs it.

    Returns:
        What ``Pipeline`` takes as its optimizer. It raises a ValueError for a stage
        whose backward or accumulation the remedy does not go with.

    Raises:
        ValueError: an unknown name, a number missing or out of its range, or things
            that do not go together.
    """
    _check(name, optimizer)
    build = functools.partial(
        optimizers.create,
        optimizer,
        learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )

    def for_stage(stage: StageInfo) -> optax.GradientTransformation:
        _check_stage(name, stage)
        request = _Request(build, stage.staleness, strength, num_updates)
        return _REMEDIES[name].build(request)

    for_stage(StageInfo(index=0, num_stages=1, staleness=0))  # refuses wrong numbers
    return for_stage


def _check(name: str, optimizer: str) -> None:
    if name not in _REMEDIES:
        raise ValueError(
            f"remedy must be one of {', '.join(_REMEDIES)}; got {name!r}"
            f"{did_you_mean(name, _REMEDIES)}"
        )
    if _REMEDIES[name].replaces_momentum and optimizer != "sgd":
        others = [n for n, r in _REMEDIES.items() if not r.replaces_momentum]
        raise ValueError(
            f"remedy {name!r} replaces the momentum of 'sgd'; got optimizer "
            f"{optimizer!r}; use 'sgd', or one of the remedies {', '.join(others)}"
        )


def _check_stage(name: str, stage: StageInfo) -> None:
    if _REMEDIES[name].wants_the_forwards_weights and stage.backward == "replay":
        others = [n for n, r in _REMEDIES.items() if not r.wants_the_forwards_weights]
        raise ValueError(
            f"remedy {name!r} wants gradients at the forward's weights; got backward "
            f"'replay', which takes today's; use 'stored' or 'recompute', or one of "
            f"the remedies {', '.join(others)}"
        )
    if name != "none" and stage.accumulation > 1:
        raise ValueError(
            f"a remedy counts staleness in updates, one per batch; got {name!r} with "
            f"accumulation {stage.accumulation}; use accumulation 1, or remedy 'none'"
        )
