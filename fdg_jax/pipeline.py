"""The pipeline: a network cut into stages, an engine that runs them, and its results.

This is the public face of the library: it builds the stages that the user asks for,
feeds batches, and hands back metrics and, in the end, the trained network.
"""

import atexit
import contextlib
import functools
import itertools
import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fdg_jax import blocks as block_functions
from fdg_jax import costs, local_heads, losses, partition, stall
from fdg_jax import pipeline_arguments as arguments
from fdg_jax import schedule as schedules
from fdg_jax import snapshot as snapshots
from fdg_jax.batch import Batch, batch_size, check_batch, own, signature
from fdg_jax.channel import Kind, Message, WaitTimeout
from fdg_jax.data_parallel import DataParallelStage
from fdg_jax.engines import ENGINES, Engine, resolve_engine
from fdg_jax.interrupts import HeldInterrupts
from fdg_jax.local_heads import Head, LocalHead
from fdg_jax.models.network import Network
from fdg_jax.snapshot import Snapshot, StageSnapshot
from fdg_jax.stage import Activation, Stage, StageState
from fdg_jax.stage_optimizer import Optimizer, Progress
from fdg_jax.stall import Patience, StalledError
from fdg_jax.timeline import Timeline
from fdg_jax.words import describe, first_batches, tabulate

_ENDING_SECONDS = 2.0
"""How long an aborted pipeline waits for the threads that only watch its arrays."""


class NonFiniteLossError(ArithmeticError):
    """A loss or a gradient became NaN or infinite.

    What made it changes no parameter: the pipeline can be evaluated, saved, and trained
    on. After a loss every stage holds the values from before the update of that batch.
    After a gradient so do the stages up to the one that it is of; those after it have
    used a few batches more, up to the first forward since. ``batches_applied`` says how
    many. Running statistics may have seen a few more batches.

    Attributes:
        batch: number of the training batch, counted from 0.
        stage: index of the first stage whose output, or whose gradient, was not finite.
    """

    def __init__(self, batch: int, stage: int, loss: float):
        """Creates the error of one batch; its loss is finite if its gradient is not."""
        found = (
            f"the gradient of batch {batch} is not finite in stage {stage}"
            if math.isfinite(loss)
            else f"the loss of batch {batch} is {loss}; the first output that is not "
            f"finite came from stage {stage}"
        )
        super().__init__(
            f"{found}; lower the learning rate or shrink, warm up, or check that the "
            f"labels are in range"
        )
        self.batch = batch
        self.stage = stage


@dataclass
class _Ticket:
    """A result that is still to come, in the order in which results come.

    Attributes:
        kind: of the message that asked for it.
        batch: number of the batch, or of the one that comes next.
        message: the engine's answer, once it is there.
        result: what the caller gets, once it has been read.
        done: whether it has.
    """

    kind: Kind
    batch: int
    message: Message | None = None
    result: Any = None
    done: bool = False


class PendingSnapshot:
    """A snapshot that is on its way through the stages.

    Attributes:
        batch: number of the batch that comes after it.
    """

    def __init__(self, pipeline: "Pipeline", ticket: _Ticket):
        """Called by ``Pipeline.snapshot``."""
        self.batch = ticket.batch
        self._pipeline = pipeline
        self._ticket = ticket

    def result(self) -> Snapshot:
        """Returns the snapshot; waits until the marker has passed every stage.

        The arrays may still be computed when this returns.
        """
        self._pipeline._settle(self._ticket)
        return self._ticket.result


class Pipeline:
    """A network trained with delayed gradients, one stage per device.

    Example::

        pipeline = fdg.Pipeline(network, loss_fn=fdg.softmax_cross_entropy,
                                optimizer=optax.sgd(0.1, momentum=0.9), num_stages=2)
        with pipeline:
            for metrics in pipeline.train(batches):
                ...
            accuracy = pipeline.evaluate(test_batches)
        trained = pipeline.network
    """

    def __init__(
        self,
        network: Sequence[nnx.Module],
        *,
        loss_fn: Callable[[Any, Any], Any],
        optimizer: Optimizer,
        num_stages: int,
        metrics: Mapping[str, losses.Metric] | None = None,
        cuts: str | Sequence[int] = "balanced",
        schedule: str | Sequence[int] | schedules.Schedule = "reference",
        shrink: float | optax.Schedule = 1.0,
        backward: str = "stored",
        accumulation: int = 1,
        local_head: LocalHead | None = None,
        replicas: int = 1,
        engine: str = "auto",
        devices: Sequence[jax.Device] | None = None,
        seed: int = 0,
        channel_capacity: int = 2,
        timeline: Timeline | None = None,
        jit: Callable = jax.jit,
        stall_timeout: float | None = None,
        loss_scale: float = 1.0,
        skip_nonfinite: int = 0,
    ):
        """Checks the request; stages are built for the first batch.

        Args:
            network: blocks, called one after the other; left as it is, and what is
                done to it afterwards has no effect.
            loss_fn: ``loss_fn(outputs, label)`` returns the scalar mean over the
                examples of the batch, or a pair ``(sum, count)`` if the loss is a mean
                over something else; see ``fdg_jax.losses``.
            optimizer: Optax transform, used by every stage for its own parameters
                only: a stage counts its own updates, and a norm over all gradients
                (``optax.clip_by_global_norm``) is one over the stage's. The parameters
                are a dict from a block's position in the network to its own, so a path
                is the same for every K. Or a function from ``StageInfo`` to such a
                transform, for optimizers that depend on a stage's staleness.
            num_stages: K.
            metrics: what else to compute of outputs and label, by name; each function
                returns what a ``loss_fn`` may. None is the accuracy if the loss is
                ``softmax_cross_entropy``, and nothing with any other.
            cuts: where stages begin: positions, "paper", or "balanced", which times
                blocks on the first device and then whole stages on theirs, without
                their local heads, and says so on the logger "fdg_jax".
            schedule: "bp", "minimal", "reference", "paper", or staleness per stage.
            shrink: beta in (0, 1], or an Optax schedule of it.
            backward: "stored" (residuals), "recompute" (old weights) or "replay"
                (today's weights).
            accumulation: M; the mean of M batches' gradients makes one update.
            local_head: makes a head for each stage but the last, with which it is
                trained on a loss of its own; no cotangents are sent then. It is called
                with the stage's output and the network's, both abstract, and with
                ``nnx.Rngs``. Heads are no part of ``network``.
            replicas: devices that share out every batch of a single stage.
            engine: "serial", "threads", "fused" or "auto".
            devices: where stages go, in order; ``jax.devices()`` by default.
            seed: source of the random layers.
            channel_capacity: activations that a channel between stages holds.
            timeline: an unused ``Timeline``, to record what every stage does when.
            jit: what compiles the fused engine's program; see ``engines.together``.
            stall_timeout: seconds without any result, compilation included, after
                which training fails and says what every stage waits for; None waits
                for as long as it takes. What hangs in the caller's own thread cannot
                be given up, so it is of most use with threads.
            loss_scale: factor of the loss in the backward, so that cotangents in
                float16 do not vanish; gradients are divided by it before they are used.
            skip_nonfinite: how many batches in a row may have a loss or a gradient that
                is not finite. A stage leaves such a batch out: parameters and optimizer
                state stay as they are, so its schedules count one update less
                (``skipped_updates``). So do the stages before it; one after it, whose
                gradient was finite, has used it by then. At the next in a row, with 0,
                the default, at the first, a stage halts, and training fails with
                ``NonFiniteLossError``.

        Raises:
            ValueError: an argument is not valid; says what would be.
        """
        arguments.check_values(
            network=network,
            shrink=shrink,
            backward=backward,
            accumulation=accumulation,
            seed=seed,
            channel_capacity=channel_capacity,
            stall_timeout=stall_timeout,
            loss_scale=loss_scale,
            skip_nonfinite=skip_nonfinite,
        )
        self._original = list(network)
        self._name = getattr(network, "name", "custom")
        self._cuts = partition.resolve_cuts(
            cuts,
            num_stages=num_stages,
            num_blocks=len(self._original),
            network_name=self._name,
        )
        self._schedule = schedules.resolve(schedule, num_stages)
        arguments.check_schedule(self.schedule, local_head, shrink, skip_nonfinite)
        devices = tuple(jax.devices() if devices is None else devices)
        if not devices:
            raise ValueError("devices must name at least one device; got none")
        arguments.check_replicas(replicas, num_stages, len(devices))
        self._engine_name = resolve_engine(engine, self.schedule, len(devices))
        self._devices = arguments.place(devices, num_stages, engine, self.engine)
        self._blocks, self._params, self._batch_stats = block_functions.split_network(
            self._original
        )
        arguments.check_optimizer(
            optimizer, self.schedule, accumulation, backward, self._cuts, self._params
        )
        self._loss_fn, self._local_head = loss_fn, local_head
        self._metrics = losses.metrics_of(loss_fn, metrics)
        self._replicas = replicas
        make_stage = Stage
        if replicas != 1:
            make_stage = functools.partial(
                DataParallelStage, devices=devices[:replicas]
            )
        self._make_stage = functools.partial(
            make_stage,
            num_stages=num_stages,
            loss_fn=loss_fn,
            metrics=self._metrics,
            optimizer=optimizer,
            shrink_factor=shrink,
            backward=backward,
            seed=seed,
            drain_every=self.schedule.drain_every,
            accumulation=accumulation,
            loss_scale=loss_scale,
            skip_nonfinite=skip_nonfinite,
        )
        self._seed, self._accumulation = seed, accumulation
        self._skip_nonfinite, self._nonfinite_in_a_row = skip_nonfinite, 0
        self._capacity = channel_capacity
        self._engine_options = {"jit": jit} if self.engine == "fused" else {}
        self._patience, self._longest_wait = Patience(stall_timeout), 0.0
        self._timeline = timeline
        if timeline is not None:
            timeline.take()
        self._stages = ()
        self._checked = set()
        self._stage_seconds = ()
        self._balancing_seconds = None
        self._snapshot = None
        self._failure = None
        self._engine = None
        self._finalizer = None
        self._pending, self._unread = deque(), deque()
        self._stopping, self._is_giving_up, self._has_halted = None, False, False
        self._next_batch = 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses assignments, which would change nothing that has been built.

        Raises:
            AttributeError: the name is not one of the pipeline's own.
        """
        if not name.startswith("_"):
            raise AttributeError(
                f"a pipeline's arguments are fixed when it is made; got an assignment "
                f"to {name!r}; make a new pipeline, of pipeline.network if it is to "
                f"have what was trained"
            )
        super().__setattr__(name, value)

    @property
    def schedule(self) -> schedules.Schedule:
        """Staleness per stage."""
        return self._schedule

    @property
    def engine(self) -> str:
        """Name of the engine."""
        return self._engine_name

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages; none before the first batch has been seen."""
        return self._stages

    @property
    def num_batches(self) -> int:
        """How many batches have gone in: the number of the next one."""
        return self._next_batch

    @property
    def batches_applied(self) -> list[int]:
        """Per stage the batches whose gradients are in its parameters.

        n stands for the batches 0 to n - 1, less those that were left out because
        something was not finite. With ``accumulation`` the last of them may still wait
        for others to make an update with. All stages have the same n when the pipeline
        was closed, unless a gradient was not finite; while it runs, stage k is s_k
        batches behind. Waits for the batches that have gone in.
        """
        return [int(progress.next_gradient) for progress in self._progress()]

    def build(self, batch: Batch) -> None:
        """Checks shapes with an example batch, cuts the network and places the stages.

        Called by ``train`` and ``evaluate``; stages are built for the first batch, and
        batches of another shape are checked against the blocks.

        Args:
            batch: a dict with "image" and "label", arrays (or ``ShapeDtypeStruct``s)
                with the same leading axis.

        Raises:
            ValueError: the batch, a block or the loss does not fit what comes before.
        """
        check_batch(batch)
        data = signature((batch["image"], batch["label"]))
        if data in self._checked:
            return
        values = (self._blocks, self._params, self._batch_stats)
        shapes = block_functions.trace_shapes(*values, batch["image"])
        losses.check_loss(self._loss_fn, shapes[-1], batch["label"])
        losses.check_metrics(self._metrics, shapes[-1], batch["label"])
        if self._cuts is not None:
            partition.check_activations(self._blocks, shapes, self._cuts)
        if not self.stages:
            self._cut(shapes, batch["label"])
        self._check_weights(batch, shapes)
        self._checked.add(data)

    def _check_weights(self, batch: Batch, shapes: Sequence[Any]) -> None:
        """Refuses a batch whose size a stage with a loss cannot tell, but needs."""
        value = jax.eval_shape(self._loss_fn, shapes[-1], batch["label"])
        if self._accumulation == 1 or isinstance(value, tuple):
            return
        for stage in self.stages:
            x = shapes[stage.blocks.start]
            size = losses.num_examples(batch["label"], x)
            if stage.has_loss and size != batch_size(batch):
                raise ValueError(
                    f"with accumulation a batch of {batch_size(batch)} counts as its "
                    f"size, which must be the leading axis of what stage {stage.index} "
                    f"is given; got {describe(x)}; have loss_fn return (sum, count), "
                    f"or give the batch a label"
                )

    def _cut(self, shapes: Sequence[Any], label: Any) -> None:
        """Makes the stages and their states, knowing the input of every block."""
        timed = {}

        def time_stages(cuts):
            timed[cuts] = self._make_stages(cuts, shapes, lambda index: jax.jit)
            return costs.time_stages(
                timed[cuts], self._params, self._batch_stats, shapes, label
            )

        if self._cuts is None:
            self._cuts, self._stage_seconds, self._balancing_seconds = costs.balance(
                self._make_stage,
                *(self._blocks, self._params, self._batch_stats),
                shapes,
                label,
                time_stages=time_stages,
                staleness=self.schedule.staleness[0],
                devices=self._devices,
            )
        cuts = self._cuts
        heads = self._make_heads(cuts, shapes, label)
        if self._timeline is not None or any(heads) or cuts not in timed:
            timed[cuts] = self._make_stages(cuts, shapes, self._jit, heads)
        states = map(self._init, timed[cuts], heads)
        snapshot = Snapshot(self._next_batch, tuple(map(StageSnapshot, states)))
        self._snapshot, self._stages = snapshot, timed[cuts]

    def _init(self, stage: Stage, head: Head | None) -> StageState:
        params = [self._params[i] for i in stage.blocks]
        batch_stats = [self._batch_stats[i] for i in stage.blocks]
        if head is not None:
            params.append(head.params)
            batch_stats.append(head.batch_stats)
        return stage.init(params, batch_stats, self._next_batch)

    def _make_heads(
        self, cuts: Sequence[int], shapes: Sequence[Any], label: Any
    ) -> list[Head | None]:
        """Makes the heads of all stages but the last, where they are to have any."""
        if self._local_head is None:
            return [None] * self.schedule.num_stages
        heads = [
            local_heads.make(
                self._local_head,
                *(shapes[cut], shapes[-1], label, self._loss_fn),
                position=len(self._blocks) + cut,
                seed=self._seed,
            )
            for cut in cuts
        ]
        return [*heads, None]

    def _make_stages(
        self,
        cuts: Sequence[int],
        shapes: Sequence[Any],
        jit: Callable[[int], Callable],
        heads: Sequence[Head | None] | None = None,
    ) -> tuple[Stage, ...]:
        """Cuts the network; ``jit`` says by a stage's index what compiles it."""
        values = (self._blocks, self._params, self._batch_stats)
        bounds = [0, *cuts, len(self._blocks)]
        heads = heads or [None] * self.schedule.num_stages
        return tuple(
            self._make_stage(
                index=k,
                runs=block_functions.group_runs(
                    *values, shapes, first=first, stop=stop
                ),
                staleness=self.schedule.staleness[k],
                device=self._devices[k],
                head=None if heads[k] is None else heads[k].run,
                sends_up=k > 0 and heads[k - 1] is None,
                jit=jit(k),
            )
            for k, (first, stop) in enumerate(itertools.pairwise(bounds))
        )

    def _jit(self, index: int) -> Callable:
        """What compiles a stage's functions; the fused engine has them compile none."""
        if self._timeline is None or self.engine == "fused":
            return jax.jit
        return self._timeline.lane(f"stage {index}", self._devices[index]).jit

    def summary(self) -> str:
        """Returns a table of the stages, once they are built.

        Columns: device, positions and kinds of blocks, parameters, with balanced cuts
        the predicted time per batch, staleness, and the power of shrink. Below, the
        predicted tick (see ``predicted_tick``), and how long the balancing took.
        """
        predicted = self._stage_seconds
        header = ["stage", "device", "blocks", "", "parameters"]
        header += ["predicted"] * bool(predicted) + ["staleness", "shrink power"]
        rows = [header]
        for k, stage in enumerate(self.stages):
            kinds = [type(self._original[i]).__name__ for i in stage.blocks]
            params = [self._params[i] for i in stage.blocks]
            row = [
                f"{stage.index}",
                f"{stage.device.platform}:{stage.device.id}",
                f"{stage.blocks.start}-{stage.blocks.stop - 1}",
                block_functions.describe_blocks(kinds),
                f"{block_functions.count_elements(params):,}",
            ]
            row += [f"{1e3 * seconds:.1f} ms" for seconds in predicted[k : k + 1]]
            rows.append([*row, f"{stage.staleness}", f"{stage.shrink_power}"])
        table = tabulate(rows)
        if self.predicted_tick:
            table += (
                f"\npredicted tick {1e3 * self.predicted_tick:.1f} ms; balancing took "
                f"{self._balancing_seconds:.1f} s"
            )
        return table

    @property
    def predicted_tick(self) -> float | None:
        """Seconds per batch, from what each stage took when cuts were balanced.

        To be compared with the time between two batches of a filled pipeline: the batch
        size over the images per second that were trained. None with other cuts.
        """
        if not self._stage_seconds:
            return None
        devices = [stage.device for stage in self.stages]
        return costs.tick(self._stage_seconds, self.schedule.staleness, devices)

    def train(self, batches: Iterable[Batch]) -> Iterator[dict[str, float]]:
        """Trains on batches, and yields the metrics of each, in order.

        Lazy: batches are drawn, and the pipeline runs, as metrics are asked for; some
        batches are drawn ahead to keep the stages busy. The pipeline stays filled at
        the end, so a further call goes on as if there had been one. If a call was left
        early, or interrupted, the metrics that it has not yielded come first.

        Args:
            batches: dicts with "image" [batch, ...] and "label" [batch, ...].

        Yields:
            Per batch a dict with "loss", the metrics of the pipeline, and "batch", the
            number of the batch, counted from 0.

        Raises:
            ValueError: a batch does not fit.
            NonFiniteLossError: a loss or a gradient became NaN or infinite.
        """
        for batch in batches:
            self._submit(Kind.TRAIN, batch)
            while self._unread and self._unread[0].done:
                yield self._unread.popleft().result
        while self._unread:
            self._settle(self._unread[0])
            yield self._unread.popleft().result

    def evaluate_metrics(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Evaluates in the midst of training, without stopping the pipeline.

        Stage k uses the weights with which it would train on the next batch.

        Args:
            batches: as for ``train``; sizes may differ.

        Returns:
            "loss" and the metrics of the pipeline, means over all examples, or over
            all that pairs ``(sum, count)`` count; and "batch", the number of the
            training batch that comes next: more batches may have gone in than
            ``train`` has yielded metrics of.

        Raises:
            ValueError: there is no batch, or a batch does not fit.
        """
        tickets = [
            (self._submit(Kind.EVALUATE, batch), batch_size(batch)) for batch in batches
        ]
        if not tickets:
            raise ValueError("evaluation needs at least one batch; got none")
        sums, counts = Counter(), Counter()
        for ticket, size in tickets:
            self._settle(ticket)
            for name, value in ticket.result.items():
                is_total = isinstance(value, losses.Total)
                value, count = value if is_total else (value * size, size)
                sums[name] += value
                counts[name] += count
        means = {name: _quotient(sums[name], counts[name]) for name in sums}
        return means | {"batch": tickets[0][0].batch}

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Returns the accuracy over batches; see ``evaluate_metrics``.

        Raises:
            ValueError: the pipeline has no metric of that name.
        """
        if "accuracy" not in self._metrics:
            raise ValueError(
                "the pipeline computes no accuracy, since only with the loss "
                "softmax_cross_entropy the outputs are known to be class scores; give "
                'it metrics={"accuracy": fdg.accuracy} if they are, or use '
                "evaluate_metrics"
            )
        return self.evaluate_metrics(batches)["accuracy"]

    @property
    def steps_per_call(self) -> int:
        """How many batches' metrics the engine gives at a time."""
        return ENGINES[self.engine].burst

    @property
    def network(self) -> Network:
        """The network with today's values, whole, on the first device, to evaluate.

        While the pipeline runs these are the values that evaluation would use; after
        it was closed every gradient has been applied. ``batches_applied`` says which.
        """
        if not self.stages:
            params, batch_stats = self._params, self._batch_stats
        else:
            snapshot = self.snapshot().result()
            params, batch_stats = [], []
            for stage, taken in zip(self.stages, snapshot.stages, strict=True):
                stage_params, stage_stats = stage.block_values(taken.state)
                params += stage_params
                batch_stats += stage_stats
        return block_functions.join_network(
            self._original, params, batch_stats, self._devices[0], self._name
        )

    @property
    def skipped_updates(self) -> list[int]:
        """How many updates each stage has left out, where ``skip_nonfinite`` allows it.

        Waits for the batches that have gone in.
        """
        return [int(progress.skipped) for progress in self._progress()]

    def _progress(self) -> list[Progress]:
        """How far each stage has come, on the host."""
        if not self.stages:
            return [Progress(0, 0, 0, False)] * self.schedule.num_stages
        if self._engine is not None:
            stages = self.snapshot().result().stages
        else:
            self._refuse_lost()
            stages = self._snapshot.stages
        return jax.device_get([taken.state.progress for taken in stages])

    def snapshot(self) -> "PendingSnapshot":
        """Asks for all that the pipeline is made of now, in the midst of training.

        The pipeline goes on meanwhile: a marker follows the batches that have gone in.

        Returns:
            What will hold the snapshot, and knows the number of the batch after it.

        Raises:
            RuntimeError: no batch has been seen yet, or the pipeline was aborted.
        """
        if not self.stages:
            raise RuntimeError(
                "a pipeline has stages to take a snapshot of once it has seen a batch; "
                "call build or train first"
            )
        if self._stopping is not None:
            self.close()
        if self._engine is not None:
            return PendingSnapshot(self, self._submit(Kind.SNAPSHOT))
        self._refuse_lost()
        # Copies, because an engine will be given these buffers, and give them up.
        stages = tuple(
            taken._replace(state=jax.tree.map(jnp.copy, taken.state))
            for taken in self._snapshot.stages
        )
        snapshot = self._snapshot._replace(stages=stages)
        return PendingSnapshot(
            self, _Ticket(Kind.SNAPSHOT, snapshot.batch, result=snapshot, done=True)
        )

    def abstract_snapshot(
        self, batch: Batch, number: int, lengths: Sequence[Sequence[int]]
    ) -> Snapshot:
        """Returns the structure and shapes of a snapshot that ``restore`` would take.

        Args:
            batch: an example batch, arrays or abstract.
            number: of the batch that comes after the snapshot.
            lengths: as ``Snapshot.lengths`` returns them.
        """
        self.build(batch)
        known = self._snapshot or self.snapshot().result()
        states = [taken.state for taken in known.stages]
        image = block_functions.abstract(batch["image"])
        return snapshots.abstract(self.stages, states, image, number, lengths)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot, as if nothing had been in between.

        Args:
            snapshot: of a pipeline like this one; it is given up to the pipeline.

        Raises:
            RuntimeError: this pipeline is running, or has seen no batch yet.
        """
        if self._engine is not None or not self.stages:
            raise RuntimeError(
                "a pipeline goes on from a snapshot after it was built and before it "
                "trains; call build, then restore"
            )
        snapshot = snapshot._replace(
            stages=tuple(
                jax.device_put(taken, stage.placement)
                for stage, taken in zip(self.stages, snapshot.stages, strict=True)
            ),
        )
        progress = [taken.state.progress.is_halted for taken in snapshot.stages]
        has_halted = any(jax.device_get(progress))
        with HeldInterrupts():
            self._snapshot, self._failure = snapshot, None
            self._has_halted = has_halted
            self._unread.clear()
            self._next_batch = snapshot.batch
            self._nonfinite_in_a_row = snapshot.nonfinite

    def close(self) -> None:
        """Drains the pipeline: every stage applies the gradients that are under way.

        A later ``train`` fills it anew. An interrupted call may be made again.

        Raises:
            NonFiniteLossError: one of the last gradients was NaN or infinite.
        """
        if self._engine is None:
            if self._failure or not self._snapshot or not self._snapshot.in_flight:
                return
            self._start()  # it was restored, and has not been asked for anything yet
        self._drain()
        self._refuse_halted()

    def _drain(self) -> None:
        """Has every stage apply what is under way, and ends the engine."""
        if self._stopping is None:
            self._submit(Kind.STOP)
        self._settle(self._stopping)
        with HeldInterrupts():
            self._snapshot = self._stopping.result
            self._end_engine()

    def abort(self, wait: bool = True) -> None:
        """Stops at once; what is in flight is lost, and training cannot go on.

        What each stage has trained stays: see ``batches_applied``.

        Args:
            wait: whether to wait until devices have done what they were told, for some
                seconds; False if they do not answer.
        """
        if self._engine is not None:
            self._break(RuntimeError("the pipeline was told to abort"), wait)

    @contextlib.contextmanager
    def stall_limit(self, seconds: float) -> Iterator[None]:
        """Within, ``seconds`` take the place of ``stall_timeout``."""
        before = self._patience.seconds
        try:
            self._patience.seconds = seconds
            yield
        finally:
            self._patience.seconds = before

    def __enter__(self) -> "Pipeline":
        """Returns the pipeline; leaving the block drains and closes it."""
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        """Drains and closes the pipeline, also after an error of the block's own.

        Then a note on the error says which batches the pipeline holds.
        """
        if error_type is None:
            self.close()
            return
        if isinstance(error, StalledError):
            self.abort(wait=False)
        elif self._engine is not None:
            self._close_after(error)
        if self.stages:
            error.add_note(self._held())

    def _close_after(self, error: BaseException) -> None:
        """Drains after an error, if devices answer and nobody interrupts again."""
        # Every stage has up to s_0 gradients to apply before anything comes out.
        usual = (2 + self.schedule.staleness[0]) * self._longest_wait
        limit = max(self._patience.seconds or stall.LEAVING_SECONDS, usual)
        try:
            with self.stall_limit(limit):
                self.close()
        except NonFiniteLossError as nonfinite:
            error.add_note(str(nonfinite))
        except BaseException as another:
            error.add_note(f"and while the pipeline was drained: {another!r}")
            if self._engine is not None:
                self._break(another, wait=not isinstance(another, StalledError))

    def _held(self) -> str:
        """Says which batches the pipeline holds."""
        if self._snapshot is None:
            return (
                "what the pipeline has trained is lost: its arrays are results of what "
                "failed, were given up to it, or are on a device that does not answer"
            )
        return (
            f"of the {self._next_batch} batches that have gone in, the pipeline holds "
            f"the updates of {first_batches(self.batches_applied)}; its network, "
            f"evaluate and snapshot still work"
        )

    def _start(self) -> None:
        """Starts the engine from where it was the last time that it ran."""
        self._refuse_lost()
        with HeldInterrupts():
            self._engine = ENGINES[self.engine](
                self.stages,
                self._snapshot,
                self.schedule,
                capacity=self._capacity,
                timeline=self._timeline,
                patience=self._patience,
                **self._engine_options,
            )
            # Its threads must not outlive a pipeline that nobody closed.
            self._finalizer = weakref.finalize(
                self, _forget, self._engine, self._patience, self._timeline
            )
            self._finalizer.atexit = False
            _ENGINES.add(self._engine)
            self._snapshot = None

    def _resume(self) -> None:
        """Has stages that have halted go on from where the pipeline was drained."""
        every = self.schedule.drain_every
        if every and self._next_batch % every:
            raise RuntimeError(
                f"a schedule that drains every {every} batches goes on at a multiple "
                f"of them; this pipeline has halted after {self._next_batch}; make a "
                f"new one, of its network if you like"
            )
        if self._engine is not None:
            self._drain()  # it was evaluated
        stages = tuple(
            taken._replace(state=stage.resume(taken.state, self._next_batch))
            for stage, taken in zip(self.stages, self._snapshot.stages, strict=True)
        )
        with HeldInterrupts():
            self._snapshot = self._snapshot._replace(stages=stages)
            self._has_halted = False

    def _end_engine(self, seconds: float | None = None) -> None:
        """Forgets an engine that has ended, and ends the threads that only watch."""
        self._finalizer.detach()
        self._patience.end(seconds)
        if self._timeline is not None:
            self._timeline.stop(seconds)
        self._engine = self._stopping = None
        self._pending.clear()
        self._unread = deque(ticket for ticket in self._unread if ticket.done)

    def _break(self, error: BaseException, wait: bool = True) -> None:
        """Gives the engine up, and keeps what its stages have trained if it can."""
        engine = self._engine
        with HeldInterrupts():
            engine.abort(wait=wait)
            self._failure = error
            stages = [_salvage(state, copy=not wait) for state in engine.states()]
            if all(state is not None for state in stages):
                stages = tuple(map(StageSnapshot, stages))
                self._snapshot = Snapshot(self._next_batch, stages)
            self._end_engine(_ENDING_SECONDS if wait else 0.0)

    def _refuse_lost(self) -> None:
        if self._snapshot is None:
            raise RuntimeError(
                f"this pipeline was stopped by an error, and what it has trained could "
                f"not be kept; make a new one; the error was: {self._failure!r}"
            )

    def _refuse_halted(self, before: float = math.inf) -> None:
        """Looks at a drained pipeline for gradients that were not finite.

        Args:
            before: number of a batch; a stage that has halted at it is no news.

        Raises:
            NonFiniteLossError: names the first batch at which a stage has halted, and
                the last such stage, where the gradient was made.
        """
        halted = [
            (int(progress.next_gradient), -k)
            for k, progress in enumerate(self._progress())
            if progress.is_halted and progress.next_gradient < before
        ]
        if halted and not self._has_halted:
            self._has_halted = True
            batch, stage = min(halted)
            raise NonFiniteLossError(batch, -stage, 0.0)

    def _submit(self, kind: Kind, batch: Batch | None = None) -> _Ticket:
        """Sends a message down the pipeline; its result will fill the ticket."""
        if kind is Kind.TRAIN and self._failure is not None:
            raise RuntimeError(
                f"this pipeline was stopped in the midst of a batch, and cannot train "
                f"on; make a new one, of its network if you like; it was stopped by: "
                f"{self._failure!r}"
            )
        if batch is not None:
            self.build(batch)
            if kind is Kind.TRAIN and batch_size(batch) % self._replicas:
                raise ValueError(
                    f"{self._replicas} replicas share out a batch equally; got one of "
                    f"{batch_size(batch)} examples"
                )
        if self._stopping is not None and kind is not Kind.STOP:
            self.close()  # it was interrupted
        if self._has_halted and kind is Kind.TRAIN:
            self._resume()
        if self._engine is None:
            self._start()
        while len(self._pending) >= self._engine.window:
            self._settle_next()
        with self._watched():
            self._engine.await_room()
        payload = label = None
        if batch is not None:
            payload = Activation(own(batch["image"]))
            label = Message(kind, self._next_batch, own(batch["label"]))
        ticket = _Ticket(kind, self._next_batch)
        with self._watched(), HeldInterrupts():
            self._engine.put(Message(kind, ticket.batch, payload), label)
            self._pending.append(ticket)
            if kind is Kind.TRAIN:
                self._unread.append(ticket)
                self._next_batch += 1
            elif kind is Kind.STOP:
                self._stopping = ticket
        return ticket

    def _settle(self, ticket: _Ticket) -> None:
        """Waits for the result of a ticket."""
        while not ticket.done:
            self._settle_next()

    def _settle_next(self) -> None:
        """Waits for the next result. Reading metrics here is what paces the devices."""
        if self._engine is None:
            raise RuntimeError(
                f"this pipeline was stopped before the result came; it was stopped by: "
                f"{self._failure!r}"
            )
        ticket = self._pending[0]
        if ticket.message is None:
            with self._watched(), self._timed():
                self._engine.await_result()
            with self._watched(), HeldInterrupts():
                ticket.message = self._engine.get()
        message = ticket.message
        assert (message.kind, message.batch) == (ticket.kind, ticket.batch)
        result = message.payload
        if ticket.kind in (Kind.SNAPSHOT, Kind.STOP):
            # Results come in order, so this is the count of just its batches.
            result = result._replace(nonfinite=self._nonfinite_in_a_row)
        else:
            result = jax.tree.map(lambda a: a.tolist(), self._read(message))
        error = None
        with HeldInterrupts():
            if ticket.kind is Kind.TRAIN:
                error = self._look_at(ticket.batch, result)
            ticket.result, ticket.message, ticket.done = result, None, True
            self._pending.popleft()
        if error is not None:
            self._give_up_batches(error)

    def _look_at(self, batch: int, result: dict) -> NonFiniteLossError | None:
        """Makes what the user gets of a batch's metrics; returns what is wrong."""
        stage, halted = result.pop("nonfinite")
        for name, value in result.items():
            if isinstance(value, losses.Total):
                result[name] = _quotient(*value)
        result["batch"] = batch
        if self._is_giving_up:
            return None
        is_finite = math.isfinite(result["loss"])
        self._nonfinite_in_a_row = 0 if is_finite else self._nonfinite_in_a_row + 1
        if halted < self.schedule.num_stages:
            return NonFiniteLossError(batch, halted, 0.0)  # at an earlier batch
        if self._nonfinite_in_a_row > self._skip_nonfinite:
            return NonFiniteLossError(batch, stage, result["loss"])
        return None

    def _give_up_batches(self, error: NonFiniteLossError) -> None:
        """Drains a pipeline that has halted, so that all its stages hold the same.

        Raises:
            NonFiniteLossError: the one that is given, or that of an earlier gradient.
        """
        try:
            self._is_giving_up = True
            self._nonfinite_in_a_row = 0
            self._drain()
        finally:
            self._is_giving_up = False
        self._unread = deque(t for t in self._unread if t.batch < error.batch)
        self._refuse_halted(before=error.batch)
        self._has_halted = True
        raise error

    def _read(self, message: Message) -> dict[str, Any]:
        """Waits for the metrics of a batch, and fetches them."""
        try:
            with self._watched(), self._timed():
                self._patience.wait_for(message.payload)
            return jax.device_get(message.payload)
        except RuntimeError as error:
            if not isinstance(error, StalledError):
                # What a device reports late, no stage could be blamed for.
                error.add_note(
                    f"raised by a device, in or before batch {message.batch}"
                )
                self._break(error)
            raise

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Notes how long a result may take to come, also if somebody interrupts."""
        began = time.monotonic()
        try:
            yield
        finally:
            waited = time.monotonic() - began
            self._longest_wait = max(self._longest_wait, waited)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Gives the engine up if it has failed, and says why nothing comes out of it.

        Anything else, such as an interrupt, leaves the engine as it is.
        """
        try:
            yield
        except WaitTimeout:
            raise self._stalled() from None
        except BaseException:
            if self._engine.failure is not None:
                self._break(self._engine.failure)
            raise

    def _stalled(self) -> StalledError:
        """Returns an error that says what everybody waits for."""
        first = self._pending[0] if self._pending else None
        awaited = "room for the next batch"
        if first is not None:
            awaited = f"the result of {first.kind.value} {first.batch}"
        lines = [
            f"nothing has come out for {self._patience.seconds:g} seconds, the time of "
            f"stall_timeout; still awaited: {awaited}",
            *self._engine.describe(),
        ]
        return StalledError("\n".join(lines))


def _quotient(total: float, count: float) -> float:
    return total / count if count else math.nan


def _salvage(state: StageState, copy: bool) -> StageState | None:
    """Returns a state if all its arrays are there, and were computed without error.

    Args:
        state: as a stage has left it.
        copy: whether the stage may still be at work, and give its arrays up.
    """
    arrays = jax.tree.leaves(state)
    if any(array.is_deleted() or not stall.is_ready(array) for array in arrays):
        return None
    try:
        if copy:
            state = jax.tree.map(jnp.copy, state)
            stall.wait_before_leaving(state, _ENDING_SECONDS)
            if not all(map(stall.is_ready, jax.tree.leaves(state))):
                return None
        return jax.block_until_ready(state)
    except (RuntimeError, ValueError):
        return None  # they are results of what has failed, or have just been given up


_ENGINES = weakref.WeakSet()
"""Engines that may be at work; their threads keep them here."""


@atexit.register
def _leave() -> None:
    """Has XLA come to rest before the process ends."""
    for engine in list(_ENGINES):
        engine.abort()


def _forget(engine: Engine, patience: Patience, timeline: Timeline | None) -> None:
    """Tells what works for a forgotten pipeline to end; what is in flight is lost.

    The garbage collector may call it in any thread and in the midst of any call, of
    JAX's too, so it asks no device and waits for nothing.
    """
    engine.abort(wait=False)
    patience.end(seconds=0.0)
    if timeline is not None:
        timeline.end()
