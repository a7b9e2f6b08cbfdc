"""An optimizer of many equal blocks, computed as one of few.

An optimizer gets the blocks of a stage one by one, since its masks, norms and factors
go by the paths and the axes of single arrays. Of hundreds of equal blocks it makes
hundreds of equal equations, which XLA takes a minute to compile. Here it still sees
single blocks, but what it does alike to each of a run of them is computed at once. For
that the values of a run are *joined*: one value stands for all, and each of its arrays
has one more axis at the front. A *lane* is one block's part of a joined array.

Which equations are alike is found by value numbering: those with the same primitive,
parameters and inputs are, if the lanes of a joined array count as the same. What treats
one block in a way of its own, or mixes blocks (a global norm), stays as it is written.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core


def reroll(
    init: Callable, step: Callable, runs: Sequence[range]
) -> tuple[Callable, Callable]:
    """Makes an optimizer of single blocks one of joined values.

    Args:
        init: from parameters, a dict by the position of a block, to a state.
        step: from gradients, state and parameters to new parameters and state.
        runs: positions of equal blocks; all runs together are all blocks.

    Returns:
        ``init`` and ``step`` for joined values. They have the value of a run at the
        position of its first block, and nothing at the others'. So has every dict of
        the state that goes by the positions of all blocks, as far as a run's values are
        alike: of the same structure, shapes and types. Those that are not stay single.
    """
    if all(len(run) == 1 for run in runs):
        return init, step

    def joined_init(params):
        return _call(init, [params], [_single(params, runs)], runs)

    def joined_step(gradients, state, params):
        like = _single(params, runs)
        likes = [like, jax.eval_shape(init, like), like]
        return _call(step, [gradients, state, params], likes, runs)

    return joined_init, joined_step


def _single(values: dict[int, Any], runs: Sequence[range]) -> dict[int, Any]:
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
        likes: of the structure of those that ``function`` takes.
        runs: as in ``reroll``.

    Returns:
        What ``function`` returns, but joined.
    """
    arguments = _to_lanes(arguments, likes, runs)
    abstract = jax.tree.map(_abstract, arguments)
    program, result = jax.make_jaxpr(function, return_shape=True)(*abstract)
    if program.effects:  # It prints, say, and what it prints is to stay the same.
        result = function(*jax.tree.map(_array, arguments))
        result = jax.tree.map(jnp.asarray, result)
    else:
        values = _evaluate(program, jax.tree.leaves(arguments), runs)
        result = jax.tree.unflatten(jax.tree.structure(result), values)
    return _from_lanes(result, runs)


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


def _abstract(value: jax.Array | _Lane) -> jax.ShapeDtypeStruct:
    array = value.joined if isinstance(value, _Lane) else value
    is_weak = jax.typeof(array).weak_type
    return jax.ShapeDtypeStruct(value.shape, value.dtype, weak_type=is_weak)


def _is_by_position(node: Any, runs: Sequence[range]) -> bool:
    return isinstance(node, dict) and node.keys() == set(itertools.chain(*runs))


def _to_lanes(tree: Any, like: Any, runs: Sequence[range]) -> Any:
    """Puts lanes of joined values wherever ``like`` has values of single blocks."""

    def is_by_position(node):
        return _is_by_position(node, runs)

    def convert(like, node):
        if not is_by_position(like):
            return node
        singles = dict(node)
        for run in runs:
            if len(run) > 1 and node.keys().isdisjoint(run[1:]):
                for index, position in enumerate(run):
                    singles[position] = lanes(node[run.start], index, position)
        # In the order of the other one, for some dicts keep theirs.
        return jax.tree_util.tree_map_with_path(
            lambda path, _: singles[path[0].key], like, is_leaf=lambda n: n is not like
        )

    def lanes(joined, index, position):
        return jax.tree.map(lambda array: _Lane(array, index, position), joined)

    return jax.tree.map(convert, like, tree, is_leaf=is_by_position)


def _from_lanes(tree: Any, runs: Sequence[range]) -> Any:
    """Joins the values of each run's blocks wherever they are alike."""

    def is_by_position(node):
        return _is_by_position(node, runs)

    def convert(node):
        if not is_by_position(node):
            return _array(node)
        joined = {}
        for run in runs:
            values = [node[i] for i in run]
            if len(run) > 1 and _are_alike(values):
                joined[run.start] = jax.tree.map(lambda *v: _join(v), *values)
            else:
                joined |= jax.tree.map(_array, dict(zip(run, values, strict=True)))
        return joined

    return jax.tree.map(convert, tree, is_leaf=is_by_position)


def _are_alike(values: Sequence[Any]) -> bool:
    leaves, structures = zip(*map(jax.tree.flatten, values), strict=True)
    kinds = [[(a.shape, a.dtype) for a in of_one] for of_one in leaves]
    return all(s == structures[0] for s in structures) and all(
        k == kinds[0] for k in kinds
    )


def _join(values: Sequence[jax.Array | _Lane]) -> jax.Array:
    first = values[0]
    if all(v is first for v in values):
        return jnp.broadcast_to(_array(first), (len(values), *first.shape))
    if _are_all_lanes(values):
        return first.joined
    return jnp.stack([_array(v) for v in values])


def _are_all_lanes(values: Sequence[jax.Array | _Lane]) -> bool:
    """Whether values are the lanes of one array, all of them and in order."""
    first = values[0]
    return (
        isinstance(first, _Lane)
        and len(values) == len(first.joined)
        and all(
            isinstance(v, _Lane) and v.joined is first.joined and v.index == i
            for i, v in enumerate(values)
        )
    )


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
        values = [value(variable) for variable in variables]
        if outputs[0].position is None:
            results = function(*map(_array, values))
        else:
            results = _for_a_run(function, values, at_once=_is_batched(equation))
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


def _for_a_run(
    function: Callable, values: Sequence[jax.Array | _Lane], *, at_once: bool
) -> list[jax.Array]:
    """Calls a function of one block for all of a run.

    Args:
        function: of arrays.
        values: what it takes for one of the blocks.
        at_once: whether batched; if not, it is called for one block after the other.

    Returns:
        Joined arrays.
    """

    def of_one(arrays):
        rest = iter(arrays)
        return function(*[next(rest) if isinstance(v, _Lane) else v for v in values])

    joined = [v.joined for v in values if isinstance(v, _Lane)]
    return jax.vmap(of_one)(joined) if at_once else lax.map(of_one, joined)


_ONE_BY_ONE = ("cond", "while", "random_", "rng_", "callback", "ffi_call")
"""Parts of the names of primitives that batching changes, or that cannot be batched.

A batched cond runs both branches and a batched loop goes on until the last block has
come to its end, so what would not end, or cost much, is no longer kept from running;
some generators draw other numbers for a batch of keys.
"""


def _is_batched(equation: core.JaxprEqn) -> bool:
    """Whether an equation may be batched, with all that is inside."""
    if any(part in equation.primitive.name for part in _ONE_BY_ONE):
        return False
    inner = jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda p: _jaxpr_of(p) is not None
    )
    return all(
        _is_batched(e)
        for jaxpr in map(_jaxpr_of, inner)
        if jaxpr is not None
        for e in jaxpr.eqns
    )


def _jaxpr_of(param: Any) -> core.Jaxpr | None:
    if isinstance(param, core.ClosedJaxpr):
        return param.jaxpr
    return param if isinstance(param, core.Jaxpr) else None


class _Name(NamedTuple):
    """What an equation, or the value of a variable, is known by.

    Attributes:
        number: equal for what is the same of the blocks of a run, or the same at all.
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
            # What is done to some blocks of a run only belongs to none: a sum over the
            # blocks begins with 0 + x_0, which would make it a value of block 0.
            whole = len(run_of.get(name.position, ()))
            if len(positions[name.number]) < whole:
                name = names.apart(equation)
            names.give(equation, name)
    return names


def _levels(jaxpr: core.Jaxpr) -> list[list[core.JaxprEqn]]:
    """Sorts equations by the longest chain of others that each needs.

    Those that are alike are in one level, so there a run's can be counted.
    """
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
            key, position = ("lane", id(value.joined)), value.position
        else:
            key, position = ("array", id(value)), None
        self[variable] = _Name(self._number(key), position)

    def find(self, equation: core.JaxprEqn) -> _Name:
        """Returns the name of an equation whose inputs have names."""
        inputs = [self._name_of(atom) for atom in equation.invars]
        positions = {name.position for name in inputs} - {None}
        if len(positions) > 1:
            return self.apart(equation)
        key = *_operation(equation), *[name.number for name in inputs]
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


def _operation(equation: core.JaxprEqn) -> tuple:
    """What an equation does, whatever it does it to."""
    return equation.primitive, _key(equation.params), _key(equation.ctx)


def _key(value: Any) -> Hashable:
    """A key that two values share only if they mean the same in an equation.

    Objects without a value to compare go by their identity, which the program that
    holds them keeps from being used anew.
    """
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
    if isinstance(value, float):
        return type(value), value.hex()  # 0.0 equals -0.0.
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
        (*_operation(e), keys(e.invars), keys(e.outvars)) for e in jaxpr.eqns
    )
    return keys(jaxpr.constvars), keys(jaxpr.invars), equations, keys(jaxpr.outvars)
