"""What a process of a study runs: cells of one setting, which differ in their seeds.

    python -m fdg_jax.study.cell [--together] WORKDIR [WORKDIR ...]

They have JAX, its devices, the data and the memory in common, and are trained one after
the other; or, with --together and the fused engine, as one compiled program. Standard
input has a line for each, its config as JSON. When it ends, so has the study, and the
training stops as it does at SIGTERM: with a snapshot. Exit status: 0 all trained, else
that of the first cell which is not: ``DIVERGED``, 1 any error, 128 and the signal that
stopped it. What is printed goes into the cells' logs, and the last line says why.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_collections

from fdg_jax import (
    compilation_cache,
    cpu_devices,
    data,
    from_config,
    host_memory,
    streams,
    training,
)
from fdg_jax.engines.together import Together
from fdg_jax.pipeline import NonFiniteLossError
from fdg_jax.stall import StalledError
from fdg_jax.stopping import Stopped, Stopping

LOG_FILE = "log.txt"
"""In the folder of a cell: what its processes have printed. It is the lock too."""

TOGETHER = "--together"

DIVERGED = 3
"""Exit status where a loss became NaN or infinite."""


def main(arguments: Sequence[str]) -> int:
    """Trains and returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name has any
    workdirs = [argument for argument in arguments if argument != TOGETHER]
    configs = [_config(json.loads(sys.stdin.readline())) for _ in workdirs]
    threading.Thread(target=_leave_with_the_study, daemon=True).start()
    host_memory.keep_freed_memory()
    cpu_devices.request_cpu_devices(configs[0].num_stages)
    compilation_cache.enable(configs[0].compilation_cache)
    try:
        cpu_devices.check_platforms()
    except ValueError as error:
        return _fail(1, error)
    dataset = from_config.load_data(configs[0])
    train = train_together if TOGETHER in arguments else train_in_turns
    return train(configs, workdirs, dataset)


def train_in_turns(
    configs: Sequence[ml_collections.ConfigDict],
    workdirs: Sequence[str],
    dataset: data.Dataset,
) -> int:
    """Trains one config after the other, until one does not come to its end.

    Args:
        configs: which differ only in their seeds.
        workdirs: where their runs are, or will be.
        dataset: the configs'.

    Returns:
        The exit status.
    """
    for config, workdir in zip(configs, workdirs, strict=True):
        _print_into(pathlib.Path(workdir, LOG_FILE))
        with Stopping(config.stop_seconds) as stopping:
            status = _train(config, workdir, dataset, stopping)
        if status:
            return status
    return 0


def train_together(
    configs: Sequence[ml_collections.ConfigDict],
    workdirs: Sequence[str],
    dataset: data.Dataset,
) -> int:
    """Trains all configs at a time, each in a thread; their programs run as one.

    One that does not come to its end does not keep the others from theirs.

    Args:
        configs: which differ only in their seeds, and whose engine is the fused one.
        workdirs: where their runs are, or will be.
        dataset: the configs'.

    Returns:
        The exit status.
    """
    together, output = Together(len(configs)), _OutputByThread(sys.stdout)

    def train(config, workdir):
        with output.into(pathlib.Path(workdir, LOG_FILE)):
            try:
                return _train(config, workdir, dataset, stopping, together.jit)
            finally:
                together.leave()

    with (
        contextlib.redirect_stdout(output),
        Stopping(configs[0].stop_seconds) as stopping,
        ThreadPoolExecutor(len(configs)) as pool,
    ):
        statuses = list(pool.map(train, configs, workdirs))
    return next(filter(None, statuses), 0)


def _train(
    config: ml_collections.ConfigDict,
    workdir: str,
    dataset: data.Dataset,
    stopping: Stopping,
    jit: Callable = jax.jit,
) -> int:
    """Trains to the end where it has not come yet; returns the exit status."""
    try:
        if training.finished(config, workdir) is None:
            experiment = training.prepare(config, workdir, dataset, jit)
            training.run(experiment, stopping)
    except NonFiniteLossError as error:
        return _fail(DIVERGED, error)
    except Stopped as stopped:
        return _fail(128 + stopped.signal, stopped)
    except StalledError as error:
        _fail(1, error)
        os._exit(1)  # a thread may hang in a device, and keep the process from ending
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


class _OutputByThread(io.TextIOBase):
    """Standard output of a process whose threads each have a log of their own."""

    def __init__(self, otherwise: io.TextIOBase):
        self._otherwise = otherwise
        self._local = threading.local()

    @contextlib.contextmanager
    def into(self, path: pathlib.Path) -> Iterator[None]:
        """Has this thread print into a file."""
        with streams.open_log(path) as self._local.file:
            yield
        del self._local.file

    def write(self, text: str) -> int:
        return getattr(self._local, "file", self._otherwise).write(text)

    def flush(self) -> None:
        getattr(self._local, "file", self._otherwise).flush()


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
    streams.outlive_terminal()
    sys.exit(main(sys.argv[1:]))
