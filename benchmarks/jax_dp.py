"""Data parallelism in JAX: every device takes its share of each batch."""

from collections.abc import Callable

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import jax_bp
from benchmarks import task as tasks
from fdg_jax.blocks import Block, split_network


def make_parallel_step(
    blocks: list[Block], optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable:
    """Returns a step over a mesh with the one axis "batch", not yet compiled.

    Parameters are on every device; gradients, and the BatchNorm statistics, which each
    device takes of its own images, are averaged.
    """

    def average(values):
        return jax.lax.pmean(values, "batch")

    # Unchecked, gradients are each device's own, and ``average`` all there is to say.
    return jax.shard_map(
        jax_bp.make_step(blocks, optimizer, average),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("batch")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


class DataParallel(jax_bp.BackPropagation):
    """Back-propagation on as many devices as FDG has stages."""

    def __init__(self, task: tasks.Task):
        """Copies the network to every device and shares out the batch.

        Raises:
            Unavailable: there are not enough devices, or the batch cannot be shared
                out equally.
        """
        self._devices = jax.devices()[: task.num_stages]
        if len(self._devices) < task.num_stages:
            raise tasks.Unavailable(
                f"data parallelism over {task.num_stages} devices needs as many; "
                f"there are {len(self._devices)}"
            )
        if task.batch_size % task.num_stages:
            raise tasks.Unavailable(
                f"data parallelism shares out a batch equally; got batch_size="
                f"{task.batch_size} for {task.num_stages} devices"
            )
        mesh = Mesh(np.array(self._devices), ("batch",))
        optimizer = jax_bp.create_optimizer()
        blocks, params, batch_stats = split_network(jax_bp.create_network(task))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._state = jax_bp.init_state(params, batch_stats, optimizer, everywhere)
        self._batch = jax.device_put(
            jax_bp.create_batch(task), NamedSharding(mesh, PartitionSpec("batch"))
        )
        self._step = jax.jit(
            make_parallel_step(blocks, optimizer, mesh), donate_argnums=0
        )
