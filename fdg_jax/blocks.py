"""Blocks as pure functions: an ``nnx.Module`` taken apart, and runs of identical ones.

A block's variables are sorted into three kinds: parameters (``nnx.Param``), random
state, which is made anew for every batch, and all the rest, of which BatchNorm
statistics are the usual case and which is therefore called ``batch_stats``. Values
travel as plain nested dicts of arrays, which ``jit`` dispatches quickly. What a
variable holds may itself be a pytree.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fdg_jax.models.network import Network
from fdg_jax.words import describe, path_name

SCAN_MIN_LENGTH = 32
"""Runs of identical blocks at least this long are joined and applied by lax.scan.

A scan saves compile time, about a third of a second per block, but runs slower, by an
eighth on a CPU with a ResNet-56: XLA cannot fuse across its steps.
"""


@dataclass(frozen=True)
class Block:
    """One block of a network as pure functions of its values.

    Attributes:
        index: its position in the network.
        name: its class and position, for messages.
        graphdef: the static part of the module.
        params: abstract parameters, which say where in the module each value belongs.
        random_state: abstract random state, whose keys are derived anew per batch.
        batch_stats: abstract other state.
    """

    index: int
    name: str
    graphdef: nnx.GraphDef
    params: nnx.State
    random_state: nnx.State
    batch_stats: nnx.State

    def apply(self, params, batch_stats, x, key=None, *, train: bool):
        """Calls the block.

        Args:
            params: nested dict of parameters.
            batch_stats: nested dict of all other state that a call may change.
            x: the block's input, a pytree of arrays.
            key: source of the block's random layers; None where there is none to feed.
            train: whether BatchNorm and dropout act as in training.

        Returns:
            The output and the new batch_stats.
        """
        module = self.module(params, batch_stats, key)
        module.train() if train else module.eval()
        y = module(x)
        nnx.pop(module, nnx.Intermediate)
        _, _, _, batch_stats = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return y, nnx.to_pure_dict(batch_stats)

    def module(self, params, batch_stats, key=None) -> nnx.Module:
        """Returns the block as a module with these values; arguments as ``apply``."""
        random_state = self._random_state(jax.random.key(0) if key is None else key)
        return nnx.merge(
            self.graphdef,
            fill_state(self.params, params),
            random_state,
            fill_state(self.batch_stats, batch_stats),
        )

    def _random_state(self, key: jax.Array) -> nnx.State:
        """Random state in which stream j of the block starts from fold_in(key, j)."""
        fresh = []
        for j, (path, variable) in enumerate(nnx.to_flat_state(self.random_state)):
            shape = variable.get_value().shape
            if issubclass(variable.type, nnx.RngKey):
                stream = jax.random.fold_in(key, j)
                value = stream if shape == () else jax.random.split(stream, shape)
            else:
                value = jnp.zeros(shape, jnp.uint32)
            fresh.append((path, variable.replace(value)))
        return nnx.from_flat_state(fresh)


@dataclass(frozen=True)
class Run:
    """Consecutive identical blocks: one block, or several that ``lax.scan`` applies.

    A stage holds the values of a run *joined*: with length 1 they are the block's own,
    otherwise every array has a leading axis of this length.

    Attributes:
        block: the first of them, which stands for all.
        length: how many.
    """

    block: Block
    length: int

    @property
    def start(self) -> int:
        """Position of the first block in the network."""
        return self.block.index

    @property
    def blocks(self) -> range:
        """Positions of the blocks in the network."""
        return range(self.start, self.start + self.length)

    def apply(self, params, batch_stats, x, key, *, train: bool):
        """Calls the blocks in order; arguments and results as ``Block.apply``.

        Block i draws from ``fold_in(key, i)`` with i its position in the network, so
        that its randomness does not depend on the cuts.
        """
        if self.length == 1:
            key = jax.random.fold_in(key, self.start)
            return self.block.apply(params, batch_stats, x, key, train=train)

        def step(x, values):
            params, batch_stats, index = values
            key_i = jax.random.fold_in(key, index)
            return self.block.apply(params, batch_stats, x, key_i, train=train)

        index = self.start + jnp.arange(self.length, dtype=jnp.uint32)
        return jax.lax.scan(step, x, (params, batch_stats, index))

    def join(self, values: Sequence[Any]) -> Any:
        """Joins the values of the run's blocks, which are NumPy arrays."""
        if self.length == 1:
            return values[0]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *values)

    def split(self, values: Any) -> list[Any]:
        """Splits joined values into those of the single blocks."""
        if self.length == 1:
            return [values]
        return [jax.tree.map(lambda a, i=i: a[i], values) for i in range(self.length)]


def fill_state(like: nnx.State, values: Any) -> nnx.State:
    """Returns a state like another one, with the values of a nested dict.

    Args:
        like: a state, may be abstract; each of its variables may hold any pytree.
        values: as ``nnx.to_pure_dict`` returns it for such a state.
    """
    filled = []
    for path, variable in nnx.to_flat_state(like):
        value = values
        for key in path:
            value = value[key]
        # An array that is an attribute of a module is a leaf itself.
        is_variable = isinstance(variable, nnx.Variable)
        filled.append((path, variable.replace(value) if is_variable else value))
    return nnx.from_flat_state(filled)


def split_network(network: Sequence[nnx.Module]) -> tuple[list[Block], list, list]:
    """Takes a network apart.

    Args:
        network: its blocks in order.

    Returns:
        The blocks, and per block its parameters and its batch_stats as nested dicts of
        the module's own arrays.

    Raises:
        ValueError: an element is not an ``nnx.Module``, a parameter is no
            floating-point number, or two blocks share a variable.
    """
    blocks, params, batch_stats = [], [], []
    for index, module in enumerate(network):
        name = f"block {index} ({type(module).__name__})"
        if not isinstance(module, nnx.Module):
            raise ValueError(
                f"a network is a sequence of nnx.Modules; {name} is {module!r}; wrap a "
                f"function in an nnx.Module, and a Linen module in nnx.bridge.ToNNX"
            )
        graphdef, p, random_state, s = _take_apart(module)
        _refuse_integers(name, p)
        blocks.append(Block(index, name, graphdef, *abstract((p, random_state, s))))
        params.append(nnx.to_pure_dict(p))
        batch_stats.append(nnx.to_pure_dict(s))
    _refuse_shared_variables(network, blocks)
    return blocks, params, batch_stats


def _take_apart(module: nnx.Module) -> tuple:
    """Splits a module, without what it may have sowed when it was last called."""
    module = nnx.clone(module)
    nnx.pop(module, nnx.Intermediate)
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _refuse_integers(name: str, params: nnx.State) -> None:
    for path, variable in nnx.to_flat_state(params):
        for array in jax.tree.leaves(abstract(variable.get_value())):
            if not jnp.issubdtype(array.dtype, jnp.inexact):
                raise ValueError(
                    f"parameters are floating-point, since they get a gradient; "
                    f"{_name(path)} of {name} is {describe(array)}; make it another "
                    f"kind of nnx.Variable"
                )


def _refuse_shared_variables(network: Sequence[nnx.Module], blocks: list[Block]):
    owner = {}
    for module, block in zip(network, blocks, strict=True):
        for path, variable in nnx.iter_graph(module):
            if not isinstance(variable, nnx.Variable):
                continue
            if isinstance(variable, nnx.RngState):
                continue
            first = owner.setdefault(id(variable), block.name)
            if first != block.name:
                raise ValueError(
                    f"blocks must not share variables, since they may end up on "
                    f"different devices; {first} and {block.name} share "
                    f"{_name(path)}; give each block its own"
                )


def join_network(
    network: Sequence[nnx.Module],
    params: Sequence[Any],
    batch_stats: Sequence[Any],
    device: jax.Device,
    name: str,
) -> Network:
    """Puts trained values back into modules like those of ``network``.

    Args:
        network: the network that was taken apart; it is left as it is.
        params: per block its parameters.
        batch_stats: per block its other state.
        device: where the values go.
        name: the new network's name.

    Returns:
        A new network, on one device, in evaluation mode.
    """
    modules = []
    for module, p, s in zip(network, params, batch_stats, strict=True):
        graphdef, old_p, random_state, old_s = _take_apart(module)
        values = (fill_state(old_p, p), random_state, fill_state(old_s, s))
        values = jax.device_put(values, device)
        modules.append(nnx.merge(graphdef, *values, copy=True))
    joined = Network(name, modules)
    joined.eval()
    return joined


def trace_shapes(
    blocks, params, batch_stats, image, source: str = "the images give"
) -> list[Any]:
    """Follows the shapes of a batch through the network, allocating nothing.

    Args:
        blocks: the blocks of the network.
        params: per block its parameters.
        batch_stats: per block its other state.
        image: the first block's input, arrays or abstract.
        source: where that comes from, for messages.

    Returns:
        ``[input of block 0, input of block 1, ..., output of the last]``, abstract.

    Raises:
        ValueError: a block fails on what the one before it gives, or changes what a
            forward cannot hand back; names the blocks.
    """
    seen = []
    x = abstract(image)
    shapes = [x]
    for block, p, s in zip(blocks, params, batch_stats, strict=True):
        values = abstract((p, s, x))
        signature = (block.graphdef, values)
        y = find_alike(signature, seen)
        if y is None:
            try:
                call = functools.partial(_trial_call, block)
                program, (y, _) = jax.make_jaxpr(call, return_shape=True)(*values)
                _refuse_changed_params(block, p, program.jaxpr)
            except ChangedBlockError:
                raise
            except Exception as error:
                raise ValueError(
                    f"{block.name} must take what {source}, {describe(x)}, but "
                    f"it failed: {str(error).splitlines()[0] or type(error).__name__}"
                ) from error
            seen.append((signature, y))
        x, source = y, f"{block.name} gives"
        shapes.append(x)
    return shapes


class ChangedBlockError(ValueError):
    """A block changes something in its forward that the pipeline would not carry."""


def _trial_call(block: Block, params: Any, batch_stats: Any, x: Any) -> tuple:
    """Calls a block that is being traced, and looks at what the call has changed.

    Returns:
        The output, and the parameters after the call.
    """
    module = block.module(params, batch_stats)
    module.train()
    y = module(x)
    sown = nnx.to_flat_state(nnx.pop(module, nnx.Intermediate))
    if sown:
        warnings.warn(
            f"{block.name} sows {', '.join(_name(path) for path, _ in sown)}, which "
            f"nobody reads; a value that the loss is to use must be carried along: "
            f"return it beside the block's output, and pass it on to the last block",
            stacklevel=2,
        )
    _, params, _, new_stats = nnx.split(module, nnx.Param, nnx.RngState, ...)
    before, after = (
        {path for path, _ in nnx.to_flat_state(state)}
        for state in (block.batch_stats, new_stats)
    )
    if before != after:
        raise ChangedBlockError(
            f"a block's variables are made in its __init__, since a stage carries "
            f"them from batch to batch; calling {block.name} adds or removes "
            f"{', '.join(map(_name, sorted(before ^ after, key=str)))}"
        )
    return y, nnx.to_pure_dict(params)


def _refuse_changed_params(block: Block, params: Any, program: Any) -> None:
    """Refuses a block that assigns to its own parameters, which nobody would keep.

    Args:
        block: the block.
        params: its parameters.
        program: the jaxpr of ``_trial_call``: parameters come first and go last.
    """
    made_by = {v: equation for equation in program.eqns for v in equation.outvars}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    after = program.outvars[len(program.outvars) - len(paths) :]
    for path, old, new in zip(paths, program.invars, after, strict=False):
        equation = None if hasattr(new, "val") else made_by.get(new)
        # What is inside (jax.checkpoint, a loop) may hand a parameter through.
        is_opaque = equation and any("jaxpr" in key for key in equation.params)
        if new is not old and not is_opaque:
            raise ChangedBlockError(
                f"parameters are changed by the optimizer only; calling {block.name} "
                f"changes {path_name(path)}; make it another kind of nnx.Variable"
            )


def _name(path: Sequence[Any]) -> str:
    return "/".join(map(str, path))


def group_runs(blocks, params, batch_stats, shapes, *, first, stop) -> tuple[Run, ...]:
    """Groups blocks ``first`` to ``stop - 1`` of a network into runs.

    Blocks are identical when they have the same static part, arrays of the same shapes
    and inputs of the same shape; two in a row therefore keep the shape of their input.

    Args:
        blocks: the blocks of the network.
        params: per block its parameters.
        batch_stats: per block its other state.
        shapes: result of ``trace_shapes``.
        first: position of the first block.
        stop: position after the last block.
    """
    signatures = [
        (blocks[i].graphdef, abstract((params[i], batch_stats[i], shapes[i])))
        for i in range(first, stop)
    ]
    runs, start = [], first
    while start < stop:
        end = start + 1
        while end < stop and signatures[end - first] == signatures[start - first]:
            end += 1
        if end - start < SCAN_MIN_LENGTH:
            runs += [Run(blocks[i], 1) for i in range(start, end)]
        else:
            runs.append(Run(blocks[start], end - start))
        start = end
    return tuple(runs)


def find_alike(signature: Any, known: Sequence[tuple[Any, Any]]) -> Any:
    """Returns what is known of an equal signature, or None.

    Args:
        signature: what makes blocks alike; it need not be hashable, since a module may
            hold a dict.
        known: pairs of a signature and what belongs to it, few of them.
    """
    return next((value for other, value in known if other == signature), None)


def abstract(values: Any) -> Any:
    """Returns a pytree of ``jax.ShapeDtypeStruct`` as jax.jit would see the arrays."""
    return jax.eval_shape(lambda a: a, values)


def count_elements(tree: Any) -> int:
    """Returns the number of elements of all arrays of a pytree."""
    return sum(int(np.prod(a.shape)) for a in jax.tree.leaves(tree))


def describe_blocks(names: Sequence[str]) -> str:
    """Formats block names with counts, as in ``Stem, 4 x BasicBlock``."""
    return ", ".join(n if c == 1 else f"{c} x {n}" for n, c in Counter(names).items())
