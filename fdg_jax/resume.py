"""Going on with a run: its files, which snapshot, and whether the config still fits."""

import contextlib
import json
import os
import pathlib
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import jaxlib
import ml_collections
import numpy as np
import optax

import fdg_jax
from fdg_jax import checkpoint, folders, lock
from fdg_jax import snapshot as snapshots
from fdg_jax.metrics import EVENT_FILES, METRICS_FILE, MetricsWriter
from fdg_jax.pipeline import Pipeline
from fdg_jax.snapshot_store import DamagedSnapshotError, SnapshotStore, StoredSnapshot

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
TIMELINE_FILE = "timeline.json"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
EXPORT = "export"
HALTED = "halted"
"""What a run had trained before a loss was not finite: folders "newest" and "best"."""
LOCK_FILE = ".lock"
"""Held by the process that trains; it stays, since who removed it might let two in."""

HARMLESS = frozenset(
    {
        *("data_dir", "engine", "compilation_cache", "mode", "restart"),
        *("log_every_steps", "progress", "timeline"),
        *("snapshot_every_steps", "snapshot_every_minutes", "snapshots_kept"),
        *("stop_seconds", "stall_timeout"),
    }
)
"""Keys of a config that may change when a run goes on: they change no number that is
trained, but for the last bits between the fused and the other engines. The images of
another ``data_dir`` would; they are looked at themselves."""


_JAX_CONFIG = (
    # Which random numbers a seed gives.
    *("jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_threefry_gpu_kernel_lowering", "jax_random_seed_offset"),
    "jax_high_dynamic_range_gumbel",
    # In which types and how exactly it is computed.
    *("jax_enable_x64", "jax_explicit_x64_dtypes", "jax_numpy_dtype_promotion"),
    *("jax_default_matmul_precision", "jax_allow_f16_reductions"),
    # What the compiler may do.
    *("jax_disable_jit", "jax_optimization_level", "jax_exec_time_optimization_effort"),
)


class WorkdirInUseError(ValueError):
    """Another process trains in the same folder."""


@contextlib.contextmanager
def alone(
    workdir: pathlib.Path, warn: Callable[[str], object] = warnings.warn
) -> Iterator[None]:
    """Keeps other processes from training in a folder, and begins only if none does.

    Args:
        workdir: an existing folder.
        warn: is called with a line if nothing can keep them from it.

    Raises:
        WorkdirInUseError: one does.
    """
    with open(workdir / LOCK_FILE, "ab") as file:
        # A process that only looks whether another one trains holds it for a moment.
        if not lock.acquire(file, seconds=1.0, warn=warn):
            raise WorkdirInUseError(
                f"one process at a time trains in a workdir; another process is "
                f"training in {workdir}; wait for it, or choose another workdir"
            )
        yield


_TRIED = ".tried-"
_WAY_OUT = (
    "choose another workdir, or start over: with --config.restart=true, in a study by "
    "removing the run's folder"
)


def has_run(workdir: pathlib.Path) -> bool:
    """Returns whether a run was begun in a folder."""
    return os.path.exists(workdir / CONFIG_FILE)


def check_workdir(workdir: pathlib.Path) -> None:
    """Refuses a folder with what looks like a run, but has no config to go on with.

    Raises:
        ValueError: there is such a thing in it.
    """
    patterns = (METRICS_FILE, CHECKPOINTS, SNAPSHOTS, HALTED, EVENT_FILES)
    held = [path.name for pattern in patterns for path in workdir.glob(pattern)]
    if held and not has_run(workdir):
        raise ValueError(
            f"a run goes on with the config that it began with; {workdir} holds "
            f"{held[0]} but no {CONFIG_FILE}; {_WAY_OUT}"
        )


def is_finished(workdir: pathlib.Path) -> bool:
    """Returns whether the run of a folder has come to its end."""
    return os.path.exists(workdir / SUMMARY_FILE)


def check_config(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses to go on with another experiment than was begun.

    Raises:
        ValueError: keys differ that would change the result; lists them.
    """
    begun = read_config(workdir)
    wanted = json.loads(json.dumps(config.to_dict()))
    differences = [
        f"{key}: {begun.get(key)!r} was {'asked' if key in begun else 'unknown'} then, "
        f"{wanted.get(key)!r} now"
        for key in sorted(begun.keys() | wanted.keys())
        if key not in HARMLESS and begun.get(key) != wanted.get(key)
    ]
    if differences:
        raise ValueError(
            f"a run goes on with the config that it began with; in {workdir} these "
            f"keys differ: {'; '.join(differences)}; set them back, or "
            f"{_WAY_OUT}"
        )


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the config that the run of a folder began with, as JSON has it.

    Raises:
        ValueError: there is none that can be read.
    """
    path = workdir / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"a run's config is in {path}, which cannot be read: {error}; {_WAY_OUT}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"a run's config is in {path}, which holds no object")
    return config


def newest_whole(
    store: SnapshotStore, warn: Callable[[str], None]
) -> StoredSnapshot | None:
    """Returns the newest snapshot whose files are whole; None where none was taken.

    Args:
        store: the run's snapshots.
        warn: is called with a line about each damaged one.

    Raises:
        ValueError: there are snapshots, and all of them are damaged.
    """
    reasons = []
    for step in store.steps():
        try:
            return store.read(step)
        except DamagedSnapshotError as error:
            reasons.append(str(error))
            warn(f"the snapshot of step {step} is damaged and not used: {error}")
    if reasons:
        raise ValueError(
            f"a run goes on from a whole snapshot, and none is whole: "
            f"{'; '.join(reasons)}; {_WAY_OUT}"
        )
    return None


def check_files(workdir: pathlib.Path, name_length: int = 0) -> None:
    """Refuses a folder where a run's files cannot be written and read back.

    It writes one of each kind there, and takes them away again.

    Args:
        workdir: a folder; it need not exist.
        name_length: of the longest name of a folder in between, for paths of that
            length may be refused.

    Raises:
        ValueError: there is one that cannot be.
    """
    try:
        with (
            folders.for_a_while(workdir),
            tempfile.TemporaryDirectory(
                suffix="x" * name_length,
                prefix=_TRIED,
                dir=workdir,
                ignore_cleanup_errors=True,
            ) as name,
        ):
            _write_and_read(pathlib.Path(name))
    except Exception as error:  # what a file system lacks shows in many ways
        raise ValueError(
            f"a workdir is a folder where files can be written and read back; in "
            f"{workdir} that failed with {type(error).__name__}: {error}; choose "
            f"another workdir"
        ) from error


def _write_and_read(folder: pathlib.Path) -> None:
    arrays = {"a": jax.numpy.arange(3.0)}
    store = SnapshotStore(folder / SNAPSHOTS, keep=1)
    store.write(1, arrays, {})
    checkpoint.save_arrays(arrays, folder / CHECKPOINTS, step=1)
    writer = MetricsWriter(folder)
    writer.write(1, {"loss": 0.0})
    writer.flush()
    writer.close()
    rewind_logs(folder, {METRICS_FILE: 0})
    write_json(folder / CONFIG_FILE, {})
    for read in (
        store.read(1).arrays(),
        checkpoint.restore_arrays(arrays, folder / CHECKPOINTS, step=1),
    ):
        if not np.array_equal(read["a"], arrays["a"]):
            raise OSError(f"{folder} gives back other numbers than were written")


def remove_tried(workdir: pathlib.Path) -> None:
    """Removes what ``check_files`` has left where its process was killed."""
    for left in workdir.glob(f"{_TRIED}*"):
        shutil.rmtree(left)


def remove_run(workdir: pathlib.Path) -> None:
    """Removes everything that a run has written into a folder, and nothing else."""
    # First what says that it has ended: the rest may not get removed any more.
    (workdir / SUMMARY_FILE).unlink(missing_ok=True)
    for name in (SNAPSHOTS, CHECKPOINTS, HALTED, EXPORT):
        if (workdir / name).exists():
            shutil.rmtree(workdir / name)
    names = (METRICS_FILE, TIMELINE_FILE, CONFIG_FILE)
    for pattern in (EVENT_FILES, *names, "*.json.partial"):
        for path in workdir.glob(pattern):
            path.unlink(missing_ok=True)


def log_sizes(workdir: pathlib.Path) -> dict[str, int]:
    """Returns the bytes of every log in a folder, to be kept with a snapshot."""
    return {
        path.name: path.stat().st_size
        for path in (workdir / METRICS_FILE, *sorted(workdir.glob(EVENT_FILES)))
        if path.exists()
    }


def log_warnings(workdir: pathlib.Path, sizes: Mapping[str, int]) -> list[str]:
    """Says which logs hold less than they did when a snapshot was taken.

    Args:
        workdir: the run's folder.
        sizes: as ``log_sizes`` returned them.
    """
    now = log_sizes(workdir)
    return [
        f"{workdir / name} has lost its end since the snapshot was taken; the run goes "
        f"on with a gap in it"
        for name, size in sizes.items()
        if now.get(name, 0) < size
    ]


def rewind_logs(workdir: pathlib.Path, sizes: Mapping[str, int]) -> None:
    """Takes the logs back to what they were when a snapshot was taken.

    Args:
        workdir: the run's folder.
        sizes: as ``log_sizes`` returned them. Logs that are not among them are removed.
    """
    for name, size in log_sizes(workdir).items():
        path = workdir / name
        if name not in sizes:
            path.unlink()
        elif sizes[name] < size:
            with open(path, "r+b") as file:
                file.truncate(sizes[name])


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a file that is either whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def check_free_space(workdir: pathlib.Path, needed: int) -> None:
    """Refuses to begin where the first snapshots would not fit on the disk.

    Args:
        workdir: where the run will write; it need not exist.
        needed: bytes.

    Raises:
        ValueError: there is less.
    """
    free = shutil.disk_usage(folders.nearest(workdir)).free
    # Older snapshots make room for those to come.
    files = (p for p in (workdir / SNAPSHOTS).rglob("*") if p.is_file())
    if free + sum(p.stat().st_size for p in files) < needed:
        raise ValueError(
            f"a run needs room for its snapshots, about {needed >> 20} MiB; the "
            f"disk of {workdir} has {free >> 20} MiB; make room, or choose "
            f"another workdir"
        )


def versions() -> dict[str, str]:
    """Returns the versions of what computes."""
    libraries = (jax, jaxlib, flax, optax)
    return {
        "python": platform.python_version(),
        **{library.__name__: library.__version__ for library in libraries},
        "fdg_jax": fdg_jax.__version__,
    }


def jax_config() -> dict[str, str]:
    """Returns JAX's settings that change numbers, those that this version has."""
    known = (name for name in _JAX_CONFIG if hasattr(jax.config, name))
    return {name: str(getattr(jax.config, name)) for name in known}


def host() -> str:
    """Returns this machine's processor, and how many of its cores may be used."""
    model, info = platform.processor() or platform.machine(), "/proc/cpuinfo"
    if os.path.exists(info):  # Linux, where the standard library does not know it
        lines = pathlib.Path(info).read_text("utf-8").splitlines()
        names = [line.partition(":")[2] for line in lines if "model name" in line]
        model = names[0].strip() if names else model
    # Not everywhere can a process be bound to some of the cores.
    bound = getattr(os, "sched_getaffinity", None)
    return f"{model}, {len(bound(0)) if bound else os.cpu_count()} cores"


def grouped(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Sorts a snapshot's arrays: those of the stages, the data, and the best network.

    Args:
        arrays: by name.

    Returns:
        "stages", "data" and "best", each by the rest of the name.
    """
    groups = {"stages": {}, "data": {}, "best": {}}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        groups[group][rest] = array
    return groups


def restore_pipeline(
    pipeline: Pipeline,
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    example: dict[str, jax.ShapeDtypeStruct],
) -> None:
    """Puts a pipeline where it was when a snapshot was taken.

    Args:
        pipeline: like the one of the snapshot, with its cuts; has not trained.
        record: the snapshot's.
        arrays: those of the stages, as ``grouped`` returns them.
        example: a training batch.

    Raises:
        ValueError: the snapshot is of another pipeline.
    """
    like = pipeline.abstract_snapshot(example, record["batch"], record["lengths"])
    try:
        snapshot = snapshots.from_arrays(arrays, like)
    except ValueError as error:
        written, here = record["versions"]["fdg_jax"], fdg_jax.__version__
        if written == here:
            raise
        raise ValueError(
            f"a snapshot is read by the version of fdg_jax that wrote it; this one is "
            f"of {written}, and here is {here}; {error}; {_WAY_OUT}"
        ) from error
    pipeline.restore(snapshot._replace(nonfinite=record.get("nonfinite", 0)))


def change_warnings(record: Mapping[str, Any]) -> list[str]:
    """Says what computes otherwise than at a snapshot: a line each for what differs.

    Args:
        record: the snapshot's. One of an older version says nothing of JAX's settings.
    """
    lines = []
    then, now = record["versions"], versions()
    if changed := _changes({name: then.get(name) for name in now}, now):
        lines.append(
            f"the run goes on with other versions, so last bits may differ: {changed}"
        )
    if changed := _changes(record.get("jax_config", {}), jax_config()):
        lines.append(
            f"the run goes on with other settings of JAX, so random numbers, or last "
            f"bits, may differ: {changed}"
        )
    return lines


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {then[name]} then, {value} now"
        for name, value in now.items()
        if name in then and then[name] != value
    ]
