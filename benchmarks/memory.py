"""Measures the memory that each backward mode takes, and the time to compile.

    python -m benchmarks.memory --network=resnet110 --num_stages=4

Every mode runs in a process of its own: it builds the pipeline, fills it, which
compiles everything, and then trains as many batches again. Columns of the table:

    stash MiB      what all stages keep for their backwards when the pipeline is full,
                   counted from shapes: residuals, inputs, and old parameters
    built MiB      resident memory of the process after the stages are built
    peak MiB       the most resident memory while the full pipeline trains
    more MiB       peak less built: stash, messages, what steps need while they
                   run, and compiled programs; less what building has freed, which
                   the process keeps
    device MiB     peak memory of the devices, where they keep account of it
    compile s      seconds to fill the pipeline less those to train as many batches
    batch ms       milliseconds per batch of those that a full pipeline trains: s_0 + 2
                   of them, at least three; mean, with the metrics of each read

Exit status: 0 measured; 1 a process failed; 2 an argument is wrong.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import jax

import fdg_jax as fdg
from benchmarks import jax_bp
from benchmarks.children import peak_mib, reset_peak
from benchmarks.task import Task
from fdg_jax import host_memory
from fdg_jax.blocks import split_network
from fdg_jax.stage import BACKWARD_MODES, Activation, Stage
from fdg_jax.words import tabulate

MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    arguments = parse(argv[1:])
    rows = {}
    for mode in arguments.backward.split(","):
        try:
            rows[mode] = in_new_process(measure, arguments, mode)
        except ValueError as error:
            print(f"memory: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except BrokenProcessPool:
            print(f"memory: the process of {mode!r} was killed", file=sys.stderr)
            return 1
    print(table(rows))
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the flags' values; ends the process where one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--FLAG=VALUE ...]",
    )
    for flag, default, words in (
        ("network", "resnet110", "as fdg.models.create takes it"),
        ("num_stages", 4, "K, a device each"),
        ("batch_size", 128, "images in a batch"),
        ("backward", ",".join(BACKWARD_MODES), "modes to compare"),
        ("cuts", "paper", "as fdg.Pipeline takes it"),
        ("schedule", "reference", "as fdg.Pipeline takes it"),
        ("engine", "threads", "as fdg.Pipeline takes it"),
        ("dtype", "float32", "or bfloat16, with parameters in float32"),
    ):
        parser.add_argument(
            f"--{flag}",
            type=type(default),
            default=default,
            metavar="",
            help=f"{words} (%(default)s)",
        )
    return parser.parse_args(argv)


def in_new_process(function: Callable, *arguments):
    """Calls a function in a process of its own, and returns or raises what it does."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure(arguments: argparse.Namespace, backward: str) -> dict[str, float | None]:
    """Trains with a backward mode in this process, where nothing has run before.

    Returns:
        The columns of the table; None for what the system or the devices do not tell.

    Raises:
        ValueError: an argument is not valid.
    """
    host_memory.keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", arguments.num_stages)
    jax.config.update("jax_enable_compilation_cache", False)
    schedule = fdg.schedule.resolve(arguments.schedule, arguments.num_stages)
    task = Task(
        network=arguments.network,
        num_stages=arguments.num_stages,
        batch_size=arguments.batch_size,
        cuts=None,
        schedule=schedule.staleness,
        dtype=arguments.dtype,
    )
    network, batch = jax_bp.create_network(task), jax_bp.create_batch(task)
    pipeline = fdg.Pipeline(
        network,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=jax_bp.create_optimizer(),
        num_stages=task.num_stages,
        cuts=arguments.cuts,
        schedule=task.schedule,
        backward=backward,
        engine=arguments.engine,
    )
    pipeline.build(batch)
    devices = [stage.device for stage in pipeline.stages]
    image = jax.device_put(batch["image"], devices[0])
    label = jax.device_put(batch["label"], devices[-1])
    # Once batch s_0 + 1 is out, every stage has compiled all its functions.
    batches = [{"image": image, "label": label}] * max(3, task.schedule[0] + 2)
    row = {"built MiB": _peak_from_here()}
    with pipeline:
        first = _seconds(lambda: list(pipeline.train(batches)))
        is_reset = reset_peak()
        again = _seconds(lambda: list(pipeline.train(batches)))
        row["peak MiB"] = peak_mib() if is_reset else None
    known = None not in row.values()
    row["more MiB"] = row["peak MiB"] - row["built MiB"] if known else None
    row["device MiB"] = jax_bp.peak_mib(devices)
    row["compile s"] = first - again
    row["batch ms"] = 1e3 * again / len(batches)
    stash = stash_bytes(pipeline.stages, network, image)
    return {"stash MiB": sum(stash) / MIB, **row}


def _peak_from_here() -> float | None:
    """Returns what the process holds now, in MiB, where the system tells."""
    return peak_mib() if reset_peak() else None


def _seconds(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def stash_bytes(stages: Sequence[Stage], network, image: jax.Array) -> list[int]:
    """Returns the size of each stage's stash when the pipeline is full.

    After its forward a stage has s_k + 1 entries. Their parameters are different
    versions, the newest of which is the stage's own.

    Args:
        stages: of a built pipeline.
        network: what the pipeline was made of.
        image: images of a batch, arrays or abstract.
    """
    _, params, batch_stats = split_network(network)
    activation, sizes = Activation(image), []
    for stage in stages[:-1]:
        state = stage.init(
            [params[i] for i in stage.blocks], [batch_stats[i] for i in stage.blocks], 0
        )
        activation, _, entry = jax.eval_shape(stage.forward, state, activation)
        versions, rest = _bytes(entry.params), _bytes(entry._replace(params=None))
        sizes.append(stage.staleness * versions + (stage.staleness + 1) * rest)
    return [*sizes, 0]


def _bytes(tree) -> int:
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """Formats the measurements, and each mode's ratio to the first one."""

    def cell(value):
        return "" if value is None else f"{value:,.1f}"

    columns = next(iter(rows.values())).keys()
    lines = [["backward", *columns]]
    lines += [[mode, *map(cell, row.values())] for mode, row in rows.items()]
    first, base = next(iter(rows.items()))
    for mode, row in itertools.islice(rows.items(), 1, None):
        ratios = []
        for column in columns:
            with contextlib.suppress(TypeError, ZeroDivisionError):
                ratios.append(f"{row[column] / base[column]:.2f}")
                continue
            ratios.append("")
        lines.append([f"{mode} / {first}", *ratios])
    return tabulate(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
