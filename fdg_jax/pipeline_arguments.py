"""What a pipeline may be asked for: a wrong argument is one error, before any batch."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import optax

from fdg_jax import stage_optimizer
from fdg_jax.local_heads import LocalHead
from fdg_jax.schedule import Schedule
from fdg_jax.shrink import validate_shrink
from fdg_jax.stage import BACKWARD_MODES
from fdg_jax.stage_optimizer import Optimizer, StageInfo, optimizer_of


def check_values(
    *,
    network: Any,
    shrink: float | optax.Schedule,
    backward: str,
    accumulation: int,
    seed: int,
    channel_capacity: int,
    stall_timeout: float | None,
    loss_scale: float,
    skip_nonfinite: int,
) -> None:
    """Refuses arguments of ``Pipeline`` that are wrong whatever the others are.

    Args:
        network: as for ``Pipeline``.
        shrink: as for ``Pipeline``.
        backward: as for ``Pipeline``.
        accumulation: as for ``Pipeline``.
        seed: as for ``Pipeline``.
        channel_capacity: as for ``Pipeline``.
        stall_timeout: as for ``Pipeline``.
        loss_scale: as for ``Pipeline``.
        skip_nonfinite: as for ``Pipeline``.

    Raises:
        ValueError: one of them is not valid; says what would be.
    """
    validate_shrink(shrink)
    if backward not in BACKWARD_MODES:
        raise ValueError(
            f"backward must be one of {', '.join(BACKWARD_MODES)}; got {backward!r}"
        )
    if stall_timeout is not None and not stall_timeout > 0:
        raise ValueError(
            f"stall_timeout must be a positive number of seconds, or None; got "
            f"{stall_timeout}"
        )
    if not (0.0 < loss_scale < math.inf):
        raise ValueError(
            f"loss_scale must be a positive, finite number; got {loss_scale}; 1.0 "
            f"leaves gradients as they are, float16 wants 1024 or so"
        )
    if skip_nonfinite < 0:
        raise ValueError(
            f"skip_nonfinite must be 0 (none) or more batches in a row; got "
            f"{skip_nonfinite}"
        )
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1; got {accumulation}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32); got {seed}")
    if channel_capacity < 1:
        raise ValueError(f"channel_capacity must be at least 1; got {channel_capacity}")
    if not isinstance(network, Iterable):
        raise ValueError(
            f"a network is a sequence of nnx.Modules; got a {type(network).__name__}; "
            f"for nnx.Sequential pass its layers"
        )


def check_optimizer(
    optimizer: Optimizer,
    schedule: Schedule,
    accumulation: int,
    backward: str,
    cuts: Sequence[int] | None,
    params: Sequence[Any],
) -> None:
    """Asks for the optimizer of every stage, so that it refuses now what it refuses.

    Args:
        optimizer: an Optax transform, or a function from ``StageInfo`` to one.
        schedule: of the pipeline.
        accumulation: batches to an update.
        backward: a backward mode.
        cuts: where stages begin; None if that is not known yet.
        params: per block its parameters.

    Raises:
        ValueError: it is neither, or does not hold for one of the stages.
    """
    # If a stage's blocks are not known, any of them must do.
    bounds = None if cuts is None else [0, *cuts, len(params)]
    for k, staleness in enumerate(schedule.staleness):
        info = StageInfo(k, schedule.num_stages, staleness, accumulation, backward)
        transform = optimizer_of(optimizer, info)
        blocks = range(len(params)) if bounds is None else range(*bounds[k : k + 2])
        parts = [blocks]
        if bounds is None and schedule.num_stages > 1:
            parts.append(blocks[:1])  # a stage has a part of the network
        for part in parts:
            stage_optimizer.check_optimizer(transform, {i: params[i] for i in part}, k)


def check_schedule(
    schedule: Schedule,
    local_head: LocalHead | None,
    shrink: float | optax.Schedule,
    skip_nonfinite: int,
) -> None:
    """Refuses what does not go with a schedule, or with losses of the stages' own.

    Args:
        schedule: of the pipeline.
        local_head: as for ``Pipeline``.
        shrink: as for ``Pipeline``.
        skip_nonfinite: as for ``Pipeline``.

    Raises:
        ValueError: two of them contradict each other; says what to change.
    """
    if local_head is not None and any(schedule.staleness):
        raise ValueError(
            f"stages with a loss of their own wait for nothing, so their schedule is "
            f"'bp'; got {schedule}"
        )
    if local_head is not None and (callable(shrink) or shrink != 1.0):
        raise ValueError(
            f"shrinking is of cotangents, and stages with a loss of their own get "
            f"none; got shrink={shrink}; leave it at 1.0"
        )
    if skip_nonfinite and schedule.drain_every:
        raise ValueError(
            f"a batch that is left out shifts a stage's updates away from where "
            f"{schedule} drains; got skip_nonfinite={skip_nonfinite}; use 0, or "
            f"schedule 'bp' with the same accumulation"
        )


def check_replicas(replicas: int, num_stages: int, num_devices: int) -> None:
    """Refuses replicas of a network that is cut, or more of them than devices.

    Raises:
        ValueError: says what may be.
    """
    if replicas != 1 and (num_stages != 1 or not 1 <= replicas <= num_devices):
        raise ValueError(
            f"replicas share out the batches of a network that is not cut; got "
            f"replicas={replicas} with num_stages={num_stages} and {num_devices} "
            f"device(s); replicas may be 1 to the number of devices, with num_stages=1"
        )


def place(
    devices: Sequence[jax.Device], num_stages: int, requested: str, engine: str
) -> tuple[jax.Device, ...]:
    """Gives each stage a device; warns where stages that run apart must share one.

    Args:
        devices: in the order in which stages take them.
        num_stages: K.
        requested: the engine that was asked for.
        engine: the engine that it is.

    Returns:
        A device per stage.
    """
    if len(devices) < num_stages and requested in ("auto", "threads"):
        warnings.warn(
            f"{num_stages} stages share {len(devices)} device(s), so the {engine} "
            f"engine computes the same but gives no speed-up; on CPU set "
            f"jax_num_cpu_devices={num_stages} before JAX starts",
            stacklevel=3,
        )
    if engine == "fused":
        return (devices[0],) * num_stages
    shared = min(len(devices), num_stages)
    return tuple(devices[k * shared // num_stages] for k in range(num_stages))
