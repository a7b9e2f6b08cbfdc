"""What a run tells while it trains: files, the progress bar, lines on standard output.

All that it will need to go on later with the same words is in ``Report.state``.
"""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from fdg_jax.metrics import MetricsWriter, ProgressBar, RunningMean, Throughput
from fdg_jax.optimizers import LearningRate

# So many batches, and s_0 more, do not count for images per second: compilation lies in
# them. A stage sends batch n down after its turn n - 1, so once batch s_0 + 1 is out
# every stage has compiled all its functions; the fused engine gives batches in bursts.
_WARMUP_BATCHES = 16


class Report:
    """What a run tells: files, the progress bar, and lines on standard output.

    Use it as a context manager.

    Attributes:
        step: batches trained so far.
        evaluations: step and test accuracy of each so far.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: ml_collections.ConfigDict,
        *,
        steps_per_epoch: int,
        learning_rate: LearningRate,
        staleness: int,
        burst: int,
        accumulation: int = 1,
        state: Mapping[str, Any] | None = None,
    ):
        """Opens the files.

        Args:
            workdir: an existing folder; logs in it are gone on with.
            config: as in configs/default.py.
            steps_per_epoch: batches in an epoch.
            learning_rate: by update count.
            staleness: of the first stage, in batches.
            burst: batches whose metrics come together.
            accumulation: batches that make an update.
            state: to go on from, as ``state`` returned it.
        """
        state = state or {"step": 0, "seconds": 0.0, "evaluations": [], "means": {}}
        self.step = state["step"]
        self.evaluations = [tuple(pair) for pair in state["evaluations"]]
        self._config = config
        self._steps_per_epoch = steps_per_epoch
        self._learning_rate = learning_rate
        self._accumulation = accumulation
        self._started = time.perf_counter() - state["seconds"]
        self._means = RunningMean(**state["means"])
        self._throughput = Throughput(warmup=staleness + _WARMUP_BATCHES, burst=burst)
        self._total = config.num_epochs * steps_per_epoch
        self._bar = ProgressBar(self._total, done=self.step, shown=config.progress)
        self._writer = MetricsWriter(workdir, self.step)

    def state(self) -> dict[str, Any]:
        """Returns what it takes to go on from here, as JSON; the logs are on disk.

        Raises:
            OSError: they are not, since the disk does not take them.
        """
        self._writer.flush()
        return {
            "step": self.step,
            "seconds": self.seconds,
            "evaluations": list(self.evaluations),
            "means": self._means.state(),
        }

    @property
    def is_evaluated(self) -> bool:
        """Whether the network of this step has been evaluated."""
        return bool(self.evaluations) and self.evaluations[-1][0] == self.step

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken so far, in all its parts."""
        return time.perf_counter() - self._started

    def __enter__(self) -> "Report":
        """Returns itself."""
        return self

    def __exit__(self, *exception) -> None:
        """Closes the bar and the files."""
        self._bar.close()
        try:
            self._writer.close()
        except OSError as error:
            self.say(f"the last metrics could not be written: {error}")

    def say(self, text: str) -> None:
        """Prints to standard output."""
        self._bar.print(text)

    def batch(self, metrics: Mapping[str, float]) -> None:
        """Takes in one batch; logs every ``log_every_steps``, and after the last."""
        config = self._config
        self.step += 1
        metrics = {f"train_{k}": v for k, v in metrics.items() if k != "batch"}
        self._means.add(metrics)
        self._throughput.add(config.batch_size // self._accumulation)
        self._bar.advance()
        if self.step % config.log_every_steps == 0 or self.step == self._total:
            logged = self._means.take()
            # That of the update which this batch's gradient makes.
            count = (self.step - 1) // self._accumulation
            logged["learning_rate"] = self._learning_rate.at(count)
            rate = self._throughput.take()
            if rate is not None:
                logged["images_per_second"] = rate
            self._log(**logged)
            self._bar.show(logged["train_loss"], logged["train_accuracy"], rate)

    def end_epoch(self) -> None:
        """Stops the clock of images per second until the next batch."""
        self._throughput.pause()

    def evaluation(
        self, metrics: Mapping[str, float], skipped_updates: Sequence[int] | None = None
    ) -> None:
        """Logs and prints the metrics of the test images.

        Args:
            metrics: "loss" and "accuracy".
            skipped_updates: of each stage so far, where any may be skipped.
        """
        self.evaluations.append((self.step, metrics["accuracy"]))
        logged = {f"test_{k}": v for k, v in metrics.items() if k != "batch"}
        line = (
            f"epoch {self._epoch:g}  test loss {metrics['loss']:.4f}  "
            f"test accuracy {metrics['accuracy']:.2%}"
        )
        if skipped_updates is not None:
            logged["skipped_updates"] = sum(skipped_updates)
            line += f"  skipped updates {', '.join(map(str, skipped_updates))}"
        self._log(**logged)
        self.say(line)

    @property
    def _epoch(self) -> float:
        return self.step / self._steps_per_epoch

    def _log(self, **scalars: float) -> None:
        try:
            self._writer.write(self.step, {"epoch": self._epoch, **scalars})
        except OSError as error:
            self.say(f"the metrics of step {self.step} could not be written: {error}")
