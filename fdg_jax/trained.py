"""What a run has trained: load it for any number of stages, evaluate it, export it."""

import pathlib
import shutil
from typing import Any

import jax
import ml_collections
import optax

from fdg_jax import checkpoint, data, from_config, losses, resume
from fdg_jax.models.network import Network
from fdg_jax.pipeline import Pipeline
from fdg_jax.snapshot_store import SnapshotStore
from fdg_jax.words import did_you_mean

WHICH = ("newest", "best")
SAFETENSORS, ORBAX = "network.safetensors", "orbax"


def load(
    workdir: str | pathlib.Path, which: str = "newest"
) -> tuple[Network, ml_collections.ConfigDict]:
    """Loads a network that ``train.py`` has trained, or is training.

    Args:
        workdir: of the run.
        which: "newest", the final network of a run that has ended or else that of the
            newest snapshot, with the gradients under way not applied; or "best", the
            one with the highest test accuracy until then.

    Returns:
        The network, whole, on one device, with the values that evaluation uses; and
        the config of the run.

    Raises:
        ValueError: there is no such run, or nothing of it can be loaded.
    """
    workdir = pathlib.Path(workdir)
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
        return network, config
    return _from_snapshot(config, workdir, which), config


def _from_snapshot(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, which: str
) -> Network:
    store = SnapshotStore(workdir / resume.SNAPSHOTS, keep=config.snapshots_kept)
    while True:
        steps = store.steps()
        try:
            stored = resume.newest_whole(store, warn=lambda line: None)
            break
        except ValueError:
            if steps == store.steps():
                raise
            # The run has removed them meanwhile, because there are newer ones.
    if stored is None or (which == "best" and stored.record["best"] is None):
        raise ValueError(
            f"the run in {workdir} has no {which} network yet; wait for its first "
            f"snapshot{' after an evaluation' if which == 'best' else ''}"
        )
    arrays = resume.grouped(stored.arrays())
    if which == "best":
        network = from_config.create_network(config)
        return checkpoint.set_network_arrays(network, arrays["best"])
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
        config: of the run; says where the data are.
        workdir: of the run.

    Returns:
        "loss" and "accuracy", means over the test images.

    Raises:
        ValueError: there is no such run, or it has another config.
    """
    network, _ = load(workdir)
    resume.check_config(config, pathlib.Path(workdir))
    pipeline = Pipeline(
        network,
        loss_fn=losses.softmax_cross_entropy,
        optimizer=optax.identity(),
        num_stages=1,
        cuts=(),
        engine="serial",
        devices=jax.devices()[:1],
    )
    dataset = from_config.load_data(config)
    batches = data.test_batches(
        dataset,
        config.eval_batch_size,
        device=jax.devices()[0],
        dtype=from_config.example_batch(config)["image"].dtype,
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
        ValueError: there is no such run, or nothing of it can be loaded.
    """
    network, config = load(workdir, which)
    folder = pathlib.Path(workdir) / resume.EXPORT / which
    partial = folder.with_name(f"{which}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    checkpoint.save_safetensors(network, partial / SAFETENSORS)
    checkpoint.save_network(network, partial / ORBAX, step=0)
    # An earlier one may be of a network that was still being trained.
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return {"safetensors": folder / SAFETENSORS, "orbax": folder / ORBAX}
