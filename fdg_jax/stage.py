"""A stage: a contiguous run of blocks whose forward, backward and update are compiled.

The functions are pure; a stage holds no arrays. Engines call them in the order of the
stage program (``fdg_jax.engines.program``) and move the results about.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fdg_jax import losses, residuals, shrink
from fdg_jax.blocks import Run
from fdg_jax.stage_optimizer import (
    Gradient,
    Optimizer,
    Progress,
    StageInfo,
    StageOptimizer,
    all_finite,
    loses,
    optimizer_of,
)

BACKWARD_MODES = ("stored", "recompute", "replay")


class BatchId(NamedTuple):
    """Which batch of which run: what random layers draw by.

    Its numbers live on the device, so that no step uploads them.

    Attributes:
        seed: uint32 scalar, of the run.
        number: uint32 scalar, counted from 0.
    """

    seed: jax.Array
    number: jax.Array

    def following(self) -> "BatchId":
        """Returns that of the batch after it."""
        return self._replace(number=self.number + 1)


class StageState(NamedTuple):
    """Everything that a stage carries from batch to batch.

    Attributes:
        params: by the position of a run's first block in the network, a nested dict of
            the run's parameters, joined; an optimizer sees those of single blocks, at
            the same paths whatever the cuts are.
        batch_stats: likewise, all other state that a forward changes.
        opt_state: state of the stage's optimizer, as ``reroll`` says.
        batch: the one that the next forward takes.
        progress: how far the stage has come with its updates.
    """

    params: dict[int, Any]
    batch_stats: dict[int, Any]
    opt_state: Any
    batch: BatchId
    progress: Progress


def wait_for(states: Any) -> None:
    """Waits for the device, since XLA must not be at work when the process ends.

    Args:
        states: stage states, in which every compiled call leaves something. After an
            error some of their buffers may have been given up already.
    """
    arrays = jax.tree.leaves(states)
    jax.block_until_ready(
        [a for a in arrays if isinstance(a, jax.Array) and not a.is_deleted()]
    )


class Activation(NamedTuple):
    """What a stage sends down.

    Attributes:
        x: the activation, a pytree of floating-point arrays, [batch, ...].
        nonfinite: int32 [2], index of the first stage whose output held a NaN or an
            infinity, and of the first that has halted at such a gradient; K if there
            is none. None with the images, which no stage made.
    """

    x: Any
    nonfinite: jax.Array | None = None


class Cotangent(NamedTuple):
    """What a stage sends up.

    Attributes:
        x: gradient with respect to the activation that the stage above sent down.
        is_finite: as in ``Gradient``.
        weight: as in ``Gradient``.
    """

    x: Any
    is_finite: jax.Array
    weight: jax.Array | None


class StashEntry(NamedTuple):
    """What a stage keeps of a forward until the cotangent arrives.

    Which fields are filled depends on ``backward``: "stored" keeps params, x, y (by
    reference; the leaves of y, with None for each that the residuals do not want) and
    residuals; "recompute" params, batch_stats, x and batch; "replay" the same without
    params. The rest is None.
    """

    params: Any
    batch_stats: Any
    x: Any
    y: list[jax.Array | None] | None
    batch: BatchId | None
    residuals: residuals.Residuals | None


class Stage:
    """The compiled functions of one stage."""

    def __init__(
        self,
        index: int,
        num_stages: int,
        runs: Sequence[Run],
        *,
        staleness: int,
        loss_fn: Callable,
        metrics: Mapping[str, losses.Metric],
        optimizer: Optimizer,
        shrink_factor: float | optax.Schedule,
        backward: str,
        seed: int,
        device: jax.Device,
        placement: jax.sharding.Sharding | None = None,
        head: Run | None = None,
        sends_up: bool | None = None,
        drain_every: int = 0,
        accumulation: int = 1,
        jit: Callable = jax.jit,
        loss_scale: float = 1.0,
        skip_nonfinite: int = 0,
    ):
        """Creates a stage; nothing is traced or compiled before the first call.

        Args:
            index: k, counted from 0.
            num_stages: K.
            runs: its blocks.
            staleness: s_k, batches between a forward and its gradient's use.
            loss_fn: as ``fdg_jax.losses`` says; the last stage calls it,
                and every stage with a head.
            metrics: what else to compute of outputs and label, by name.
            optimizer: the user's transform, or a function from ``StageInfo`` to it;
                shrinking is chained before it.
            shrink_factor: beta.
            backward: "stored", "recompute" or "replay": which weights the backward
                uses, and what the stash holds.
            seed: source of the random layers.
            device: where it works; the first one, where there are several.
            placement: where its arrays live, if not only on that device.
            head: a block from the stage's output to a loss of its own, only in
                training; such a stage waits for no cotangent.
            sends_up: whether the stage before wants a cotangent; by default every
                stage but the first does send one.
            drain_every: as in ``Schedule``.
            accumulation: M; the mean of so many batches' gradients makes one update.
            jit: what compiles its functions; a timeline's also records their calls.
            loss_scale: factor of the first cotangent and of all that follow from it;
                the gradients are divided by it before anything else.
            skip_nonfinite: how many batches in a row are left out if their loss or
                gradient is not finite, here or in a later stage; the stage halts at
                the next. They change no parameter and no optimizer state, nor
                statistics that would not be finite.
        """
        assert backward in BACKWARD_MODES, backward
        self.index = index
        self.runs = tuple(runs)
        self.head = head
        self.staleness = staleness
        self.drain_every = drain_every
        self.device = device
        self.placement = device if placement is None else placement
        self.is_first = index == 0
        self.is_last = index == num_stages - 1
        self.has_loss = self.is_last or head is not None
        self.sends_up = index > 0 if sends_up is None else sends_up
        self.shrink_power = num_stages - 1 - index
        self.backward_mode = backward
        self._num_stages = num_stages
        self._loss_fn, self._metrics = loss_fn, dict(metrics)
        self._accumulation = accumulation
        self._seed = seed
        self._loss_scale = loss_scale
        info = StageInfo(index, num_stages, staleness, accumulation, backward)
        self._optimizer = StageOptimizer(
            optax.chain(
                *([optax.scale(1 / loss_scale)] if loss_scale != 1.0 else []),
                shrink.shrink_gradients(shrink_factor, self.shrink_power),
                optimizer_of(optimizer, info),
            ),
            [run.blocks for run in self._all_runs],
            accumulation=accumulation,
            skip_nonfinite=skip_nonfinite,
        )
        # Statistics are small, and not given up: a forward that fails loses nothing.
        # The stash holds old weights unless staleness is 0 or they are not kept at
        # all, and only then may the update overwrite them.
        keeps_params = staleness > 0 and backward != "replay"
        self._forward = jit(self._forward_fn)
        self._backward = jit(self._backward_fn)
        self._loss_step = jit(self._loss_step_fn)
        self._update = jit(
            self._update_fn, donate_argnums=(1, 3) if keeps_params else (0, 1)
        )
        self._evaluate = jit(self._evaluate_fn)
        self._evaluate_loss = jit(self._evaluate_loss_fn)

    @property
    def blocks(self) -> range:
        """Positions of the stage's blocks in the network; a head is none of them."""
        return range(self.runs[0].blocks.start, self.runs[-1].blocks.stop)

    def init(self, params: Sequence, batch_stats: Sequence, batch: int) -> StageState:
        """Places a fresh state on the stage's device.

        Args:
            params: per block, and for the head, its parameters; copied.
            batch_stats: per block, and for the head, its other state; copied.
            batch: number of the first batch.
        """
        params, batch_stats = (
            self._join(jax.tree.map(np.array, values))
            for values in jax.device_get((list(params), list(batch_stats)))
        )
        first = BatchId(np.uint32(self._seed), np.uint32(batch))
        none = np.int32(0)
        progress = Progress(np.uint32(batch), none, none, np.bool_(False))
        state = StageState(params, batch_stats, None, first, progress)
        state = jax.device_put(state, self.placement)
        # Counters do not depend on the parameters, hence not on their device either.
        opt_state = jax.device_put(
            jax.jit(self._optimizer.init)(state.params), self.placement
        )
        return state._replace(opt_state=opt_state)

    def block_values(self, state: StageState) -> tuple[list, list]:
        """Returns what ``init`` was given, with today's values, on the host.

        Args:
            state: the stage's state.

        Returns:
            Per block its parameters, and per block its other state; no head's.
        """
        params, batch_stats = jax.device_get((state.params, state.batch_stats))
        return self._split(params), self._split(batch_stats)

    def resume(self, state: StageState, batch: int) -> StageState:
        """Returns the state of a drained stage, ready for the next gradients.

        Args:
            state: of the stage, which may have halted. What it has gathered for an
                update that is not complete is dropped: no stage can complete it.
            batch: number of the batch that comes next.
        """
        anew = (np.uint32(batch), np.int32(0), np.bool_(False))
        next_gradient, in_a_row, is_halted = jax.device_put(anew, self.placement)
        progress = state.progress._replace(
            next_gradient=next_gradient, in_a_row=in_a_row, is_halted=is_halted
        )
        opt_state = jax.device_put(
            self._optimizer.without_gathered(state.opt_state), self.placement
        )
        return state._replace(progress=progress, opt_state=opt_state)

    def cotangent_like(self, y: Any) -> Cotangent:
        """Returns the abstract cotangent of what the stage sends down, ``y``."""
        weight = jax.ShapeDtypeStruct((), jnp.result_type(float))
        return Cotangent(
            y,
            jax.ShapeDtypeStruct((), jnp.bool_),
            weight if self._accumulation > 1 else None,
        )

    def forward(
        self, state: StageState, activation: Activation
    ) -> tuple[Activation, StageState, StashEntry]:
        """Runs the blocks in training mode.

        Args:
            state: the stage's state.
            activation: what the stage before sent, or the images.

        Returns:
            What to send down, the new state, and what to stash for the backward.
        """
        params, old_stats, _, batch, progress = state
        y, batch_stats, next_batch, kept = self._forward(
            params, old_stats, batch, progress, activation
        )
        mode, y_needed = self.backward_mode, None
        if mode == "stored":
            y_needed = residuals.needed(kept, y.x)
        entry = StashEntry(
            params=None if mode == "replay" else params,
            batch_stats=None if mode == "stored" else old_stats,
            x=activation.x,
            y=y_needed,
            batch=None if mode == "stored" else batch,
            residuals=kept,
        )
        return y, state._replace(batch_stats=batch_stats, batch=next_batch), entry

    def backward(
        self, state: StageState, entry: StashEntry, cotangent: Cotangent
    ) -> tuple[Gradient, Cotangent | None]:
        """Runs the blocks' vjp.

        Args:
            state: today's state, whose weights "replay" uses.
            entry: what the forward of the cotangent's batch stashed.
            cotangent: of what that forward sent down.

        Returns:
            The gradient, and the cotangent to send up (None in stage 0).
        """
        if self.backward_mode == "replay":
            entry = entry._replace(params=state.params)
        return self._backward(entry, cotangent)

    def update(self, state: StageState, gradient: Gradient) -> StageState:
        """Shrinks the gradient, applies the optimizer, and returns the new state.

        Args:
            state: the stage's state; its buffers are given up where nothing needs them.
            gradient: of a batch; may be given up.
        """
        # Only the gradients are given up: the rest may be on its way up as well.
        rest = gradient._replace(params=None)
        params, opt_state, progress = self._update(
            state.params, state.opt_state, state.progress, gradient.params, rest
        )
        return state._replace(params=params, opt_state=opt_state, progress=progress)

    def loss_step(
        self, state: StageState, activation: Activation, label: jax.Array
    ) -> tuple[Activation | None, dict, StageState, Gradient, Cotangent | None]:
        """Runs the forward, loss and backward of a stage with a loss as one step.

        Args:
            state: the stage's state.
            activation: what the stage before sent, or the images.
            label: [batch, ...].

        Returns:
            What to send down (None in the last stage), metrics ("loss", "nonfinite" as
            in ``Activation``, and the user's, which may be ``losses.Total``), the new
            state, the gradient, and the cotangent to send up (None if the stage before
            wants none).
        """
        y, metrics, batch_stats, batch, gradient, cotangent = self._loss_step(
            state.params,
            state.batch_stats,
            state.batch,
            state.progress,
            activation,
            label,
        )
        state = state._replace(batch_stats=batch_stats, batch=batch)
        return y, metrics, state, gradient, cotangent

    def evaluate(self, state: StageState, x: Any) -> Any:
        """Runs the blocks in evaluation mode and returns their output."""
        return self._evaluate(state.params, state.batch_stats, x)

    def evaluate_loss(self, state: StageState, x: Any, label: jax.Array) -> dict:
        """Runs the last stage in evaluation mode and returns the batch's metrics.

        Returns:
            "loss" and the user's metrics, each a mean over the batch, or a ``Total``.
        """
        return self._evaluate_loss(state.params, state.batch_stats, x, label)

    @property
    def _all_runs(self) -> tuple[Run, ...]:
        return self.runs if self.head is None else (*self.runs, self.head)

    def _join(self, values: Sequence[Any]) -> dict[int, Any]:
        """Joins the values of each run of blocks, and of a head."""
        rest = iter(values)
        return {
            run.start: run.join(list(itertools.islice(rest, run.length)))
            for run in self._all_runs
        }

    def _split(self, values: Mapping[int, Any]) -> list[Any]:
        """Splits joined values into those of each block; without the head's."""
        return [value for run in self.runs for value in run.split(values[run.start])]

    def _apply(self, params, batch_stats, batch, x, *, train, runs=None):
        """Calls the runs in order; random layers depend on seed, block and batch.

        Args:
            params: as ``StageState`` has them.
            batch_stats: likewise.
            batch: a ``BatchId``.
            x: of the first run.
            train: whether layers act as in training.
            runs: which to call; all but a head if None.

        Returns:
            The output, and the new batch_stats of the runs.
        """
        key = self._key(batch)
        runs = self.runs if runs is None else runs
        old, new = {}, {}
        for run in runs:
            i = run.start
            old[i] = batch_stats[i]
            x, new[i] = run.apply(params[i], old[i], x, key, train=train)
        is_lost = loses(old, new)
        return x, jax.tree.map(lambda a, b: jnp.where(is_lost, a, b), old, new)

    def _key(self, batch):
        return jax.random.fold_in(jax.random.key(batch.seed), batch.number)

    def _share(self, count):
        """Over how many examples a device takes the mean of its part of the batch."""
        return count

    def _apply_with_head(self, params, batch_stats, batch, x):
        """What goes down, what the loss is of, and the statistics, in training."""
        y, stats = self._apply(params, batch_stats, batch, x, train=True)
        if self.head is None:
            return y, y, stats
        own = (params, batch_stats, batch, y)
        outputs, head_stats = self._apply(*own, train=True, runs=[self.head])
        return y, outputs, stats | head_stats

    def _vjp(self, function, params, x):
        """jax.vjp of (value, aux); of the input too, where its gradient is wanted."""
        if not self.sends_up:
            return jax.vjp(lambda params: function(params, x), params, has_aux=True)
        return jax.vjp(function, params, x, has_aux=True)

    def _pull(self, vjp, cotangent: Cotangent):
        """The gradient of the parameters, and the cotangent to send up, if any."""
        # Of the cotangent itself nothing follows: what is not finite in that of a mask,
        # say, may reach no parameter.
        weight = cotangent.weight
        grads, *dx = vjp(cotangent.x)
        is_finite = cotangent.is_finite & all_finite(grads)
        gradient = Gradient(grads, is_finite, weight)
        up = Cotangent(*dx, is_finite, weight) if dx else None
        return gradient, up

    def _forward_vjp(self, params, batch_stats, batch, x):
        """Output, vjp and new statistics of the blocks in training mode."""

        def forward(params, x):
            return self._apply(params, batch_stats, batch, x, train=True)

        return self._vjp(forward, params, x)

    def _forward_fn(self, params, batch_stats, batch, progress, activation):
        x, kept = activation.x, None
        if self.backward_mode == "stored":
            y, vjp, batch_stats = self._forward_vjp(params, batch_stats, batch, x)
            kept = residuals.pack(vjp, (y, x, params))
        else:
            y, batch_stats = self._apply(params, batch_stats, batch, x, train=True)
        y = Activation(y, self._first_nonfinite(activation, progress, y))
        return y, batch_stats, batch.following(), kept

    def _backward_fn(self, entry, cotangent):
        params, batch_stats, x, y, batch, kept = entry
        if self.backward_mode == "stored":
            vjp = residuals.unpack(kept, [*y, *jax.tree.leaves((x, params))])
        else:
            _, vjp, _ = self._forward_vjp(params, batch_stats, batch, x)
        return self._pull(vjp, cotangent)

    def _update_fn(self, params, opt_state, progress, grads, rest):
        gradient = rest._replace(params=grads)
        return self._optimizer.update(params, opt_state, progress, gradient)

    def _loss_step_fn(self, params, batch_stats, batch, progress, activation, label):
        def objective(params, x):
            y, outputs, stats = self._apply_with_head(params, batch_stats, batch, x)
            value = self._loss_fn(outputs, label)
            count = losses.count(value)
            share = None if count is None else self._share(lax.stop_gradient(count))
            return losses.mean(value, share), (y, outputs, stats, share)

        loss, vjp, (y, outputs, stats, weight) = self._vjp(
            objective, params, activation.x
        )
        if self._accumulation == 1:
            weight = None
        elif weight is None:
            size = losses.num_examples(label, activation.x)
            weight = jnp.asarray(size, jnp.result_type(float))
        scale = jnp.full_like(loss, self._loss_scale)
        nonfinite = self._first_nonfinite(activation, progress, loss)
        # If an earlier stage has halted, the others halt too, a few batches later.
        is_used = jnp.isfinite(loss) & (nonfinite[1] == self._num_stages)
        gradient, cotangent = self._pull(vjp, Cotangent(scale, is_used, weight))
        metrics = {"loss": loss, **self._metrics_of(outputs, label)}
        metrics["nonfinite"] = nonfinite
        down = None
        if not self.is_last:
            down = Activation(y, metrics["nonfinite"])
        return down, metrics, stats, batch.following(), gradient, cotangent

    def _evaluate_fn(self, params, batch_stats, x):
        # Dropout is off in evaluation. A layer that draws all the same always draws
        # as in batch 0 of seed 0, so that evaluation can be repeated.
        always = BatchId(jnp.uint32(0), jnp.uint32(0))
        return self._apply(params, batch_stats, always, x, train=False)[0]

    def _evaluate_loss_fn(self, params, batch_stats, x, label):
        outputs = self._evaluate_fn(params, batch_stats, x)
        loss = losses.as_total(self._loss_fn(outputs, label))
        return {"loss": loss, **self._metrics_of(outputs, label)}

    def _metrics_of(self, outputs, label):
        return {
            name: losses.as_total(metric(outputs, label))
            for name, metric in self._metrics.items()
        }

    def _first_nonfinite(self, activation, progress, y):
        """``Activation.nonfinite`` of what the stage sends down."""
        none = jnp.full(2, self._num_stages, jnp.int32)
        before = none if activation.nonfinite is None else activation.nonfinite
        here = jnp.stack([~all_finite(y), progress.is_halted])
        return jnp.minimum(before, jnp.where(here, jnp.int32(self.index), none))
