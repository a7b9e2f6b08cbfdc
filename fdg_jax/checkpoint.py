"""Checkpoints: a whole network, saved with Orbax as ``<directory>/<step>``.

What is saved is every variable of the network but the random state of its layers, as a
nested dict of arrays that does not depend on how the network was cut into stages.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.flax
from flax import nnx

from fdg_jax import folders, orbax_turns
from fdg_jax.blocks import fill_state
from fdg_jax.words import describe, path_name

_NOT_RANDOM = nnx.Not(nnx.RngState)


def save_network(network: nnx.Module, directory: pathlib.Path, step: int) -> None:
    """Saves a network; the files are whole when this returns.

    Args:
        network: the network, on one device.
        directory: where checkpoints go; made when missing.
        step: batches trained, the checkpoint's name.

    Raises:
        OSError: the disk does not take them.
    """
    save_arrays(nnx.to_pure_dict(nnx.state(network, _NOT_RANDOM)), directory, step)


def save_arrays(values: Mapping[str, Any], directory: pathlib.Path, step: int) -> None:
    """Saves nested dicts of arrays; as ``save_network`` does.

    Args:
        values: to save.
        directory: where checkpoints go; made when missing.
        step: the checkpoint's name.

    Raises:
        OSError: the disk does not take them.
    """
    directory = folders.local(directory)
    try:
        with orbax_turns.manager(directory) as manager:
            saved = manager.save(step, args=ocp.args.StandardSave(values))
    except ValueError as error:  # what TensorStore makes of a disk that is full
        raise OSError(f"{directory} cannot be written: {error}") from error
    if not saved:
        raise FileExistsError(f"{directory} holds step {step} already")


def network_arrays(network: nnx.Module) -> dict[str, np.ndarray]:
    """Returns a network's values by name, such as ``blocks/0/conv/kernel``.

    Args:
        network: the network.

    Returns:
        Host arrays; those without elements, and random state, are left out.
    """
    values = nnx.to_pure_dict(nnx.state(network, _NOT_RANDOM))
    leaves, _ = jax.tree_util.tree_flatten_with_path(values)
    return jax.device_get({path_name(path): a for path, a in leaves if a.size})


def set_network_arrays(
    network: nnx.Module, arrays: Mapping[str, np.ndarray]
) -> nnx.Module:
    """Gives a network the values of ``network_arrays``, in place.

    Args:
        network: a network like that one.
        arrays: by name.

    Returns:
        The same network.

    Raises:
        ValueError: the arrays are of another network.
    """
    state = nnx.state(network, _NOT_RANDOM)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    named = [(path_name(path), old) for path, old in leaves]
    wanted = {name for name, old in named if old.size}
    if differing := sorted(wanted ^ arrays.keys()):
        raise ValueError(
            f"values must be of the same network; only one of them has {differing[0]}"
        )
    replaced = []
    for name, old in named:
        new = arrays.get(name, old)
        if describe(new) != describe(old):
            raise ValueError(
                f"values must be of the same network; {name} is {describe(new)} where "
                f"{describe(old)} is needed"
            )
        replaced.append(jax.device_put(new, old.sharding))
    nnx.update(network, fill_state(state, jax.tree.unflatten(treedef, replaced)))
    return network


def save_safetensors(network: nnx.Module, path: pathlib.Path) -> None:
    """Saves a network's values as one file of safetensors.

    Args:
        network: the network.
        path: of the file; replaced when there, once the new one is whole.
    """
    partial = path.with_name(f"{path.name}.partial")
    safetensors.flax.save_file(network_arrays(network), str(partial))
    partial.replace(path)


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
    found = steps(directory)
    if not found or step not in (None, *found):
        raise ValueError(
            f"no checkpoint {'' if step is None else f'{step} '}in {directory}; the "
            f"steps there are {sorted(found) or 'none'}"
        )
    state = nnx.state(network, _NOT_RANDOM)
    step = max(found) if step is None else step
    values = restore_arrays(nnx.to_pure_dict(state), directory, step)
    nnx.update(network, fill_state(state, values))
    return network


def restore_arrays(
    like: Mapping[str, Any], directory: pathlib.Path, step: int
) -> dict[str, Any]:
    """Reads what ``save_arrays`` saved.

    Args:
        like: nested dicts of arrays of the same shapes and types, where they are to go.
        directory: as given to ``save_arrays``.
        step: which checkpoint, that there is.
    """
    template = jax.tree.map(_abstract, like)
    with orbax_turns.manager(folders.local(directory)) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(template))


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder.

    Args:
        directory: as given to ``save_network``.
    """
    directory = folders.local(directory)
    if not directory.is_dir():  # which Orbax would make
        return []
    with orbax_turns.manager(directory) as manager:
        return manager.all_steps()


def _abstract(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
