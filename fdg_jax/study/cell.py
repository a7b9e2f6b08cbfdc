"""What a process of a study runs: the cells of one setting, seed after seed.

    python -m fdg_jax.study.cell WORKDIR [WORKDIR ...]

They have JAX, its devices, the data and the memory in common. Standard input has a line
for each, its config as JSON. When it ends, so has the study, and the training stops as
it does at SIGTERM: with a snapshot. Exit status: 0 all trained, ``DIVERGED``, 1 any
error, 128 and the signal that stopped it; cells after such a one are not begun. What is
printed goes into the cells' logs, and the last line says why.
"""

import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from fdg_jax import (
    compilation_cache,
    cpu_devices,
    from_config,
    host_memory,
    training,
)
from fdg_jax.pipeline import NonFiniteLossError
from fdg_jax.stall import StalledError
from fdg_jax.stopping import Stopped, Stopping

LOG_FILE = "log.txt"
"""In the folder of a cell: what its processes have printed. It is the lock too."""

DIVERGED = 3
"""Exit status where a loss became NaN or infinite."""


def main(workdirs: Sequence[str]) -> int:
    """Trains and returns the exit status."""
    configs = [_config(json.loads(sys.stdin.readline())) for _ in workdirs]
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    try:
        train(configs, workdirs)
    except NonFiniteLossError as error:
        return _fail(DIVERGED, error)
    except Stopped as stopped:
        return _fail(128 + stopped.signal, stopped)
    except StalledError as error:
        _fail(1, error)
        os._exit(1)  # a thread may hang in a device, and keep the process from ending
    return 0


def train(
    configs: Sequence[ml_collections.ConfigDict], workdirs: Sequence[str]
) -> None:
    """Sets this process up, and trains one config after the other.

    Args:
        configs: which differ in their seeds alone.
        workdirs: where their runs are, or will be.

    Raises:
        ValueError: a config or its workdir is wrong.
        NonFiniteLossError: a loss became infinite or NaN.
        Stopped: a signal came, and a snapshot was taken.
    """
    host_memory.keep_freed_memory()
    cpu_devices.request_cpu_devices(configs[0].num_stages)
    compilation_cache.enable(configs[0].compilation_cache)
    dataset = from_config.load_data(configs[0])
    for config, workdir in zip(configs, workdirs, strict=True):
        _print_into(pathlib.Path(workdir, LOG_FILE))
        if training.finished(config, workdir) is None:
            experiment = training.prepare(config, workdir, dataset)
            with Stopping(config.stop_seconds) as stopping:
                training.run(experiment, stopping)


def _config(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    )


def _print_into(path: pathlib.Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _leave_with_the_study() -> None:
    # Not through sys.stdin, whose lock this thread would hold when Python ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _fail(status: int, reason: object) -> int:
    print(" ".join(str(reason).split()), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
