"""Trains a network with FDG.

    python train.py [--config=FILE] [--workdir=DIR] [--config.KEY=VALUE ...]

Without --config it trains configs/digits.py; without --workdir it writes into a new
folder, runs/<config>-<date>-<time>-<random>. A workdir that holds a run of the same
config goes on with it.

Exit status: 0 trained; 1 the loss became NaN or infinite, a stage stalled, or a file
could not be written; 2 a flag, the config or the workdir is wrong, and nothing was
written; 130 and 143 stopped by Ctrl-C and by SIGTERM, after a snapshot: started again,
it goes on from there.
"""

import os
import pathlib
import re
import runpy
import secrets
import sys
import time
import traceback
from collections.abc import Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from fdg_jax import (
    compilation_cache,
    config_files,
    config_keys,
    folders,
    host_memory,
    streams,
    trained,
    training,
)
from fdg_jax.cpu_devices import check_platforms, request_cpu_devices
from fdg_jax.pipeline import NonFiniteLossError
from fdg_jax.resume import WorkdirInUseError
from fdg_jax.stall import StalledError
from fdg_jax.stopping import Stopped, Stopping
from fdg_jax.words import did_you_mean

CONFIGS = config_files.FOLDER


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    if {"--help", "-help", "-h"} & set(argv[1:]):
        print(f"{__doc__}\nKeys and their defaults ({CONFIGS / 'default.py'}):\n")
        print(config_files.load("default"))
        return 0
    logging.set_verbosity(logging.ERROR)  # what goes wrong is told in one line
    try:
        config, workdir = parse(argv)
        host_memory.keep_freed_memory()
        request_cpu_devices(config.num_stages)
        compilation_cache.enable(config.compilation_cache)
        if config.mode != "train":
            return show(config, workdir)
        summary = training.finished(config, workdir)
        if summary is not None:
            accuracy = summary["final_test_accuracy"]
            print(f"{workdir} holds this run; its test accuracy is {accuracy:.2%}")
            return 0
        check_platforms()
        experiment = training.prepare(config, workdir)
    except ValueError as error:
        return _fail(2, error)
    except OSError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted before the first batch; nothing was written")
    try:
        with Stopping(config.stop_seconds) as stopping:
            training.run(experiment, stopping)
    except WorkdirInUseError as error:
        return _fail(2, error)
    except (NonFiniteLossError, OSError) as error:
        return _fail(1, error)
    except StalledError as error:
        # A thread may hang in a device, which would keep the process from ending.
        sys.stdout.flush()
        try:
            lines = [f"train.py: {error}", *getattr(error, "__notes__", [])]
            print("\n".join(lines), file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    except Stopped as stopped:
        return _fail(
            128 + stopped.signal,
            f"{stopped}; with --workdir={workdir} it goes on from batch {stopped.step}",
        )
    return 0


def show(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
    """Evaluates or exports what a workdir holds.

    Raises:
        ValueError: it holds nothing of the kind, or there is no such mode.
    """
    check_platforms()
    if config.mode == "evaluate":
        metrics = trained.evaluate(config, workdir)
        print(
            f"test loss {metrics['loss']:.4f}  test accuracy {metrics['accuracy']:.2%}"
        )
    elif config.mode == "export":
        for path in trained.export(workdir).values():
            print(path)
    else:
        raise ValueError(f"mode must be train, evaluate or export; got {config.mode!r}")
    return 0


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
    """Returns the config and the workdir that a command line means.

    Raises:
        ValueError: a flag, a key or a value is wrong, or there is no such config file.
    """
    default = config_files.load("default")
    try:
        path, argv = _config_path(argv)
        for argument in argv[1:]:
            if match := re.match(r"--?(?:no)?config\.([^=]*)", argument):
                config_keys.check(match[1], list(default))
        config = config_keys.complete(default, _execute(path), path)
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "Where to write.", flag_values=values)
        config_flags.DEFINE_config_dict(
            "config", config, "What to train.", flag_values=values, sys_argv=argv
        )
        # absl would look for what an unknown flag may mean, and recurses into its name.
        rest = values(argv, known_only=True)[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if rest:
        names = ("--config", "--workdir", "--config.KEY", "--help")
        raise ValueError(
            f"the flags are {', '.join(names)}; got {rest[0]!r}"
            f"{did_you_mean(rest[0].split('=')[0], names)}"
        )
    config = config_keys.complete(
        default, values.config.copy_and_resolve_references(), path
    )
    return config, folders.local(values.workdir or _new_workdir(path))


def _new_workdir(config: pathlib.Path) -> pathlib.Path:
    # Random digits: other runs may start at the same moment, also on other machines.
    date = time.strftime("%Y%m%d-%H%M%S")
    return pathlib.Path("runs", f"{config.stem}-{date}-{secrets.token_hex(4)}")


def _config_path(argv: Sequence[str]) -> tuple[pathlib.Path, list[str]]:
    """Returns the config file, and the command line without it."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_string(
        "config", str(CONFIGS / "digits.py"), "What to train.", flag_values=values
    )
    rest = values(list(argv), known_only=True)
    path = folders.local(values.config)
    if not os.path.isfile(path):
        names = [file.stem for file in CONFIGS.glob("[!_]*.py")]
        raise ValueError(
            f"the config must be a file; there is no {values.config!r}"
            f"{did_you_mean(path.stem, names)}; configs/ has {', '.join(sorted(names))}"
        )
    return path, rest


def _execute(path: pathlib.Path) -> ml_collections.ConfigDict:
    """Executes a config file, which may fail in any way, and returns its config."""
    try:
        with config_files.importable():
            config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if call.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(
            f"a config file defines get_config(); {path}{where} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"get_config() of a config file returns an ml_collections.ConfigDict; that "
            f"of {path} returned {config!r}"
        )
    return config.copy_and_resolve_references()


def _fail(status: int, reason: object) -> int:
    print(f"train.py: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    streams.outlive_terminal()
    sys.exit(main(sys.argv))
