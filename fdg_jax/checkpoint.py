"""Checkpoints: a whole network, saved with Orbax as ``<directory>/<step>``.

What is saved is every variable of the network but the random state of its layers, as a
nested dict of arrays that does not depend on how the network was cut into stages.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

_NOT_RANDOM = nnx.Not(nnx.RngState)


def save_network(network: nnx.Module, directory: pathlib.Path, step: int) -> None:
    """Saves a network; the files are whole when this returns.

    Args:
        network: the network, on one device.
        directory: where checkpoints go; made when missing.
        step: batches trained, the checkpoint's name.
    """
    values = nnx.to_pure_dict(nnx.state(network, _NOT_RANDOM))
    with ocp.CheckpointManager(pathlib.Path(directory).absolute()) as manager:
        manager.save(step, args=ocp.args.StandardSave(values))


def restore_network(
    network: nnx.Module, directory: pathlib.Path, step: int | None = None
) -> nnx.Module:
    """Gives a network the values that were saved, in place.

    Args:
        network: a network like the saved one, such as ``models.create`` makes again.
        directory: as given to ``save_network``.
        step: which checkpoint; None for the latest.

    Returns:
        The same network.

    Raises:
        ValueError: there is no such checkpoint, or it is of another network.
    """
    directory = pathlib.Path(directory).absolute()
    steps = _steps(directory)
    if not steps or step not in (None, *steps):
        raise ValueError(
            f"no checkpoint {'' if step is None else f'{step} '}in {directory}; the "
            f"steps there are {sorted(steps) or 'none'}"
        )
    state = nnx.state(network, _NOT_RANDOM)
    template = jax.tree.map(_abstract, nnx.to_pure_dict(state))
    with ocp.CheckpointManager(directory) as manager:
        values = manager.restore(
            max(steps) if step is None else step,
            args=ocp.args.StandardRestore(template),
        )
    nnx.replace_by_pure_dict(state, values)
    nnx.update(network, state)
    return network


def _steps(directory: pathlib.Path) -> list[int]:
    if not directory.is_dir():  # which Orbax would make
        return []
    with ocp.CheckpointManager(directory) as manager:
        return manager.all_steps()


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
