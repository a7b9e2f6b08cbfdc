"""How long each stage computes for one batch, apart from the pipeline.

*Alone*, a stage has the machine to itself. *Side by side*, all stages compute at once
and never hand anything over, as in a pipeline whose channels cost nothing. *Share*, on
CPU: a stage is alone, but its process may only use its share of the cores.

A CPU stage that waits lends its cores to the others, so the least tick is estimated as
all stages' work, each on its share of the cores, spread evenly over all cores. It is an
estimate, not a bound: stages that run together share caches and memory, and one that
has all cores for a while may use them better. On other devices the estimate is the work
of the busiest device.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.task import cores
from fdg_jax import costs
from fdg_jax.blocks import split_network
from fdg_jax.stage import Activation, Stage

MOST_REPEATS = 20


class StageTimes:
    """Copies of a pipeline's stages, each with a batch's input at hand.

    Attributes:
        channels: per cut the MiB of activations and cotangents of one batch.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        network: Sequence[nnx.Module],
        batch: dict[str, jax.Array],
        seconds: float,
    ):
        """Gives every stage a state and its input.

        Args:
            stages: of a pipeline that has run; their functions are compiled.
            network: what the pipeline was made of.
            batch: on the devices of the first and the last stage.
            seconds: about how long to measure a stage in each way.
        """
        self._seconds = seconds
        _, params, batch_stats = split_network(network)
        self._ticks, self.channels = [], []
        self._devices = [stage.device for stage in stages]
        activation = Activation(batch["image"])
        for stage in stages:
            activation = jax.device_put(activation, stage.device)
            state = stage.init(
                [params[i] for i in stage.blocks],
                [batch_stats[i] for i in stage.blocks],
                0,
            )
            if stage.is_last:
                tick = _LastTick(stage, state, activation, batch["label"])
            else:
                tick = _Tick(stage, state, activation)
                activation = tick.output
                mib = _mib(activation), _mib(tick.cotangent)
                self.channels.append({"down_mib": mib[0], "up_mib": mib[1]})
            self._ticks.append(tick)

    def measure(self) -> dict:
        """Returns "estimated_tick_ms", and in "stages" per stage its times.

        These are "alone_ms", "side_by_side_ms" and, on CPU, "share_ms".
        """
        repeats = [
            max(2, min(MOST_REPEATS, round(self._seconds / _median_seconds(tick, 1))))
            for tick in self._ticks
        ]
        ticks = list(zip(self._ticks, repeats, strict=True))
        rows = [{"alone_ms": 1e3 * _median_seconds(*tick)} for tick in ticks]
        if self._devices[0].platform == "cpu":
            estimate = self._measure_shares(ticks, rows)
        else:
            estimate = max(
                sum(
                    row["alone_ms"]
                    for row, other in zip(rows, self._devices, strict=True)
                    if other == device
                )
                for device in self._devices
            )
        together = costs.side_by_side(
            [functools.partial(_run, tick) for tick in self._ticks], max(repeats)
        )
        for row, seconds in zip(rows, together, strict=True):
            row["side_by_side_ms"] = 1e3 * seconds
        return {"estimated_tick_ms": estimate, "stages": rows}

    def _measure_shares(self, ticks, rows) -> float:
        """Adds "share_ms" to every row; returns an estimate of the least tick."""
        allowed = cores()
        share = max(1, len(allowed) // len(ticks))
        for k, (tick, row) in enumerate(zip(ticks, rows, strict=True)):
            first = k * share % len(allowed)
            with only_on(allowed[first : first + share]):
                row["share_ms"] = 1e3 * _median_seconds(*tick)
        return sum(row["share_ms"] for row in rows) * share / len(allowed)


class _Tick:
    """A stage's work for a batch: forward, backward and update."""

    def __init__(self, stage, state, activation):
        self._stage, self._state, self._activation = stage, state, activation
        self.output, self._state, _ = stage.forward(state, activation)
        like = stage.cotangent_like(self.output.x)
        self.cotangent = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    def __call__(self):
        y, state, entry = self._stage.forward(self._state, self._activation)
        gradient, up = self._stage.backward(state, entry, self.cotangent)
        self._state = self._stage.update(state, gradient)
        return y, up, self._state


class _LastTick:
    """The last stage's work for a batch: forward, loss, backward and update."""

    def __init__(self, stage, state, activation, label):
        self._stage, self._state = stage, state
        self._activation, self._label = activation, label

    def __call__(self):
        _, metrics, state, gradient, up = self._stage.loss_step(
            self._state, self._activation, self._label
        )
        self._state = self._stage.update(state, gradient)
        return metrics, up, self._state


def _run(tick: Callable) -> None:
    jax.block_until_ready(tick())


def _median_seconds(tick: Callable, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        _run(tick)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


@contextlib.contextmanager
def only_on(allowed: Sequence[int]) -> Iterator[None]:
    """Keeps all threads of this process on some cores, where the system can."""
    if not os.path.isdir("/proc/self/task"):
        yield
        return
    before = cores()
    _set_cores(allowed)
    try:
        yield
    finally:
        _set_cores(before)


def _set_cores(allowed: Sequence[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        # A thread may have ended since it was listed.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), allowed)


def _mib(tree) -> float:
    return sum(a.nbytes for a in jax.tree.leaves(tree)) / 2**20
