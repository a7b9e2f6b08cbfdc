"""An optimizer of joined blocks does what it does to single ones, whatever it does."""

import functools
from collections import OrderedDict

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax import lax

from fdg_jax.reroll import reroll

RUNS = [range(2, 3), range(3, 6), range(6, 8)]
POSITIONS = [i for run in RUNS for i in run]


def _block(rng, width):
    """Parameters of every form."""
    return {
        "linear": {"kernel": rng.normal(size=(width, 4)), "bias": rng.normal(size=4)},
        "gates": (rng.normal(size=()),),
        "empty": {},
    }


def make_params(runs=RUNS):
    """Blocks of which each of ``RUNS`` has its own shapes."""
    rng = np.random.default_rng(0)
    widths = {run: 3 + run.start if runs is RUNS else 3 for run in runs}
    blocks = {i: _block(rng, widths[run]) for run in runs for i in run}
    return jax.tree.map(jnp.asarray, blocks)


def join(values, runs=RUNS):
    return {
        run.start: values[run.start]
        if len(run) == 1
        else jax.tree.map(lambda *a: jnp.stack(a), *[values[i] for i in run])
        for run in runs
    }


def init_and_step(transform):
    def step(gradients, state, params):
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return transform.init, step


def train(init, step, params, num_updates=3):
    """Parameters after updates by gradients that differ from block to block."""

    @jax.jit
    def update(params, state, n):
        gradients = jax.tree.map(lambda p: jnp.sin(3 * p) + 0.1 * n, params)
        return step(gradients, state, params)

    state = jax.jit(init)(params)
    for n in range(num_updates):
        params, state = update(params, state, n)
    return params


def assert_same(transform, runs=RUNS, num_updates=3):
    """Joined blocks are trained as single ones are, which move."""
    init, step = init_and_step(transform)
    params = make_params(runs=runs)
    expected = train(init, step, params, num_updates)
    joined = train(*reroll(init, step, runs), join(params, runs), num_updates)
    chex.assert_trees_all_close(joined, join(expected, runs), rtol=1e-12, atol=1e-14)
    assert optax.tree.norm(optax.tree.sub(expected, params)) > 1e-2


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def each_block(function):
    """A transform of single blocks' updates by their position."""

    def update(updates, params):
        return {i: function(i, u, updates) for i, u in updates.items()}

    return optax.stateless(update)


def scaled(factor_of):
    return each_block(lambda i, u, _: jax.tree.map(lambda a: a * factor_of(i), u))


def of_each_array(function):
    return optax.stateless(lambda u, params: jax.tree.map(function, u))


def newton(a):
    """A square root by as many steps as the array needs."""

    def is_far(x):
        return jnp.any(jnp.abs(x * x - a * a - 1) > 1e-9)

    return lax.while_loop(is_far, lambda x: (x + (a * a + 1) / x) / 2, 1 + jnp.abs(a))


def root_if_any(a):
    """A loop that has no end unless something keeps it from being run."""

    def root(n):
        return lax.while_loop(
            lambda x: jnp.abs(x * x - n) > 1e-9, lambda x: (x + n / x) / 2, 1 + n
        )

    n = jnp.sum(a)
    return a * lax.cond(n > 0, root, lambda n: 1 + 0 * n, n)


def on_the_host(a):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(a.shape, a.dtype), a)


def summed(a):
    return lax.scan(lambda total, x: (total + x, jnp.sin(total)), 0.0, a.ravel())[0] + a


def by_data(a):
    return lax.cond(jnp.sum(a) > 0, jnp.sin, lambda a: a - 1, a)


@functools.partial(jax.jit, static_argnames="reverse")
def _cumulated(a, reverse):
    return lax.cumsum(a.ravel(), reverse=reverse).reshape(a.shape)


def _noisy(key, a):
    return a + jax.random.normal(key, a.shape, a.dtype)


def _noise_by_position(i, u, _):
    with jax.threefry_partitionable(i == 4):
        return jax.tree.map(functools.partial(_noisy, jax.random.key(7)), u)


def _reversed(values):
    return OrderedDict((i, values[i]) for i in sorted(values, reverse=True))


ALIKE = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "masked adamw": optax.adamw(1e-2, weight_decay=0.3, mask=is_matrix),
    "muon": optax.contrib.muon(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
    "by kind": optax.multi_transform(
        {True: optax.adam(1e-2), False: optax.sgd(1e-2, momentum=0.5)}, is_matrix
    ),
    "schedule": optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(1, 0, 9)),
    "small numbers": optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-2),
    "clipped by array": optax.clip_by_block_rms(0.5),
    "jit": of_each_array(jax.jit(lambda a: jnp.sin(a) * 2)),
    "while": of_each_array(newton),
    "guarded loop": of_each_array(root_if_any),
    "callback": of_each_array(on_the_host),
    "sums": of_each_array(lambda a: 0.1 * jnp.sum(a)),
    "scan": of_each_array(summed),
    "cond": of_each_array(by_data),
}
DIFFERENT = {
    "unless not finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2)),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "noise by keys of each block": optax.GradientTransformation(
        lambda params: {
            i: jax.random.fold_in(jax.random.key(3, impl="rbg"), i) for i in params
        },
        lambda u, keys, params: (
            {i: jax.tree.map(functools.partial(_noisy, keys[i]), u[i]) for i in u},
            {i: jax.random.split(key)[0] for i, key in keys.items()},
        ),
    ),
    "noise of another kind for one block": each_block(_noise_by_position),
    "a type of one block's own": each_block(
        lambda i, u, _: optax.tree.cast(u, jnp.float32) if i == 4 else u
    ),
    "a block whose updates are numbers": each_block(
        lambda i, u, _: jax.tree.map(lambda _: 0.0, u) if i == 4 else u
    ),
    "state in an order of its own": optax.GradientTransformation(
        lambda params: _reversed(optax.tree.zeros_like(params)),
        lambda u, state, params: (
            optax.tree.add(u, dict(state)),
            _reversed(optax.tree.add(u, dict(state))),
        ),
    ),
    "layer-wise rates": scaled(lambda i: 0.9**i),
    "one block apart": scaled(lambda i: 0.5 if i == 5 else 0.25),
    "signs of zero": each_block(
        lambda i, u, _: jax.tree.map(
            lambda a: jnp.copysign(a, -0.0 if i % 2 else 0.0), u
        )
    ),
    "one block frozen": optax.multi_transform(
        {"on": optax.adam(1e-2), "off": optax.set_to_zero()},
        lambda params: {i: "off" if i == 5 else "on" for i in params},
    ),
    "a decay of one block": optax.add_decayed_weights(0.1, mask=lambda p: _only(4, p)),
    "one block backwards": each_block(
        lambda i, u, _: jax.tree.map(functools.partial(_cumulated, reverse=i == 4), u)
    ),
    "one block in small numbers": optax.GradientTransformation(
        lambda params: {i: _small_zeros(i, block) for i, block in params.items()},
        lambda u, state, params: (
            optax.tree.add(u, optax.tree.cast_like(state, u)),
            optax.tree.cast_like(u, state),
        ),
    ),
    "gradients of other blocks": each_block(lambda i, _, u: u[_mirrored(i)]),
    "gradients of one block": each_block(lambda i, _, u: u[_run_of(i).start]),
    "the sum of a run": each_block(
        lambda i, _, u: jax.tree.map(lambda *a: sum(a), *[u[j] for j in _run_of(i)])
    ),
}


def _small_zeros(position, block):
    return optax.tree.zeros_like(block, jnp.bfloat16 if position == 4 else jnp.float64)


def _only(position, params):
    nowhere = jax.tree.map(lambda _: False, params)
    return nowhere | {position: jax.tree.map(lambda _: True, params[position])}


def _run_of(position):
    return next(run for run in RUNS if position in run)


def _mirrored(position):
    run = _run_of(position)
    return run.start + run[-1] - position


@pytest.fixture(autouse=True, scope="module")
def quickly(compiled_quickly):
    """Many small programs."""


@pytest.mark.parametrize("name", [*ALIKE, *DIFFERENT])
def test_updates_are_those_of_single_blocks(name):
    assert_same((ALIKE | DIFFERENT)[name])


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_alike_is_computed_once_for_a_run(name):
    few, many = (
        _num_equations(ALIKE[name], [range(1), range(1, stop), range(stop, stop + 1)])
        for stop in (5, 25)
    )
    assert few == many


def test_what_mixes_blocks_takes_a_few_numbers_of_each():
    few, many = (
        _num_equations(DIFFERENT["clipped"], [range(stop)]) for stop in (5, 25)
    )
    arrays = len(jax.tree.leaves(make_params(runs=[range(1)])))
    assert many - few <= 3 * arrays * 20  # slice, squeeze and add


def _num_equations(transform, runs):
    init, step = reroll(*init_and_step(transform), runs)
    params = join(make_params(runs=runs), runs)
    state = jax.eval_shape(init, params)
    return len(jax.make_jaxpr(step)(params, state, params).eqns)


def test_the_state_holds_runs_joined_and_what_is_not_alike_as_it_is():
    params = join(make_params())
    init, _ = reroll(*init_and_step(ALIKE["sgd"]), RUNS)
    chex.assert_trees_all_equal_shapes(init(params)[0].trace, params)
    init, _ = reroll(*init_and_step(DIFFERENT["one block frozen"]), RUNS)
    mu = init(params).inner_states["on"].inner_state[0].mu
    assert list(mu) == [2, 3, 4, 5, 6]


def test_without_runs_an_optimizer_stays_what_it_is():
    init, step = init_and_step(optax.adam(1e-3))
    assert reroll(init, step, [range(i, i + 1) for i in range(3)]) == (init, step)


def test_what_an_optimizer_prints_it_prints_of_each_block(capfd):
    def update(updates, state, params):
        jax.tree.map(lambda a: jax.debug.print("sum {}", jnp.sum(a)), updates)
        return updates, dict.fromkeys(params, 0)

    init, step = init_and_step(
        optax.GradientTransformation(lambda params: dict.fromkeys(params, 0), update)
    )
    params = {i: jnp.full(2, float(i)) for i in range(4)}
    runs = [range(3), range(3, 4)]
    joined = train(*reroll(init, step, runs), join(params, runs), num_updates=1)
    jax.effects_barrier()
    expected = train(init, step, params, num_updates=1)
    jax.effects_barrier()
    chex.assert_trees_all_close(joined, join(expected, runs))
    lines = capfd.readouterr().out.split("\n")[:-1]
    assert len(lines) == 8 and sorted(lines[:4]) == sorted(lines[4:])


def test_a_run_may_take_what_is_of_a_longer_one():
    transform = each_block(lambda i, _, u: u[i - 4] if i > 4 else u[i])
    assert_same(transform, [range(1, 5), range(5, 7)])


_unary = st.sampled_from([jnp.sin, jnp.negative, lambda a: a * 0.5, lambda a: a + 0.0])
_positions = st.one_of(
    st.just(frozenset(POSITIONS)),
    *[st.just(frozenset(run)) for run in RUNS if len(run) > 1],
    st.frozensets(st.sampled_from(POSITIONS), min_size=1),
)
_step = st.one_of(
    st.tuples(st.just("call"), _positions, _unary),
    st.tuples(st.just("add that of"), _positions, st.sampled_from(POSITIONS)),
    st.tuples(st.just("add that of the next"), _positions, st.none()),
    st.tuples(st.just("divide by the sum"), _positions, st.none()),
    st.tuples(st.just("keep the first"), _positions, st.none()),
)


def _run_program(steps, updates):
    """Does what ``steps`` say to scalars of blocks, in an order that they choose."""
    at_first = dict(updates)
    for name, positions, what in steps:
        old = dict(updates)
        for i in positions:
            if name == "call":
                updates[i] = what(old[i])
            elif name == "add that of":
                updates[i] = old[i] + old[what]
            elif name == "add that of the next":
                updates[i] = old[i] + old.get(i + 1, 1.0)
            elif name == "divide by the sum":
                updates[i] = old[i] / (1 + sum(a * a for a in old.values()))
            else:
                updates[i] = at_first[i]
    return updates


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(_step, max_size=8))
def test_any_program_of_blocks_is_computed_as_it_is_written(steps):
    def init(params):
        return ()

    def step(gradients, state, params):
        return _run_program(steps, dict(gradients)), state

    values = np.random.default_rng(0).normal(size=len(POSITIONS))
    params = {i: jnp.asarray(v) for i, v in zip(POSITIONS, values, strict=True)}
    expected, _ = jax.jit(step)(params, (), params)
    _, joined_step = reroll(init, step, RUNS)
    joined, _ = jax.jit(joined_step)(join(params), (), join(params))
    chex.assert_trees_all_close(joined, join(expected), rtol=1e-12)
