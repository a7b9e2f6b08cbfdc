"""Back-propagation in JAX, compiled whole: forward, loss, backward and optimizer.

``bp`` is the fastest that the library's layers give on one device; ``bp_xla`` is the
same program with the convolution, BatchNorm and ReLU of XLA, Flax and JAX.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fdg_jax as fdg
from benchmarks import task as tasks
from fdg_jax import optimizers
from fdg_jax.blocks import Block, split_network
from fdg_jax.models import layers, resnet, wide_resnet


class State(NamedTuple):
    """What a step carries on: per block its values, and the optimizer's state."""

    params: list
    batch_stats: list
    opt_state: optax.OptState


def create_network(task: tasks.Task) -> fdg.models.Network:
    """Returns the task's network, freshly drawn."""
    return fdg.models.create(
        task.network, num_classes=tasks.NUM_CLASSES, dtype=jnp.dtype(task.dtype)
    )


def create_optimizer() -> optax.GradientTransformation:
    """Returns the optimizer of all methods, PyTorch's SGD."""
    return optimizers.create(
        "sgd",
        tasks.LEARNING_RATE,
        momentum=tasks.MOMENTUM,
        weight_decay=tasks.WEIGHT_DECAY,
    )


def create_batch(task: tasks.Task) -> dict[str, Any]:
    """Returns the task's batch on the host, images in the task's type."""
    batch = tasks.random_batch(task.batch_size)
    return batch | {"image": batch["image"].astype(jnp.dtype(task.dtype))}


def make_step(
    blocks: list[Block],
    optimizer: optax.GradientTransformation,
    average: Callable[[Any], Any] = lambda values: values,
) -> Callable:
    """Returns ``step(state, batch) -> (state, loss)``, not yet compiled.

    Args:
        blocks: the network.
        optimizer: applied to the whole network's gradients.
        average: averages loss, statistics and gradients over devices.
    """

    def objective(params, batch_stats, batch):
        x, new_stats = batch["image"], []
        for block, p, s in zip(blocks, params, batch_stats, strict=True):
            x, s = block.apply(p, s, x, train=True)
            new_stats.append(s)
        return fdg.softmax_cross_entropy(x, batch["label"]), new_stats

    def step(state, batch):
        results = jax.value_and_grad(objective, has_aux=True)(
            state.params, state.batch_stats, batch
        )
        (loss, batch_stats), grads = average(results)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state), loss

    return step


def init_state(
    params: list,
    batch_stats: list,
    optimizer: optax.GradientTransformation,
    sharding: jax.Device | jax.sharding.Sharding,
) -> State:
    """Returns a fresh state, placed, whose arrays a step may take over."""
    params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
    state = State(params, batch_stats, jax.jit(optimizer.init)(params))
    return jax.device_put(state, sharding)


class BackPropagation:
    """Back-propagation on the first device; see the README for a CPU's cores."""

    _tracing = contextlib.nullcontext

    def __init__(self, task: tasks.Task):
        """Draws the network and puts the batch on the device."""
        self._devices = jax.devices()[:1]
        (device,) = self._devices
        optimizer = create_optimizer()
        blocks, params, batch_stats = split_network(create_network(task))
        self._state = init_state(params, batch_stats, optimizer, device)
        self._batch = jax.device_put(create_batch(task), device)
        self._step = jax.jit(make_step(blocks, optimizer), donate_argnums=0)

    def warm_up(self) -> float:
        """Compiles the step and runs it twice, the second time on its own results."""

        def step():
            self.run(1)
            self.synchronize()

        with self._tracing():
            return first_less_later(step)

    def run(self, num_batches: int) -> None:
        """Dispatches steps; the state on the device orders them."""
        for _ in range(num_batches):
            self._state, _ = self._step(self._state, self._batch)

    def synchronize(self) -> None:
        """Waits for the last state."""
        jax.block_until_ready(self._state)

    def probe(self) -> dict:
        """Nothing to add."""
        return {}

    def peak_device_mib(self) -> float | None:
        """Returns the device's peak memory, the warm-up included."""
        return peak_mib(self._devices)

    def report(self) -> dict:
        """Returns the devices."""
        return describe_devices(self._devices)

    def close(self) -> None:
        """Nothing is left running."""


class PlainBackPropagation(BackPropagation):
    """Back-propagation with the layers as XLA, Flax and JAX have them."""

    def _tracing(self) -> contextlib.AbstractContextManager:
        return plain_layers()


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Whatever is traced inside has layers without gradients of our own."""
    with (
        mock.patch.object(resnet, "relu", nnx.relu),
        mock.patch.object(wide_resnet, "relu", nnx.relu),
        mock.patch.object(layers, "convolve", _convolve),
        mock.patch.object(layers.BatchNorm, "__call__", nnx.BatchNorm.__call__),
    ):
        yield


def _convolve(x, kernel, stride):
    padding = [((size - 1) // 2,) * 2 for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def first_less_later(call: Callable[[], Any]) -> float:
    """Returns the seconds of a first call, which compiles, less those of a second."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def describe_devices(devices: list[jax.Device]) -> dict:
    """Returns what a report says of the devices."""
    kinds = [(d.platform, d.device_kind) for d in devices]
    words = [
        f"{len(list(group))} x {platform} ({kind})"
        for (platform, kind), group in itertools.groupby(kinds)
    ]
    return {"device": f"JAX, {', '.join(words)}"}


def peak_mib(devices: list[jax.Device]) -> float | None:
    """Returns the devices' peak memory since JAX started, in MiB; None if unknown.

    A CPU device keeps no account of its memory; its process has one.
    """
    stats = [device.memory_stats() for device in dict.fromkeys(devices)]
    peaks = [s.get("peak_bytes_in_use") for s in stats if s]
    return sum(peaks) / 2**20 if peaks and None not in peaks else None
