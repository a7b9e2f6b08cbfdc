"""What all methods of a benchmark train: network, batch and optimizer, in plain words.

It imports neither JAX nor PyTorch, so that a method's process loads its own alone.
"""

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SHRINK = 0.5


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        network: name of a network, as ``fdg_jax.models.create`` takes it.
        num_stages: K, of the methods that cut the network or share out the batch.
        batch_size: images in a batch, over all devices.
        cuts: where stages begin; None lets every method balance its own.
        schedule: staleness of each stage.
        dtype: "float32", or "bfloat16" with parameters in float32.
        round_seconds: about how long a method runs in each round.
        torch_cuts: as ``cuts``, for PyTorch, whose best ones are others.
    """

    network: str
    num_stages: int
    batch_size: int
    cuts: tuple[int, ...] | None
    schedule: tuple[int, ...]
    dtype: str = "float32"
    round_seconds: float = 3.0
    torch_cuts: tuple[int, ...] | None = None


class Unavailable(Exception):
    """A method cannot run here; the message says what it lacks."""


class Method(Protocol):
    """A way of training, ready to be timed."""

    def warm_up(self) -> float | None:
        """Builds and compiles everything, and runs the first batches.

        Returns:
            Seconds of the first call less those of a later one; None where nothing is
            compiled, or compiling is but a part of a choice.
        """

    def run(self, num_batches: int) -> None:
        """Trains on that many batches; may return before the device is done."""

    def synchronize(self) -> None:
        """Waits until the device is done."""

    def probe(self) -> dict:
        """Waits for what the round has left behind, and returns further measurements.

        It comes after the round's time.
        """

    def peak_device_mib(self) -> float | None:
        """Returns the devices' peak memory since the warm-up; None where unknown.

        JAX cannot start it anew, so there the warm-up counts as well.
        """

    def report(self) -> dict:
        """Returns "device", and what it chose."""

    def close(self) -> None:
        """Ends what it has started."""


def random_batch(batch_size: int) -> dict[str, np.ndarray]:
    """Returns the batch that all methods train on, over and over.

    Returns:
        "image", float32 [batch_size, 32, 32, 3], and "label", int32 [batch_size].
    """
    random = np.random.default_rng(0)
    return {
        "image": random.normal(size=(batch_size, *IMAGE_SHAPE)).astype(np.float32),
        "label": random.integers(0, NUM_CLASSES, batch_size).astype(np.int32),
    }


def cores() -> tuple[int, ...]:
    """Returns the numbers of the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))
