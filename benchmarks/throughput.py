"""Measures images per second of ways to train a network, side by side.

    python -m benchmarks.throughput --network=resnet20 --num_stages=2

Every method has a process of its own; they take turns, round by round, and ratios are
taken within a round. See benchmarks/README.md for what the figures mean.

Exit status: 0 measured; 1 a method failed; 2 an argument is wrong; 130 interrupted.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from benchmarks import children, methods, report
from benchmarks.task import Task, Unavailable, cores

DTYPES = ("float32", "bfloat16")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")


class _Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        arguments = parse(argv[1:])
        names = methods.parse(arguments.methods or methods.DEFAULT)
        task = check(arguments)
        results = measure(task, names, arguments)
    except ValueError as error:
        print(f"throughput: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except children.ChildFailed as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("throughput: interrupted", file=sys.stderr)
        return 130
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(report.text(results))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags' values.

    Raises:
        ValueError: a flag or a value's type is wrong.
    """
    parser = _Parser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        epilog=_list_methods(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--FLAG=VALUE ...]",
    )
    for flag, default, words in (
        ("network", "resnet20", "resnet20, resnet56, wrn16_4, ..."),
        ("num_stages", 2, "K; data parallelism uses as many devices"),
        ("batch_size", 128, "images in a batch, over all devices"),
        ("rounds", 5, "how often each method is timed"),
        ("round_seconds", 3.0, "about how long each time"),
        ("dtype", "float32", "or bfloat16, with parameters in float32"),
        ("schedule", "reference", "as fdg.Pipeline takes it"),
        ("cuts", "balanced", "of FDG, as fdg.Pipeline takes them"),
        ("torch_cuts", "balanced", "of torch_fdg, which then searches its own"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=type(default),
            default=default,
            metavar="",
            help=f"{words} (%(default)s)",
        )
    parser.add_argument("--methods", metavar="", help=f"see below ({methods.DEFAULT})")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="", help="file for all that was measured"
    )
    return parser.parse_args(argv)


def _list_methods() -> str:
    rows = {name: entry.meaning for name, entry in methods.METHODS.items()}
    rows |= {name: ", ".join(members) for name, members in methods.GROUPS.items()}
    return "methods:\n" + "\n".join(f"  {k:<16} {v}" for k, v in rows.items())


def check(arguments: argparse.Namespace) -> Task:
    """Returns the task that the flags mean, before any process is started.

    Raises:
        ValueError: a value is not valid.
    """
    # Imported here because --help should not wait for it. This process computes
    # nothing, so a GPU is no use.
    import jax
    from flax import nnx

    import fdg_jax as fdg
    from fdg_jax import partition

    jax.config.update("jax_platforms", "cpu")
    for flag, least in (("num_stages", 1), ("batch_size", 1), ("rounds", 1)):
        if getattr(arguments, flag) < least:
            raise ValueError(
                f"{flag} must be at least {least}; got {getattr(arguments, flag)}"
            )
    if arguments.dtype not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}; got {arguments.dtype!r}"
        )
    if not arguments.round_seconds > 0:
        raise ValueError(
            f"round_seconds must be positive; got {arguments.round_seconds}"
        )
    network = nnx.eval_shape(lambda: fdg.models.create(arguments.network))
    cuts, torch_cuts = (
        partition.resolve_cuts(
            given,
            num_stages=arguments.num_stages,
            num_blocks=len(network),
            network_name=arguments.network,
        )
        for given in (arguments.cuts, arguments.torch_cuts)
    )
    schedule = fdg.schedule.resolve(arguments.schedule, arguments.num_stages)
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ValueError(f"the folder of --json={arguments.json} does not exist")
    return Task(
        network=arguments.network,
        num_stages=arguments.num_stages,
        batch_size=arguments.batch_size,
        cuts=cuts,
        schedule=schedule.staleness,
        dtype=arguments.dtype,
        round_seconds=arguments.round_seconds,
        torch_cuts=torch_cuts,
    )


def measure(
    task: Task, names: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Warms all methods up, and lets them take turns.

    Args:
        task: what to train.
        names: of the methods. One that cannot run here is left out, unless the flags
            ask for it.
        arguments: the flags.

    Returns:
        What ``--json`` writes: "header", "task", per method its rounds and report,
        "ratios", and "left_out".

    Raises:
        ValueError: a method cannot do the task, or cannot run here but was asked for.
        ChildFailed: a method failed.
    """
    with contextlib.ExitStack() as stack:
        running, left_out = {}, {}
        for name in names:
            _say(f"{name}: warming up")
            child = stack.enter_context(contextlib.closing(children.Child(name, task)))
            try:
                running[name] = child, child.warm_up()
            except Unavailable as error:
                if arguments.methods is not None:
                    raise ValueError(f"{name}: {error}") from error
                left_out[name] = str(error)
        rounds = _take_turns(running, arguments.rounds)
        reports = {name: child.report() for name, (child, _) in running.items()}
    measured = {
        name: {
            **warm_up,
            "images_per_second": report.spread(
                [one["images_per_second"] for one in rounds[name]]
            ),
            "rounds": rounds[name],
            "report": reports[name],
        }
        for name, (_, warm_up) in running.items()
    }
    return {
        "header": _header(),
        "task": dataclasses.asdict(task),
        "methods": measured,
        "ratios": report.ratios(rounds, reports),
        "left_out": left_out,
    }


def _take_turns(running: dict[str, tuple], num_rounds: int) -> dict[str, list[dict]]:
    """Runs the rounds; each starts with another method."""
    names = list(running)
    rounds = {name: [] for name in names}
    for i in range(num_rounds):
        first = i % max(1, len(names))
        for name in names[first:] + names[:first]:
            child, warm_up = running[name]
            one = child.run_round(warm_up["num_batches"])
            rounds[name].append(one)
            rate = one["images_per_second"]
            _say(f"round {i + 1} of {num_rounds}: {name} {rate:.1f} images/s")
    return rounds


def _header() -> dict[str, str]:
    """Where and when: enough to compare with another machine's figures."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.isoformat(" ", "minutes"),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu_model()}",
        "cores": str(len(cores())),
        "versions": ", ".join(versions),
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *sys.argv[1:]]),
        "data": "one random batch, on the device from the start",
    }


def _cpu_model() -> str:
    """Returns the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
