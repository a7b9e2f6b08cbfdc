"""What a run has trained: load it for any number of stages, evaluate it, export it."""

import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import optax

from fdg_jax import checkpoint, data, folders, from_config, lock, losses, resume
from fdg_jax.models.network import Network
from fdg_jax.pipeline import Pipeline
from fdg_jax.snapshot_store import SnapshotStore
from fdg_jax.words import did_you_mean

WHICH = ("newest", "best")
_EXPORT_LOCK, _EXPORT_SECONDS = ".export.lock", 60.0  # to wait for another process
SAFETENSORS, ORBAX = "network.safetensors", "orbax"

NETWORK_KEYS = (
    *("network", "init", "dropout_rate", "dtype", "param_dtype"),
    *("dataset", "num_train", "seed"),
)
"""What a run's config must have for its network to be made, and evaluated."""

PIPELINE_KEYS = (
    *("method", "num_stages", "schedule", "shrink", "backward", "accumulation"),
    *("engine", "stall_timeout", "batch_size", "optimizer", "momentum"),
    *("weight_decay", "learning_rate", "learning_rate_milestones"),
    *("learning_rate_decay", "warmup_epochs", "warmup_factor", "clip_norm"),
    *("skip_nonfinite", "loss_scale", "remedy", "remedy_strength", "remedy_epochs"),
)
"""What it must have besides for the newest network of a run that has not ended."""


def load(
    workdir: str | pathlib.Path, which: str = "newest"
) -> tuple[Network, ml_collections.ConfigDict]:
    """Loads a network that ``train.py`` has trained, or is training.

    Args:
        workdir: of the run.
        which: "newest", the final network of a run that has ended, or that from before
            an update that was not finite, or else that of the newest snapshot, with the
            gradients under way not applied; or "best", the one with the highest test
            accuracy until then.

    Returns:
        The network, whole, on one device, in evaluation mode, with the values that
        evaluation uses; and the config of the run.

    Raises:
        ValueError: there is no such run, or nothing of it can be loaded.
    """
    workdir = folders.local(workdir)
    if which not in WHICH:
        raise ValueError(
            f"which must be one of {', '.join(WHICH)}; got {which!r}"
            f"{did_you_mean(which, WHICH)}"
        )
    if not resume.has_run(workdir):
        raise ValueError(
            f"a trained network is loaded from the workdir of a run; {workdir} has no "
            f"{resume.CONFIG_FILE}"
        )
    config = ml_collections.ConfigDict(resume.read_config(workdir))
    _check_keys(config, NETWORK_KEYS, workdir)
    if resume.is_finished(workdir):
        network = from_config.create_network(config)
        steps = checkpoint.steps(workdir / resume.CHECKPOINTS)
        if not steps:
            raise ValueError(
                f"a run that has ended has its network in {resume.CHECKPOINTS}; "
                f"{workdir} has none there; train again with --config.restart=true"
            )
        # The final network is of the last step; the best one is the same or earlier.
        step = max(steps) if which == "newest" else min(steps)
        checkpoint.restore_network(network, workdir / resume.CHECKPOINTS, step)
    elif checkpoint.steps(halted := workdir / resume.HALTED / which):
        network = from_config.create_network(config)
        checkpoint.restore_network(network, halted)
    else:
        network = _from_snapshot(config, workdir, which)
    network.eval()
    return network, config


def _check_keys(
    config: ml_collections.ConfigDict, keys: Iterable[str], workdir: pathlib.Path
) -> None:
    missing = [key for key in keys if key not in config]
    if missing:
        raise ValueError(
            f"a network is loaded by the config of its run; the {resume.CONFIG_FILE} "
            f"of {workdir}, incomplete or of an older version, lacks "
            f"{', '.join(missing)}; add what the run was trained with, or train again "
            f"with --config.restart=true"
        )


def _from_snapshot(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, which: str
) -> Network:
    store = SnapshotStore(workdir / resume.SNAPSHOTS, keep=1)  # nothing is written
    while True:
        steps = store.steps()
        try:
            stored = resume.newest_whole(store, warn=lambda line: None)
            arrays = {} if stored is None else resume.grouped(stored.arrays())
            break
        except (ValueError, OSError):
            if steps == store.steps():
                raise
            # The run has removed them meanwhile, because there are newer ones.
    if stored is None or (which == "best" and stored.record["best"] is None):
        raise ValueError(
            f"the run in {workdir} has no {which} network yet; wait for its first "
            f"snapshot{' after an evaluation' if which == 'best' else ''}"
        )
    if which == "best":
        network = from_config.create_network(config)
        return checkpoint.set_network_arrays(network, arrays["best"])
    _check_keys(config, PIPELINE_KEYS, workdir)
    # One device is enough to put the stages together.
    pipeline = from_config.create_pipeline(
        config,
        from_config.learning_rate(config, steps_per_epoch=1),
        cuts=tuple(stored.record["cuts"]),
        engine="serial",
        replicas=1,
    )
    resume.restore_pipeline(
        pipeline, stored.record, arrays["stages"], from_config.example_batch(config)
    )
    return pipeline.network


def evaluate(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path
) -> dict[str, float]:
    """Evaluates what a run has trained on the test images.

    Args:
        config: says where the data are (``data_dir``), and how many images to take at a
            time (``eval_batch_size``); all else is as the run had it.
        workdir: of the run.

    Returns:
        "loss" and "accuracy", means over the test images.

    Raises:
        ValueError: there is no such run, or no such data.
    """
    network, begun = load(workdir)
    begun.data_dir = config.data_dir
    pipeline = Pipeline(
        network,
        loss_fn=losses.softmax_cross_entropy,
        optimizer=optax.identity(),
        num_stages=1,
        cuts=(),
        engine="serial",
        devices=jax.devices()[:1],
    )
    dataset = from_config.load_data(begun)
    batches = data.test_batches(
        dataset,
        config.eval_batch_size,
        device=jax.devices()[0],
        dtype=jax.numpy.dtype(begun.dtype),
    )
    with pipeline:
        return pipeline.evaluate_metrics(batches)


def export(workdir: str | pathlib.Path, which: str = "newest") -> dict[str, Any]:
    """Writes what a run has trained for use elsewhere, into ``<workdir>/export``.

    Args:
        workdir: of the run.
        which: as for ``load``.

    Returns:
        "safetensors", a file whose names are paths in the network such as
        ``blocks/0/conv/kernel``; and "orbax", a folder that
        ``checkpoint.restore_network`` reads.

    Raises:
        ValueError: there is no such run, or nothing of it can be loaded, or another
            process has been exporting it for a minute.
    """
    network, config = load(workdir, which)
    folder = folders.local(workdir) / resume.EXPORT / which
    partial = folder.with_name(f"{which}.partial")
    folder.parent.mkdir(exist_ok=True)
    with open(folder.parents[1] / _EXPORT_LOCK, "ab") as file:
        if not lock.acquire(file, _EXPORT_SECONDS):
            raise ValueError(
                f"one process at a time exports a run; another one is exporting that "
                f"of {workdir}; wait for it"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        checkpoint.save_safetensors(network, partial / SAFETENSORS)
        checkpoint.save_network(network, partial / ORBAX, step=0)
        # An earlier one may be of a network that was still being trained.
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return {"safetensors": folder / SAFETENSORS, "orbax": folder / ORBAX}
