"""FDG in JAX: the library's pipeline, with each of its engines."""

import functools
import itertools

import jax

import fdg_jax as fdg
from benchmarks import jax_bp, stage_times
from benchmarks import task as tasks

RECORDED_BATCHES = 16
"""Batches of the recorded run, besides those that fill the pipeline."""


class Fdg:
    """A pipeline of K stages, run by one engine."""

    def __init__(self, task: tasks.Task, engine: str):
        """Makes the pipeline; stages are built in the warm-up.

        Args:
            task: what to train.
            engine: "threads", "serial" or "fused".
        """
        num_stages = task.num_stages
        # Where there are fewer devices than stages, some share one.
        num_devices = min(len(jax.devices()), num_stages)
        devices = [
            jax.devices()[k * num_devices // num_stages] for k in range(num_stages)
        ]
        self._network = jax_bp.create_network(task)
        self._make_pipeline = functools.partial(
            fdg.Pipeline,
            self._network,
            loss_fn=fdg.softmax_cross_entropy,
            optimizer=jax_bp.create_optimizer(),
            num_stages=num_stages,
            schedule=task.schedule,
            shrink=tasks.SHRINK,
            engine=engine,
            devices=devices,
        )
        cuts = "balanced" if task.cuts is None else task.cuts
        self._pipeline = self._make_pipeline(cuts=cuts)
        batch = jax_bp.create_batch(task)
        last = devices[0] if engine == "fused" else devices[-1]
        self._batch = {
            "image": jax.device_put(batch["image"], devices[0]),
            "label": jax.device_put(batch["label"], last),
        }
        self._round_seconds = task.round_seconds
        self._stage_times = None

    def warm_up(self) -> float:
        """Compiles every stage, and fills the pipeline.

        Returns:
            Seconds of the first batches less those of as many later ones: compiling
            and, with balanced cuts, measuring them, for which stages are compiled.
        """
        count = 2 * self._pipeline.schedule.staleness[0] + 2
        return jax_bp.first_less_later(lambda: self.run(count))

    def run(self, num_batches: int) -> None:
        """Trains, and reads every batch's metrics."""
        self._train(self._pipeline, num_batches)

    def synchronize(self) -> None:
        """All metrics have been read; the pipeline stays filled.

        Upper stages may still compute; ``probe`` waits for them.
        """

    def probe(self) -> dict:
        """Waits for all stages; returns their times, with threads (``stage_times``)."""
        # A snapshot passes every stage behind its last batch, and is read from each.
        _ = self._pipeline.network
        if self._pipeline.engine != "threads":
            return {}
        if self._stage_times is None:
            self._stage_times = stage_times.StageTimes(
                self._pipeline.stages,
                self._network,
                self._batch,
                self._round_seconds / 3,
            )
        return self._stage_times.measure()

    def peak_device_mib(self) -> float | None:
        """Returns the devices' peak memory, the warm-up included."""
        return jax_bp.peak_mib([stage.device for stage in self._pipeline.stages])

    def report(self) -> dict:
        """Returns devices, cuts, the tick that they promised and, with threads, more.

        That is the channels' load, and how busy each stage was in a recorded run.
        """
        stages = self._pipeline.stages
        devices = list(dict.fromkeys(stage.device for stage in stages))
        details = jax_bp.describe_devices(devices)
        if self._pipeline.predicted_tick is not None:
            details["predicted_tick_ms"] = 1e3 * self._pipeline.predicted_tick
        details["cuts"] = [stage.blocks.start for stage in stages[1:]]
        details["staleness"] = [stage.staleness for stage in stages]
        if self._stage_times is not None:
            details["channels"] = self._stage_times.channels
            details["recorded"] = self._record(details["cuts"])
        return details

    def _record(self, cuts: list[int]) -> list[dict[str, float]]:
        """Runs a pipeline like the measured one, which has no recorder, with one."""
        timeline = fdg.Timeline()
        with self._make_pipeline(cuts=cuts, timeline=timeline) as pipeline:
            filling = pipeline.schedule.staleness[0]
            self._train(pipeline, filling + RECORDED_BATCHES)
        return [
            {
                "busy": lane["busy"],
                "work_ms": 1e3 * lane["work"],
                "tick_ms": 1e3 * lane["tick"],
            }
            for lane in timeline.busy()
        ]

    def _train(self, pipeline, num_batches):
        for _ in pipeline.train(itertools.repeat(self._batch, num_batches)):
            pass

    def close(self) -> None:
        """Drains the pipeline."""
        self._pipeline.close()
