"""Data parallelism: one stage on several devices, each with a share of every batch.

With D devices, device d takes images ``d * B / D`` to ``(d + 1) * B / D - 1`` of a
batch of B, and the mean of their gradients updates the parameters, of which every
device has a copy::

    g = mean over d of grad loss(params, share d)

As in PyTorch's ``DistributedDataParallel``, BatchNorm normalises each share by its own
statistics; the running averages are the mean of the devices', so that copies agree.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdg_jax import losses
from fdg_jax.blocks import Run
from fdg_jax.stage import Stage

_AXIS = "batch"


class DataParallelStage(Stage):
    """A stage that is a whole network, on several devices."""

    def __init__(
        self,
        index: int,
        num_stages: int,
        runs: Sequence[Run],
        *,
        device: jax.Device,
        devices: Sequence[jax.Device],
        **options: Any,
    ):
        """Creates the stage.

        Args:
            index: 0.
            num_stages: 1.
            runs: the network's blocks.
            device: the first of ``devices``.
            devices: where its copies live.
            **options: as for ``Stage``.
        """
        assert num_stages == 1 and device == devices[0], (num_stages, device)
        self._mesh = Mesh(np.array(devices), (_AXIS,))
        super().__init__(
            index,
            num_stages,
            runs,
            device=device,
            placement=NamedSharding(self._mesh, PartitionSpec()),
            **options,
        )

    def _shared(self, function, batch_arguments):
        """Runs a function on shares of its last arguments, and averages its results."""
        whole, shares = PartitionSpec(), PartitionSpec(_AXIS)

        def on_a_device(*arguments):
            results = function(*arguments)
            return jax.tree.map(
                lambda r: _add(r, batch_arguments > 0) if _is_total(r) else _average(r),
                results,
                is_leaf=_is_total,
            )

        def call(*arguments):
            num_whole = len(arguments) - batch_arguments
            return jax.shard_map(
                on_a_device,
                mesh=self._mesh,
                in_specs=(whole,) * num_whole + (shares,) * batch_arguments,
                out_specs=whole,
                # Unchecked, gradients are each device's own until they are averaged.
                check_vma=False,
            )(*arguments)

        return call

    def _key(self, batch):
        """Every device draws for itself, outside of evaluation, where none does."""
        return jax.random.fold_in(super()._key(batch), jax.lax.axis_index(_AXIS))

    def _share(self, count):
        """The mean of the devices' counts, so that the mean of their losses is right.

        ``mean_d(sum_d / mean_d(count_d))`` is ``sum_d sum_d / sum_d count_d``.
        """
        return jax.lax.pmean(count, _AXIS)

    def _loss_step_fn(self, *arguments):
        return self._shared(super()._loss_step_fn, 2)(*arguments)

    def _evaluate_loss_fn(self, params, batch_stats, x, label):
        """Shares a batch out where it can be; the last one of a test set may not."""
        arguments = (params, batch_stats, x, label)
        size = jax.tree.leaves((label, x))[0].shape[0]
        num_shared = 2 if size % self._mesh.size == 0 else 0
        return self._shared(super()._evaluate_loss_fn, num_shared)(*arguments)


def _is_total(value: Any) -> bool:
    return isinstance(value, losses.Total)


def _add(total: losses.Total, is_shared: bool) -> losses.Total:
    """The sum over devices, if each has counted its own share of the batch."""
    return jax.tree.map(
        lambda a: jax.lax.psum(a, _AXIS) if is_shared else _average(a), total
    )


def _average(a: jax.Array) -> jax.Array:
    """The mean over devices; of counts and indices, which agree or say who is first."""
    if jnp.issubdtype(a.dtype, jnp.inexact):
        return jax.lax.pmean(a, _AXIS)
    if a.dtype == jnp.bool_:
        return jax.lax.pmin(a.astype(jnp.int32), _AXIS) > 0
    return jax.lax.pmin(a, _AXIS)
