"""An optimizer of many equal blocks, computed as one of few.

An optimizer gets the blocks of a stage one by one, since its masks, norms and factors
go by the paths and the axes of single arrays. Of hundreds of equal blocks it makes
hundreds of equal equations, which XLA takes a minute to compile. Here it still sees
single blocks, but what it does alike to each of them is computed for all at once. For
that the values of equal blocks are *joined*: one value stands for all, and each of its
arrays has one more axis at the front.

Which equations are alike is found by value numbering: those with the same primitive,
parameters and inputs are, if equal blocks' arrays count as the same. What treats one
block in a way of its own, or mixes blocks (a global norm), stays as it is written.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend import core


def reroll(
    transform: optax.GradientTransformation, runs: Sequence[range]
) -> optax.GradientTransformation:
    """Makes a transform of single blocks one of joined values.

    Args:
        transform: of a dict from the position of a block to its parameters.
        runs: positions of equal blocks; all runs together are all blocks.

    Returns:
        A transform that wants parameters. In every dict that has the positions of all
        blocks, the parameters, gradients and whatever the state holds of them, it has
        the value of a run at the position of its first block, joined, and nothing at
        the others'; the state has single values if they are not alike.
    """
    if all(len(run) == 1 for run in runs):
        return transform

    def init(params):
        return _call(transform.init, [params], [_single_blocks(params, runs)], runs)

    def update(gradients, state, params):
        like = _single_blocks(params, runs)
        likes = [
            _single_blocks(gradients, runs),
            jax.eval_shape(transform.init, like),
            like,
        ]
        return _call(transform.update, [gradients, state, params], likes, runs)

    return optax.GradientTransformation(init, update)


def _single_blocks(values: dict[int, Any], runs: Sequence[range]) -> dict[int, Any]:
    """Returns abstract values of single blocks like joined ones."""

    def without_axis(array):
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)

    singles = {}
    for run in runs:
        value = values[run.start]
        single = value if len(run) == 1 else jax.tree.map(without_axis, value)
        singles |= dict.fromkeys(run, single)
    return singles


def _call(
    function: Callable, arguments: Sequence, likes: Sequence, runs: Sequence[range]
) -> Any:
    """Calls a function of single blocks on joined values.

    Args:
        function: of pytrees of arrays.
        arguments: as ``function`` takes them, but joined.
        likes: as ``function`` takes them, may be abstract.
        runs: as in ``reroll``.

    Returns:
        What ``function`` returns, but joined.
    """
    arguments = _split(arguments, likes, runs)
    program, result = jax.make_jaxpr(function, return_shape=True)(*likes)
    if program.effects:  # It prints, say, and what it prints is to stay the same.
        result = function(*jax.tree.map(_array, arguments))
    else:
        values = _evaluate(program, jax.tree.leaves(arguments), runs)
        result = jax.tree.unflatten(jax.tree.structure(result), values)
    return _join(result, runs)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lane:
    """One block's part of a joined array.

    Attributes:
        joined: the array, [length of the run, ...].
        index: of the block in its run.
        position: of the block in the network.
    """

    joined: jax.Array
    index: int
    position: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.joined.shape[1:]

    @property
    def dtype(self) -> jnp.dtype:
        return self.joined.dtype


def _array(value: jax.Array | _Lane) -> jax.Array:
    if isinstance(value, _Lane):
        return lax.index_in_dim(value.joined, value.index, keepdims=False)
    return value


def _goes_by_position(runs: Sequence[range]) -> Callable[[Any], bool]:
    positions = set(itertools.chain(*runs))
    return lambda node: isinstance(node, dict) and node.keys() == positions


def _split(tree: Any, like: Any, runs: Sequence[range]) -> Any:
    """Puts lanes of joined values wherever ``like`` has values of single blocks."""
    is_dict = _goes_by_position(runs)

    def split(like, node):
        if not is_dict(like):
            return node
        singles = dict(node)
        for run in runs:
            if node.keys().isdisjoint(run[1:]):
                for index, position in enumerate(run):
                    singles[position] = lanes(node[run.start], index, position, run)
        return singles

    def lanes(joined, index, position, run):
        if len(run) == 1:
            return joined
        return jax.tree.map(lambda array: _Lane(array, index, position), joined)

    return jax.tree.map(split, like, tree, is_leaf=is_dict)


def _join(tree: Any, runs: Sequence[range]) -> Any:
    """Joins the values of each run's blocks wherever they are alike."""
    is_dict = _goes_by_position(runs)

    def join(node):
        if not is_dict(node):
            return _array(node)
        joined = {}
        for run in runs:
            values = [node[i] for i in run]
            if len(run) > 1 and _are_alike(values):
                joined[run.start] = jax.tree.map(lambda *v: _stack(v), *values)
            else:
                joined |= jax.tree.map(_array, dict(zip(run, values, strict=True)))
        return joined

    return jax.tree.map(join, tree, is_leaf=is_dict)


def _are_alike(values: Sequence[Any]) -> bool:
    leaves, structures = zip(*map(jax.tree.flatten, values), strict=True)
    kinds = [[(a.shape, a.dtype) for a in of_one] for of_one in leaves]
    return all(s == structures[0] for s in structures) and all(
        k == kinds[0] for k in kinds
    )


def _stack(values: Sequence[jax.Array | _Lane]) -> jax.Array:
    first = values[0]
    if all(v is first for v in values):
        return jnp.broadcast_to(_array(first), (len(values), *first.shape))
    if all(
        isinstance(v, _Lane) and v.joined is first.joined and v.index == i
        for i, v in enumerate(values)
    ):
        return first.joined
    return jnp.stack([_array(v) for v in values])


def _evaluate(
    program: core.ClosedJaxpr, arguments: Sequence, runs: Sequence[range]
) -> list[Any]:
    """Computes a program of single blocks; what is alike for a run's blocks, at once.

    Args:
        program: without effects.
        arguments: arrays, and lanes of joined ones.
        runs: as in ``reroll``.

    Returns:
        What the program returns: arrays, and lanes of joined ones.
    """
    jaxpr = program.jaxpr
    run_of = {i: run for run in runs for i in run}
    constants = zip(jaxpr.constvars, program.consts, strict=True)
    inputs = [*constants, *zip(jaxpr.invars, arguments, strict=True)]
    names = _name_all(jaxpr, inputs, run_of)
    arrays = {}

    def value(atom):
        if isinstance(atom, core.Literal):
            return jnp.asarray(atom.val, atom.aval.dtype)
        number, position = names[atom]
        if position is None:
            return arrays[number]
        return _Lane(arrays[number], run_of[position].index(position), position)

    for variable, given in inputs:
        is_lane = isinstance(given, _Lane)
        arrays[names[variable].number] = given.joined if is_lane else given
    for equation in jaxpr.eqns:
        outputs = [names[variable] for variable in equation.outvars]
        if all(output.number in arrays for output in outputs):
            continue
        function, variables = _one_equation(jaxpr, equation)
        if outputs[0].position is None:
            results = function(*[_array(value(v)) for v in variables])
        else:
            results = _at_once(function, [value(v) for v in variables])
        for output, result in zip(outputs, results, strict=True):
            arrays[output.number] = result
    return [value(atom) for atom in jaxpr.outvars]


def _one_equation(
    jaxpr: core.Jaxpr, equation: core.JaxprEqn
) -> tuple[Callable, list[core.Var]]:
    """Returns an equation of a program as a function, and the variables it takes."""
    atoms = [a for a in equation.invars if not isinstance(a, core.Literal)]
    variables = list(dict.fromkeys(atoms))
    alone = jaxpr.replace(
        constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation]
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ())), variables


def _at_once(function: Callable, values: Sequence[jax.Array | _Lane]) -> list:
    """Calls a function of one block for all blocks of a run; returns joined arrays."""
    arrays = [v.joined if isinstance(v, _Lane) else v for v in values]
    axes = tuple(0 if isinstance(v, _Lane) else None for v in values)
    return jax.vmap(function, in_axes=axes)(*arrays)


class _Name(NamedTuple):
    """What the value of a variable, or an equation, is known by.

    Attributes:
        number: the same for what is alike for the blocks of a run.
        position: of the block that it belongs to; None if to none, or to several.
    """

    number: int
    position: int | None


def _name_all(
    jaxpr: core.Jaxpr, inputs: Sequence[tuple], run_of: Mapping[int, range]
) -> dict[core.Var, _Name]:
    """Names the variables of a program by value numbering.

    Args:
        jaxpr: the program.
        inputs: pairs of a variable and the array or the lane that it stands for.
        run_of: the run of each position.

    Returns:
        Names. Of those with a position there is one for each block of a run.
    """
    names = _Names()
    for variable, given in inputs:
        names.give_input(variable, given)
    for equations in _levels(jaxpr):
        found = [names.find(equation) for equation in equations]
        positions = defaultdict(set)
        for number, position in found:
            positions[number].add(position)
        for equation, name in zip(equations, found, strict=True):
            # What is done to some blocks of a run only belongs to none of them: a sum
            # over the blocks starts with the first, and would count as its own.
            whole = len(run_of.get(name.position, ()))
            if len(positions[name.number]) < whole:
                name = names.apart(equation)
            names.give(equation, name)
    return names


def _levels(jaxpr: core.Jaxpr) -> list[list[core.JaxprEqn]]:
    """Sorts equations by how long a chain of others they need; like ones are equal."""
    depths = {}
    levels = defaultdict(list)
    for equation in jaxpr.eqns:
        needed = [a for a in equation.invars if not isinstance(a, core.Literal)]
        depth = max((depths.get(variable, 0) for variable in needed), default=0)
        levels[depth].append(equation)
        depths.update(dict.fromkeys(equation.outvars, depth + 1))
    return [levels[depth] for depth in sorted(levels)]


class _Names(dict[core.Var, _Name]):
    """Names of variables: equal keys have equal numbers."""

    def __init__(self):
        super().__init__()
        self._numbers = {}

    def give_input(self, variable: core.Var, value: Any) -> None:
        """Names a variable by the array that it stands for."""
        if isinstance(value, _Lane):
            key, position = ("input", id(value.joined)), value.position
        else:
            key, position = ("input", id(value)), None
        self[variable] = _Name(self._number(key), position)

    def find(self, equation: core.JaxprEqn) -> _Name:
        """Returns the name of an equation whose inputs have names."""
        inputs = [self._name_of(atom) for atom in equation.invars]
        positions = {name.position for name in inputs} - {None}
        if len(positions) > 1:
            return self.apart(equation)
        numbers = [name.number for name in inputs]
        key = equation.primitive, _key(equation.params), *numbers
        return _Name(self._number(key), *(positions or {None}))

    def apart(self, equation: core.JaxprEqn) -> _Name:
        """Returns the name of an equation that is like no other."""
        return _Name(self._number(("apart", id(equation))), None)

    def give(self, equation: core.JaxprEqn, name: _Name) -> None:
        """Names the outputs of an equation."""
        for i, variable in enumerate(equation.outvars):
            number = self._number(("output", i, name.number))
            self[variable] = _Name(number, name.position)

    def _name_of(self, atom: core.Var | core.Literal) -> _Name:
        if isinstance(atom, core.Literal):
            return _Name(self._number(("literal", _key(atom))), None)
        return self[atom]

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


def _key(value: Any) -> Hashable:
    """A key that parameters of two equations share only if they mean the same."""
    if isinstance(value, core.ClosedJaxpr):
        return _key_of_jaxpr(value.jaxpr), *map(id, value.consts)
    if isinstance(value, core.Jaxpr):
        return _key_of_jaxpr(value)
    if isinstance(value, core.Literal):
        return value.aval, np.asarray(value.val).tobytes()
    if isinstance(value, dict):
        return tuple((name, _key(v)) for name, v in value.items())
    if isinstance(value, tuple | list):
        return type(value), *map(_key, value)
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def _key_of_jaxpr(jaxpr: core.Jaxpr) -> Hashable:
    numbers = {}

    def key(atom):
        if isinstance(atom, core.Literal):
            return _key(atom)
        return numbers.setdefault(atom, len(numbers)), atom.aval

    def keys(atoms):
        return tuple(map(key, atoms))

    equations = tuple(
        (e.primitive, _key(e.params), keys(e.invars), keys(e.outvars))
        for e in jaxpr.eqns
    )
    return keys(jaxpr.constvars), keys(jaxpr.invars), equations, keys(jaxpr.outvars)
