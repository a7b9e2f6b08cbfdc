"""What a batch costs each stage: the measured model behind balanced cuts.

In every tick a stage runs a forward that writes out its stash, a backward and an
update, and sends an activation down and a cotangent up; the last stage runs one loss
step instead of the first two, and sends nothing down. So a stage of the blocks i to
j - 1 costs::

    seconds[i, j] = block[i] + ... + block[j - 1] + handover[i] + handover[j]

with other numbers for the blocks of the last stage, and the costliest stage sets the
pace. Blocks are timed one at a time, as stages of their own, since to compile every
stage that might be would take far longer. Where no stage can begin (see
``partition.possible_cuts``) blocks stay together: they are timed as one piece, and
below a block is such a piece.

A real stage takes up to a third less than the sum of its blocks: XLA fuses across
them, and on a CPU what runs beside it is another stage, which may want the cores where
this one wants the memory. So the model only proposes. The stages that it proposes are
timed as they are, side by side; what they took corrects the costs of their blocks; and
so on until the proposal is one that has been timed already (``choose_cuts``).
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdg_jax import partition
from fdg_jax.blocks import Block, abstract, find_alike, group_runs
from fdg_jax.stage import Activation, Stage

_LOGGER = logging.getLogger("fdg_jax")

MOST_PROPOSALS = 3
"""Cuts whose stages are compiled and timed before the best of them is taken."""


@dataclass(frozen=True)
class Costs:
    """Seconds per batch, by position in the network.

    Attributes:
        block: of each block in any stage but the last; 0 for the last block.
        block_in_last: of each block in the last stage.
        handover: of sending what crosses the cut in front of each block, one way; 0 for
            the first block. The sender pays: the stage above for the activation, the
            stage below for the cotangent.
    """

    block: tuple[float, ...]
    block_in_last: tuple[float, ...]
    handover: tuple[float, ...]

    def seconds(self) -> np.ndarray:
        """Returns [N + 1, N + 1]: at [i, j] what a stage of blocks i to j - 1 costs."""
        total = np.cumsum([0.0, *self.block])
        in_last = np.cumsum([0.0, *self.block_in_last])
        handover = np.array([*self.handover, 0.0])
        sent = np.add.outer(handover, handover)
        seconds = np.subtract.outer(total, total).T + sent
        seconds[:, -1] = in_last[-1] - in_last + handover
        return seconds

    def corrected(self, cuts: Sequence[int], stage_seconds: Sequence[float]) -> "Costs":
        """Returns costs whose stages at some cuts are as long as was measured.

        Every block keeps its share of its stage.

        Args:
            cuts: where stages begin, less the first.
            stage_seconds: of each stage, without hand-overs.
        """
        expected = replace(self, handover=(0.0,) * len(self.block)).seconds()
        bounds = [0, *cuts, len(self.block)]
        factors = np.concatenate(
            [
                np.full(j - i, measured / expected[i, j])
                for i, j, measured in zip(
                    bounds, bounds[1:], stage_seconds, strict=False
                )
            ]
        )
        return replace(
            self,
            block=tuple((factors * self.block).tolist()),
            block_in_last=tuple((factors * self.block_in_last).tolist()),
        )


class Balanced(NamedTuple):
    """Cuts that were chosen by timing.

    Attributes:
        cuts: where stages begin, less the first; positions of blocks.
        stage_seconds: per batch, of each stage, hand-overs included.
        seconds_taken: by the choice, compilation included.
    """

    cuts: tuple[int, ...]
    stage_seconds: list[float]
    seconds_taken: float


def balance(
    make_stage: Callable[..., Stage],
    blocks: Sequence[Block],
    params: Sequence[Any],
    batch_stats: Sequence[Any],
    shapes: Sequence[Any],
    label: Any,
    *,
    time_stages: Callable[[tuple[int, ...]], Sequence[float]],
    staleness: int,
    devices: Sequence[jax.Device],
) -> Balanced:
    """Chooses among the cuts that are possible; says on the log that this takes time.

    Args:
        make_stage: as for ``measure``, like what is not named here.
        blocks: of the network.
        params: per block.
        batch_stats: per block.
        shapes: as ``blocks.trace_shapes`` returns it.
        label: labels of a batch, arrays or abstract.
        time_stages: takes K - 1 positions of blocks and returns the seconds of each
            stage, without hand-overs.
        staleness: that of the first stage.
        devices: the device of every stage.

    Raises:
        ValueError: too few cuts are possible; raised before anything is timed.
    """
    num_stages = len(devices)
    starts = (0, *partition.possible_cuts(blocks, shapes, num_stages))
    _LOGGER.warning(
        "cuts='balanced': compiling and timing %d pieces of the network, to make %d "
        "stages of them; cuts given as positions skip this",
        len(starts),
        num_stages,
    )
    began = time.perf_counter()
    costs = measure(
        *(make_stage, blocks, params, batch_stats, shapes, label),
        starts=starts,
        staleness=staleness,
        devices=devices,
    )

    def positions(pieces):
        return tuple(starts[piece] for piece in pieces)

    pieces, stage_seconds = choose_cuts(
        costs, num_stages, lambda pieces: time_stages(positions(pieces))
    )
    seconds_taken = time.perf_counter() - began
    return Balanced(positions(pieces), stage_seconds, seconds_taken)


def choose_cuts(
    costs: Costs,
    num_stages: int,
    time_stages: Callable[[tuple[int, ...]], Sequence[float]],
) -> tuple[tuple[int, ...], list[float]]:
    """Chooses cuts by the model, corrected by the stages that it proposes.

    Args:
        costs: of the blocks, as ``measure`` returns them.
        num_stages: K.
        time_stages: takes K - 1 cuts and returns the seconds of each stage, without
            hand-overs.

    Returns:
        The cuts whose costliest stage was timed as the cheapest, and the seconds of
        each of their stages, hand-overs included.
    """
    timed = {}
    while len(timed) < MOST_PROPOSALS:
        cuts = partition.balanced_cuts(costs.seconds(), num_stages)
        if cuts in timed:
            break
        costs = costs.corrected(cuts, time_stages(cuts))
        bounds = [0, *cuts, len(costs.block)]
        timed[cuts] = costs.seconds()[bounds[:-1], bounds[1:]]
    best = min(timed, key=lambda cuts: timed[cuts].max())
    return best, timed[best].tolist()


def tick(
    seconds: Sequence[float], staleness: Sequence[int], devices: Sequence[Any]
) -> float:
    """Seconds per batch of a filled pipeline, as the costs of its stages bound them.

    No device can do more than all its stages ask, and between two forwards of stage k
    that are s_k + 1 batches apart, one batch goes down to the last stage and back::

        max(max_d sum_{k on d} seconds_k,  max_k sum_{l >= k} seconds_l / (s_k + 1))

    With a device for each stage that is the costliest stage, but for back-propagation
    (s = 0), which takes the sum of all.

    Args:
        seconds: cost of each stage.
        staleness: s_k.
        devices: where each stage is.
    """
    busy = dict.fromkeys(devices, 0.0)
    for device, cost in zip(devices, seconds, strict=True):
        busy[device] += cost
    below = np.cumsum(seconds[::-1])[::-1]
    return float(max(*busy.values(), *(below / (np.array(staleness) + 1))))


def measure(
    make_stage: Callable[..., Stage],
    blocks: Sequence[Block],
    params: Sequence[Any],
    batch_stats: Sequence[Any],
    shapes: Sequence[Any],
    label: Any,
    *,
    starts: Sequence[int],
    staleness: int,
    devices: Sequence[jax.Device],
    repeats: int = 3,
) -> Costs:
    """Times every piece of a network and every hand-over.

    Args:
        make_stage: ``Stage`` with the run's loss, optimizer and backward mode, and K.
        blocks: the blocks of a network.
        params: per block its parameters.
        batch_stats: per block its other state.
        shapes: abstract input of every block and output of the last, as
            ``blocks.trace_shapes`` returns it.
        label: labels of a batch, arrays or abstract.
        starts: positions of the blocks with which pieces begin, at least two.
        staleness: that of the first stage.
        devices: the device of every stage; pieces are timed on the first.
        repeats: timed calls after one warm-up; the median counts.

    Returns:
        The costs by piece. Pieces that are alike are timed once; so are hand-overs.
    """
    race = _Race(devices)
    ticks, handovers, backward_modes = [], [], set()
    for start, stop in itertools.pairwise([*starts, len(blocks)]):
        x, y = shapes[start], shapes[stop]
        values = (params[start:stop], batch_stats[start:stop])
        first, last = start == 0, stop == len(blocks)
        # A stage that there will be, since optimizers may ask which one it is. The
        # first piece has no input gradient, the last one has the loss.
        stage = make_stage(
            index=len(devices) - 1 if last else 0,
            runs=group_runs(
                blocks, params, batch_stats, shapes, first=start, stop=stop
            ),
            staleness=0 if last else staleness,
            device=devices[0],
            sends_up=not first,
        )
        backward_modes.add(stage.backward_mode)
        make_tick, target = (_last_tick, label) if last else (_inner_tick, y)
        static = [block.graphdef for block in blocks[start:stop]]
        kind = (static, abstract((values, x, target)), first, last)
        ticks.append(race.enter(kind, make_tick, stage, values, x, target))
        if not first:
            handovers.append(race.enter(x, _handover, devices, x))
    seconds = race.run(repeats)
    forward, rest = np.array([seconds[tick] for tick in ticks]).T
    # In the last stage forward and backward are one program, which takes as long as
    # the two, or only as the backward if that repeats the forward.
    in_last = forward + rest if backward_modes == {"stored"} else rest
    return Costs(
        block=(*(forward + rest)[:-1].tolist(), 0.0),
        block_in_last=tuple(in_last.tolist()),
        handover=(0.0, *(seconds[handover][0] for handover in handovers)),
    )


def time_stages(
    stages: Sequence[Stage],
    params: Sequence[Any],
    batch_stats: Sequence[Any],
    shapes: Sequence[Any],
    label: Any,
    *,
    repeats: int = 5,
) -> list[float]:
    """Times the tick of every stage, side by side where each has its own device.

    Where any two share one, every stage is timed alone: what runs on one device takes
    turns, and the times are to add up (see ``tick``).

    Args:
        stages: all stages of a network; compiled by this.
        params: per block its parameters.
        batch_stats: per block its other state.
        shapes: as for ``measure``.
        label: labels of a batch, arrays or abstract.
        repeats: timed ticks of the slowest stage after one warm-up.

    Returns:
        Median seconds of each stage's forward, backward and update.
    """

    def make_tick(stage):
        blocks = stage.blocks
        make, target = _inner_tick, shapes[blocks.stop]
        if stage.is_last:
            make, target = _last_tick, label
        values = ([v[i] for i in blocks] for v in (params, batch_stats))
        return make(stage, tuple(values), shapes[blocks.start], target)

    ticks = [make_tick(stage) for stage in stages]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda tick: tick(), ticks))
    if len({stage.device for stage in stages}) == len(stages):
        return side_by_side(ticks, repeats)
    return [_median_seconds(tick, repeats) for tick in ticks]


def side_by_side(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Returns the median seconds of each call while the others are made as well.

    Args:
        calls: each is made again and again, by a thread of its own; it returns when
            its work is done.
        repeats: how often the slowest one is timed; the others as often as fits in.
    """
    start = threading.Barrier(len(calls))
    busy = set(range(len(calls)))

    def work(k):
        start.wait()
        try:
            seconds = [_seconds(calls[k]) for _ in range(repeats)]
            busy.discard(k)
            while busy:
                seconds.append(_seconds(calls[k]))
        finally:
            busy.discard(k)
        return float(np.median(seconds))

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(work, range(len(calls))))


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    return float(np.median([_seconds(call) for _ in range(repeats)]))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _Race:
    """Calls to be timed against each other, in rounds, so that all meet the same luck.

    CPU devices share the cores and the memory of one machine, so there as many copies
    of a call run side by side as stages will.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self._copies = len(set(devices)) if devices[0].platform == "cpu" else 1
        self._entries = []
        self._known = []

    def enter(self, signature: Any, make_call: Callable[..., Callable], *args) -> int:
        """Adds ``make_call(*args)``, unless an equal one is in; returns its number.

        A call returns the seconds that each of its phases took.
        """
        entry = find_alike(signature, self._known)
        if entry is None:
            entry = len(self._entries)
            self._entries.append([make_call(*args) for _ in range(self._copies)])
            self._known.append((signature, entry))
        return entry

    def run(self, rounds: int) -> list[list[float]]:
        """Median seconds of each call's phases, after a round to warm up."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # Most of this is compiling, for which XLA takes one core.
            list(pool.map(lambda calls: [call() for call in calls], self._entries))
        times = [[] for _ in self._entries]
        with ThreadPoolExecutor(self._copies) as pool:
            for _ in range(rounds):
                for taken, calls in zip(times, self._entries, strict=True):
                    taken += pool.map(lambda call: call(), calls)
        return [np.median(taken, axis=0).tolist() for taken in times]


def _inner_tick(stage: Stage, values: tuple, x: Any, y: Any) -> Callable:
    """Returns the tick of a stage before the last: forward; backward and update."""
    state = stage.init(*values, 0)
    activation = _activation(stage, x)
    # One that is used: for a gradient that is not finite nothing is computed.
    like = stage.cotangent_like(_place(y, stage.device))
    flags = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), like._replace(x=None))
    cotangent = jax.device_put(flags, stage.device)._replace(x=like.x)

    def tick():
        nonlocal state
        start = time.perf_counter()
        y, state, entry = jax.block_until_ready(stage.forward(state, activation))
        turn = time.perf_counter()
        grads, dx = stage.backward(state, entry, cotangent)
        state = stage.update(state, grads)
        jax.block_until_ready((state, dx))
        return turn - start, time.perf_counter() - turn

    return tick


def _last_tick(stage: Stage, values: tuple, x: Any, label: Any) -> Callable:
    """Returns the tick of the last stage: nothing; loss step and update."""
    state = stage.init(*values, 0)
    activation, label = _activation(stage, x), _place(label, stage.device)

    def tick():
        nonlocal state
        start = time.perf_counter()
        _, metrics, state, grads, dx = stage.loss_step(state, activation, label)
        state = stage.update(state, grads)
        jax.block_until_ready((state, metrics, dx))
        return 0.0, time.perf_counter() - start

    return tick


def _handover(devices: Sequence[jax.Device], x: Any) -> Callable:
    """Returns a call that sends an activation from the first to the second stage."""
    x = _place(x, devices[0])

    def send():
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(x, devices[1]))
        return (time.perf_counter() - start,)

    return send


def _activation(stage: Stage, x: Any) -> Activation:
    """What the stage before sends: it has not halted, or the update would not be timed.

    The images come without a word of that.
    """
    none = np.full(2, np.iinfo(np.int32).max, np.int32) if stage.sends_up else None
    return Activation(_place(x, stage.device), jax.device_put(none, stage.device))


def _place(tree: Any, device: jax.Device) -> Any:
    """Fills abstract arrays with noise, and those that are not floating with zeros."""
    random = np.random.default_rng(0)

    def fill(a):
        if jnp.issubdtype(a.dtype, jnp.floating):
            return random.standard_normal(a.shape, np.float32).astype(a.dtype)
        return jnp.zeros(a.shape, a.dtype)  # NumPy has no PRNG keys

    return jax.device_put(jax.tree.map(fill, tree), device)
