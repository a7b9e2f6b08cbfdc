"""A stage: a contiguous run of blocks whose forward, backward and update are compiled.

The functions are pure; a stage holds no arrays. Engines call them in the order of the
stage program (``fdg_jax.engines.program``) and move the results about.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdg_jax import losses, residuals, shrink
from fdg_jax.blocks import Run

BACKWARD_MODES = ("stored", "recompute", "replay")

Optimizer = (
    optax.GradientTransformation | Callable[["StageInfo"], optax.GradientTransformation]
)
"""An Optax transform, or a function that makes one for a stage."""


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
        params: per run of blocks, a nested dict of parameters.
        batch_stats: per run, all other state that a forward changes.
        opt_state: state of the stage's Optax transform.
        batch: the one that the next forward takes.
    """

    params: tuple
    batch_stats: tuple
    opt_state: optax.OptState
    batch: BatchId


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


class StageInfo(NamedTuple):
    """What an optimizer may want to know of the stage that it works for.

    Attributes:
        index: k, counted from 0.
        num_stages: K.
        staleness: s_k, batches between a batch's forward and its gradient's use; as
            many updates where each batch makes one.
        accumulation: M, batches that make an update.
        backward: "stored", "recompute" or "replay": which weights the backward uses.
    """

    index: int
    num_stages: int
    staleness: int
    accumulation: int = 1
    backward: str = "stored"


def optimizer_of(
    optimizer: Optimizer, stage: StageInfo
) -> optax.GradientTransformation:
    """Returns the Optax transform that an optimizer is for a stage.

    Raises:
        ValueError: it is none, or refuses the stage.
    """
    transform = optimizer(stage) if callable(optimizer) else optimizer
    if not isinstance(transform, optax.GradientTransformation):
        raise ValueError(
            f"an optimizer is an Optax transform, such as optax.sgd(0.1), or a "
            f"function from StageInfo to one; got {transform!r}"
        )
    return transform


class Activation(NamedTuple):
    """What a stage sends down.

    Attributes:
        x: the activation, a pytree of floating-point arrays, [batch, ...].
        nonfinite_stage: int32 scalar, index of the first stage whose output held a NaN
            or an infinity; K where none did. None with the images, which no stage made.
    """

    x: Any
    nonfinite_stage: jax.Array | None = None


class StashEntry(NamedTuple):
    """What a stage keeps of a forward until the cotangent arrives.

    Which fields are filled depends on ``backward``: "stored" keeps params, x, y (by
    reference, and y only where the residuals want it) and residuals; "recompute"
    params, batch_stats, x and batch; "replay" x and batch. The rest is None.
    """

    params: Any
    batch_stats: Any
    x: Any
    y: Any
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
        skip_nonfinite: bool = False,
    ):
        """Creates a stage; nothing is traced or compiled before the first call.

        Args:
            index: k, counted from 0.
            num_stages: K.
            runs: its blocks.
            staleness: s_k, batches between a forward and its gradient's use.
            loss_fn: ``loss_fn(outputs, label)``, scalar mean; the last stage calls it,
                and every stage with a head.
            optimizer: the user's transform, or a function from ``StageInfo`` to it;
                shrinking is chained before it.
            shrink_factor: beta.
            backward: "stored", "recompute" or "replay": which weights the backward
                uses, and what the stash holds.
            seed: source of the random layers.
            device: where it works; the first one, where there are several.
            placement: where its arrays live, if not on that device alone.
            head: a block from the stage's output to a loss of its own, in training
                alone; such a stage waits for no cotangent.
            sends_up: whether the stage before wants a cotangent; by default every
                stage but the first does send one.
            drain_every: as in ``Schedule``.
            accumulation: M; the mean of so many batches' gradients makes one update.
            jit: what compiles its functions; a timeline's also records their calls.
            loss_scale: factor of the first cotangent and of all that follow from it;
                the gradients are divided by it before anything else.
            skip_nonfinite: whether batches whose loss, cotangent or gradient is not
                finite are left out: they change no parameter and no optimizer state,
                nor the statistics where these would not be finite.
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
        self._loss_fn = loss_fn
        self._seed = seed
        self._loss_scale = loss_scale
        self._skips_nonfinite = skip_nonfinite
        info = StageInfo(index, num_stages, staleness, accumulation, backward)
        self._optimizer = optax.chain(
            *([optax.scale(1 / loss_scale)] if loss_scale != 1.0 else []),
            shrink.shrink_gradients(shrink_factor, self.shrink_power),
            optimizer_of(optimizer, info),
        )
        if accumulation > 1:
            # In JAX's widest type, whatever the parameters have.
            self._optimizer = optax.MultiSteps(
                self._optimizer, accumulation, accumulator_dtype=jnp.result_type(float)
            ).gradient_transformation()
        if skip_nonfinite:
            # Optax would give in after so many in a row, and apply the last of them.
            never = np.iinfo(np.int32).max
            self._optimizer = optax.apply_if_finite(self._optimizer, never)
        # "recompute" keeps the statistics that the forward read, so it cannot give
        # their buffers away; the stash holds old weights unless staleness is 0 or they
        # are not kept at all, and only then may the update overwrite them.
        keeps_stats = backward == "recompute"
        keeps_params = staleness > 0 and backward != "replay"
        self._forward = jit(
            self._forward_fn, donate_argnums=() if keeps_stats else (1,)
        )
        self._backward = jit(self._backward_fn)
        self._loss_step = jit(self._loss_step_fn, donate_argnums=(1,))
        self._update = jit(
            self._update_fn, donate_argnums=(1, 2) if keeps_params else (0, 1)
        )
        self._evaluate = jit(self._evaluate_fn)
        self._evaluate_loss = jit(self._evaluate_loss_fn)

    @property
    def blocks(self) -> range:
        """Positions of the stage's blocks in the network; a head is none of them."""
        first = self.runs[0].block.index
        return range(first, first + sum(run.length for run in self.runs))

    def init(self, params: Sequence, batch_stats: Sequence, batch: int) -> StageState:
        """Places a fresh state on the stage's device.

        Args:
            params: per block, and for the head, its parameters; copied.
            batch_stats: per block, and for the head, its other state; copied.
            batch: number of the first batch.
        """
        runs = self.runs if self.head is None else (*self.runs, self.head)

        def stacked(values):
            values = iter(values)
            return tuple(
                run.stack(jax.device_get([next(values) for _ in range(run.length)]))
                for run in runs
            )

        first = BatchId(np.uint32(self._seed), np.uint32(batch))
        state = StageState(stacked(params), stacked(batch_stats), None, first)
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

        def unstacked(values):
            values = jax.device_get(values[: len(self.runs)])
            pairs = zip(self.runs, values, strict=True)
            return [block for run, value in pairs for block in run.unstack(value)]

        return unstacked(state.params), unstacked(state.batch_stats)

    def forward(
        self, state: StageState, activation: Activation
    ) -> tuple[Activation, StageState, StashEntry]:
        """Runs the blocks in training mode.

        Args:
            state: the stage's state; its batch_stats are given up where possible.
            activation: what the stage before sent, or the images.

        Returns:
            What to send down, the new state, and what to stash for the backward.
        """
        params, old_stats, _, batch = state
        y, batch_stats, next_batch, kept = self._forward(
            params, old_stats, batch, activation
        )
        mode, y_needed = self.backward_mode, None
        if mode == "stored":
            *_, y_needed = residuals.needed(kept, (params, activation.x, y.x))
        entry = StashEntry(
            params=None if mode == "replay" else params,
            batch_stats=old_stats if mode == "recompute" else None,
            x=activation.x,
            y=y_needed,
            batch=None if mode == "stored" else batch,
            residuals=kept,
        )
        return y, state._replace(batch_stats=batch_stats, batch=next_batch), entry

    def backward(
        self, state: StageState, entry: StashEntry, cotangent: Any
    ) -> tuple[tuple, Any]:
        """Runs the blocks' vjp.

        Args:
            state: today's state, whose weights "replay" uses.
            entry: what the forward of the cotangent's batch stashed.
            cotangent: gradient with respect to what that forward sent down.

        Returns:
            Gradients of the parameters, and the cotangent to send up (None in stage 0).
        """
        if self.backward_mode == "replay":
            entry = entry._replace(params=state.params, batch_stats=state.batch_stats)
        return self._backward(entry, cotangent)

    def update(self, state: StageState, grads: tuple) -> StageState:
        """Shrinks the gradients, applies the optimizer, and returns the new state.

        Args:
            state: the stage's state; its buffers are given up where nothing needs them.
            grads: gradients of the parameters, unshrunk; may be given up.
        """
        params, opt_state = self._update(state.params, state.opt_state, grads)
        return state._replace(params=params, opt_state=opt_state)

    def loss_step(
        self, state: StageState, activation: Activation, label: jax.Array
    ) -> tuple[Activation | None, dict, StageState, tuple, Any]:
        """Runs the forward, loss and backward of a stage with a loss as one step.

        Args:
            state: the stage's state; its batch_stats are given up.
            activation: what the stage before sent, or the images.
            label: [batch, ...].

        Returns:
            What to send down (None in the last stage), metrics (device scalars "loss",
            "nonfinite_stage" and, for classifiers, "accuracy"), the new state,
            gradients of the parameters, and the cotangent to send up (None where the
            stage before wants none).
        """
        y, metrics, batch_stats, batch, grads, dx = self._loss_step(
            state.params, state.batch_stats, state.batch, activation, label
        )
        state = state._replace(batch_stats=batch_stats, batch=batch)
        return y, metrics, state, grads, dx

    def evaluate(self, state: StageState, x: Any) -> Any:
        """Runs the blocks in evaluation mode and returns their output."""
        return self._evaluate(state.params, state.batch_stats, x)

    def evaluate_loss(self, state: StageState, x: Any, label: jax.Array) -> dict:
        """Runs the last stage in evaluation mode and returns the batch's metrics."""
        return self._evaluate_loss(state.params, state.batch_stats, x, label)

    def _apply(self, params, batch_stats, batch, x, *, train, runs=None):
        """Calls the runs in order; random layers depend on seed, block and batch."""
        key = self._key(batch)
        runs = self.runs if runs is None else runs
        new_stats = []
        # A head's values come after those of the runs.
        for run, p, s in zip(runs, params, batch_stats, strict=False):
            x, s = run.apply(p, s, x, key, train=train)
            new_stats.append(s)
        new_stats = tuple(new_stats)
        if self._skips_nonfinite:
            new_stats = _if_finite(new_stats, batch_stats[: len(runs)])
        return x, new_stats

    def _key(self, batch):
        return jax.random.fold_in(jax.random.key(batch.seed), batch.number)

    def _apply_with_head(self, params, batch_stats, batch, x):
        """What goes down, what the loss is of, and the statistics, in training."""
        y, stats = self._apply(params, batch_stats, batch, x, train=True)
        if self.head is None:
            return y, y, stats
        own = (params[-1:], batch_stats[-1:], batch, y)
        outputs, head_stats = self._apply(*own, train=True, runs=(self.head,))
        return y, outputs, stats + head_stats

    def _vjp(self, function, params, x):
        """jax.vjp of (value, aux); of the input too, where its gradient is wanted."""
        if not self.sends_up:
            return jax.vjp(lambda params: function(params, x), params, has_aux=True)
        return jax.vjp(function, params, x, has_aux=True)

    def _pull(self, vjp, cotangent, value=None):
        """Gradients of the parameters, and of the input where there is one to send.

        What comes of a cotangent or a loss that is not finite may look as if all was
        well: ReLU makes zeros of a NaN. Where batches are left out it is all made NaN.
        """
        pulled = vjp(cotangent)
        if self._skips_nonfinite:
            seen = jax.tree.leaves((cotangent, value))
            finite = jnp.stack([jnp.isfinite(a).all() for a in seen]).all()
            pulled = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), pulled)
        return pulled if self.sends_up else (*pulled, None)

    def _forward_vjp(self, params, batch_stats, batch, x):
        """Output, vjp and new statistics of the blocks in training mode."""

        def forward(params, x):
            return self._apply(params, batch_stats, batch, x, train=True)

        return self._vjp(forward, params, x)

    def _forward_fn(self, params, batch_stats, batch, activation):
        x = activation.x
        kept = None
        if self.backward_mode == "stored":
            y, vjp, batch_stats = self._forward_vjp(params, batch_stats, batch, x)
            kept = residuals.pack(vjp, (params, x, y))
        else:
            y, batch_stats = self._apply(params, batch_stats, batch, x, train=True)
        nonfinite_stage = self._first_nonfinite(activation, y)
        return Activation(y, nonfinite_stage), batch_stats, batch.following(), kept

    def _backward_fn(self, entry, cotangent):
        params, batch_stats, x, y, batch, kept = entry
        if self.backward_mode == "stored":
            vjp = residuals.unpack(kept, (params, x, y))
        else:
            _, vjp, _ = self._forward_vjp(params, batch_stats, batch, x)
        return self._pull(vjp, cotangent)

    def _update_fn(self, params, opt_state, grads):
        updates, opt_state = self._optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _loss_step_fn(self, params, batch_stats, batch, activation, label):
        def objective(params, x):
            y, outputs, stats = self._apply_with_head(params, batch_stats, batch, x)
            return self._loss_fn(outputs, label), (y, outputs, stats)

        loss, vjp, (y, outputs, stats) = self._vjp(objective, params, activation.x)
        grads, dx = self._pull(vjp, jnp.full_like(loss, self._loss_scale), loss)
        metrics = self._metrics(loss, outputs, label)
        metrics["nonfinite_stage"] = self._first_nonfinite(activation, loss)
        down = None
        if not self.is_last:
            down = Activation(y, metrics["nonfinite_stage"])
        return down, metrics, stats, batch.following(), grads, dx

    def _evaluate_fn(self, params, batch_stats, x):
        # Dropout is off in evaluation. A layer that draws all the same always draws
        # as in batch 0 of seed 0, so that evaluation can be repeated.
        always = BatchId(jnp.uint32(0), jnp.uint32(0))
        return self._apply(params, batch_stats, always, x, train=False)[0]

    def _evaluate_loss_fn(self, params, batch_stats, x, label):
        outputs = self._evaluate_fn(params, batch_stats, x)
        return self._metrics(self._loss_fn(outputs, label), outputs, label)

    def _metrics(self, loss, outputs, label):
        if losses.is_classification(outputs, label):
            return {"loss": loss, "accuracy": losses.accuracy(outputs, label)}
        return {"loss": loss}

    def _first_nonfinite(self, activation, y):
        """Index of the first stage that made a NaN or infinity; K where none did."""
        before = activation.nonfinite_stage
        if before is None:
            before = jnp.int32(self._num_stages)
        finite = [jnp.isfinite(a).all() for a in jax.tree.leaves(y)]
        here = jnp.where(jnp.stack(finite).all(), self._num_stages, self.index)
        return jnp.minimum(before, here.astype(jnp.int32))


def _if_finite(new: Any, old: Any) -> Any:
    """The new arrays if all of them are finite, else the old ones."""
    inexact = [a for a in jax.tree.leaves(new) if jnp.issubdtype(a.dtype, jnp.inexact)]
    if not inexact:
        return new
    finite = jnp.stack([jnp.isfinite(a).all() for a in inexact]).all()
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
