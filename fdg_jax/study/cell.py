"""What a cell's own process runs: one training, with its own JAX, devices and memory.

    python -m fdg_jax.study.cell WORKDIR

The first line on standard input is the config as JSON. When standard input ends, so has
the study, and the training stops as it does at SIGTERM: with a snapshot. Exit status: 0
trained, ``DIVERGED``, 1 any error, 128 and the signal that stopped it; the last line of
the output says why.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import ml_collections

from fdg_jax import compilation_cache, cpu_devices, host_memory, training
from fdg_jax.pipeline import NonFiniteLossError
from fdg_jax.stall import StalledError
from fdg_jax.stopping import Stopped, Stopping

DIVERGED = 3
"""Exit status where a loss became NaN or infinite."""


def main(workdir: str) -> int:
    """Trains and returns the exit status."""
    values = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    try:
        train(values, workdir)
    except NonFiniteLossError as error:
        return _fail(DIVERGED, error)
    except Stopped as stopped:
        return _fail(128 + stopped.signal, stopped)
    except StalledError as error:
        _fail(1, error)
        os._exit(1)  # a thread may hang in a device, and keep the process from ending
    return 0


def train(values: Mapping[str, Any], workdir: str) -> None:
    """Sets this process up for a config, and trains.

    Args:
        values: by key, as JSON has them.
        workdir: where the run is, or will be.

    Raises:
        ValueError: the config or the workdir is wrong.
        NonFiniteLossError: a loss became infinite or NaN.
        Stopped: a signal came, and a snapshot was taken.
    """
    config = ml_collections.ConfigDict(
        {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )
    host_memory.keep_freed_memory()
    cpu_devices.request_cpu_devices(config.num_stages)
    compilation_cache.enable(config.compilation_cache)
    if training.finished(config, workdir) is not None:
        return
    experiment = training.prepare(config, workdir)
    with Stopping(config.stop_seconds) as stopping:
        training.run(experiment, stopping)


def _leave_with_the_study() -> None:
    # Not through sys.stdin, whose lock this thread would hold when Python ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _fail(status: int, reason: object) -> int:
    print(" ".join(str(reason).split()), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
