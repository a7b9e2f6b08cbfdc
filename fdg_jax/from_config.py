"""From a config to its parts: the network, the optimizer, the pipeline."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from fdg_jax import data, losses, methods, models, optimizers, remedies
from fdg_jax.models.network import Network
from fdg_jax.pipeline import Pipeline
from fdg_jax.timeline import Timeline

PARAM_DTYPES = ("float32", "bfloat16")
DTYPES = (*PARAM_DTYPES, "float16")
FLOAT16_LOSS_SCALE = 1024.0
MOST_STAGES = 10_000  # no network has as many blocks; a schedule is made for each stage


def check_numbers(config: ml_collections.ConfigDict) -> None:
    """Refuses numbers that nothing else looks at.

    Raises:
        ValueError: a number is out of its range.
    """
    at_least_one = ("batch_size", "eval_batch_size", "num_epochs", "num_stages")
    at_least_one += ("log_every_steps", "eval_every_epochs", "snapshots_kept")
    at_least_one += ("remedy_epochs",)
    for name in at_least_one:
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1; got {config[name]}")
    if config.num_stages > MOST_STAGES:
        raise ValueError(
            f"num_stages must be at most {MOST_STAGES}, and the number of blocks; got "
            f"{config.num_stages}"
        )
    for name in ("snapshot_every_steps", "snapshot_every_minutes"):
        if not 0 <= config[name] < float("inf"):
            raise ValueError(f"{name} must be 0 (never) or more; got {config[name]}")
    for name in ("stop_seconds", "stall_timeout"):
        if not 0 < config[name] <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"{name} must be positive, and no more seconds than can be waited, "
                f"{threading.TIMEOUT_MAX:.0f}; got {config[name]}"
            )
    if not 0 <= config.skip_nonfinite < 2**31:
        raise ValueError(
            f"skip_nonfinite must be 0 (none) or more batches in a row, below 2**31; "
            f"got {config.skip_nonfinite}"
        )
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32); got {config.seed}")


def method_arguments(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns what a config's method sets, as arguments of ``Pipeline``.

    Raises:
        ValueError: there is no such method, or it does not take the config's values.
    """
    arguments = methods.get(config.method).arguments(
        config.num_stages,
        schedule=config.schedule,
        backward=config.backward,
        accumulation=config.accumulation,
        shrink=config.shrink,
    )
    parts = arguments["accumulation"] * arguments["replicas"]
    if config.batch_size % parts:
        raise ValueError(
            f"method {config.method!r} cuts a batch into {parts} equal parts; got "
            f"batch_size={config.batch_size}, which is no multiple; choose one, or "
            f"another accumulation or num_stages"
        )
    return arguments


def piece_size(config: ml_collections.ConfigDict) -> int:
    """Returns the images of a pipeline's batch, ``accumulation`` of which make one."""
    return config.batch_size // method_arguments(config)["accumulation"]


def learning_rate(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optimizers.LearningRate:
    """Returns the learning rate by update count.

    Args:
        config: as in configs/default.py.
        steps_per_epoch: batches in an epoch, as the pipeline takes them.

    Raises:
        ValueError: a number is wrong.
    """
    return optimizers.learning_rate(
        config.learning_rate,
        steps_per_epoch=steps_per_epoch,
        accumulation=method_arguments(config)["accumulation"],
        milestones=config.learning_rate_milestones,
        decay=config.learning_rate_decay,
        warmup_epochs=config.warmup_epochs,
        warmup_factor=config.warmup_factor,
    )


def num_train(config: ml_collections.ConfigDict) -> int:
    """Returns how many training images there are in an epoch, loading none.

    Raises:
        ValueError: there is no such data set, or it has fewer than are asked for.
    """
    available = data.spec(config.dataset).num_train
    return data.resolve_num_train(config.dataset, available, config.num_train)


def updates_per_epoch(config: ml_collections.ConfigDict) -> int:
    """Returns how many updates an epoch has: as many with every method.

    Raises:
        ValueError: there are not enough images for one.
    """
    return data.steps_per_epoch(config.dataset, num_train(config), config.batch_size)


def steps_per_epoch(config: ml_collections.ConfigDict) -> int:
    """Returns how many batches the pipeline takes in an epoch: those of whole updates.

    Raises:
        ValueError: there are not enough images for an update.
    """
    return updates_per_epoch(config) * method_arguments(config)["accumulation"]


def images_per_epoch(config: ml_collections.ConfigDict) -> int:
    """Returns how many images are trained on in an epoch.

    Raises:
        ValueError: there are not enough images for an update.
    """
    return updates_per_epoch(config) * config.batch_size


def load_data(config: ml_collections.ConfigDict) -> data.Dataset:
    """Returns the data set, with as many training images as the config asks for.

    Raises:
        ValueError: it cannot be had.
    """
    return data.take(data.load(config.dataset, config.data_dir), config.num_train)


def create_network(config: ml_collections.ConfigDict) -> Network:
    """Returns the network as its initialisation makes it.

    Raises:
        ValueError: a name or a number is wrong.
    """
    spec = data.spec(config.dataset)
    return models.create(
        config.network,
        num_classes=spec.num_classes,
        in_channels=spec.image_shape[-1],
        dropout_rate=config.dropout_rate,
        init=config.init,
        dtype=_dtype("dtype", config.dtype),
        param_dtype=_dtype("param_dtype", config.param_dtype, PARAM_DTYPES),
        seed=config.seed,
    )


def create_pipeline(
    config: ml_collections.ConfigDict,
    learning_rate: optimizers.LearningRate,
    *,
    cuts: str | Sequence[int],
    network: Network | None = None,
    timeline: Timeline | None = None,
    **overrides: Any,
) -> Pipeline:
    """Returns the network with its optimizer, to be cut.

    Args:
        config: as in configs/default.py.
        learning_rate: as ``learning_rate`` returns it.
        cuts: in place of the config's.
        network: to start from; None for a new one.
        timeline: what records it.
        **overrides: of the arguments of ``Pipeline`` that the config says.

    Raises:
        ValueError: a name or a number is wrong.
    """
    arguments = {"engine": config.engine, **method_arguments(config), **overrides}
    return Pipeline(
        create_network(config) if network is None else network,
        loss_fn=losses.softmax_cross_entropy,
        optimizer=_optimizer(config, learning_rate),
        cuts=() if arguments["num_stages"] == 1 else cuts,
        **arguments,
        seed=config.seed,
        timeline=timeline,
        stall_timeout=config.stall_timeout,
        loss_scale=_loss_scale(config),
        skip_nonfinite=config.skip_nonfinite,
    )


def example_batch(config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a pipeline's training batch."""
    shape = (piece_size(config), *data.spec(config.dataset).image_shape)
    return {
        "image": jax.ShapeDtypeStruct(shape, _dtype("dtype", config.dtype)),
        "label": jax.ShapeDtypeStruct(shape[:1], np.int32),
    }


def _optimizer(
    config: ml_collections.ConfigDict, learning_rate: optimizers.LearningRate
) -> Callable:
    return remedies.create(
        config.remedy,
        config.optimizer,
        learning_rate.schedule(),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        strength=config.remedy_strength,
        num_updates=config.remedy_epochs * updates_per_epoch(config),
    )


def _loss_scale(config: ml_collections.ConfigDict) -> float:
    if config.loss_scale == 0.0:
        return FLOAT16_LOSS_SCALE if config.dtype == "float16" else 1.0
    return config.loss_scale


def _dtype(name: str, value: str, valid: Sequence[str] = DTYPES) -> np.dtype:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}; got {value!r}")
    return jnp.dtype(value)
