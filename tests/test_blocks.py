import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fdg_jax import blocks as fdg_blocks
from fdg_jax import words
from fdg_jax.models import Network

pytestmark = pytest.mark.usefixtures("compiled_quickly")

DTYPES = {"dtype": jnp.float64, "param_dtype": jnp.float64}
WIDTH = 6


class Residual(nnx.Module):
    """Linear, BatchNorm, dropout: parameters, statistics and random state."""

    def __init__(self, seed, rate=0.5, scale=1.0):
        rngs = nnx.Rngs(params=seed, dropout=seed)
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **DTYPES)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs, **DTYPES)
        # Flax starts the statistics in float32, whatever the other types are.
        self.norm.mean = nnx.BatchStat(jnp.full(WIDTH, 0.1 * seed))
        self.norm.var = nnx.BatchStat(jnp.full(WIDTH, 1.0 + seed))
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        return x + self.scale * self.dropout(self.norm(self.linear(x)))


class Noise(nnx.Module):
    """Draws twice from one stream and once from another, and returns the draws."""

    def __init__(self, seed=0):
        self.rngs = nnx.Rngs(noise=seed, other=seed)

    def __call__(self, x):
        streams = self.rngs.noise, self.rngs.noise, self.rngs.other
        return jnp.stack([jax.random.normal(draw(), x.shape) for draw in streams])


def _linear(width_in, width_out, seed=0):
    return nnx.Linear(width_in, width_out, rngs=nnx.Rngs(seed), **DTYPES)


def _images(batch_size=4, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch_size, WIDTH)))


def _split_one(module):
    """The block of a network of one, with its values."""
    (block,), (params,), (batch_stats,) = fdg_blocks.split_network([module])
    return block, params, batch_stats


def _host_copy(module):
    """All values of a module but its random state, as independent host arrays."""
    _, _, values = nnx.split(module, nnx.RngState, ...)
    return jax.tree.map(np.array, nnx.to_pure_dict(values))


def _runs_of(network, x, **positions):
    blocks, params, batch_stats = fdg_blocks.split_network(network)
    shapes = fdg_blocks.trace_shapes(blocks, params, batch_stats, x)
    positions = {"first": 0, "stop": len(network)} | positions
    return fdg_blocks.group_runs(blocks, params, batch_stats, shapes, **positions)


def _positions(runs):
    return [(run.block.index, run.length) for run in runs]


def test_values_come_back_from_a_split_and_a_join():
    network = [Residual(1), _linear(WIDTH, 3), Residual(2)]
    _, params, batch_stats = fdg_blocks.split_network(network)
    device = jax.devices()[1]
    joined = fdg_blocks.join_network(network, params, batch_stats, device, "mine")
    assert isinstance(joined, Network)
    assert joined.name == "mine"
    for old, new in zip(network, joined, strict=True):
        assert type(new) is type(old)
        chex.assert_trees_all_equal(_host_copy(new), _host_copy(old))
    assert all(a.devices() == {device} for a in jax.tree.leaves(nnx.state(joined)))


def test_a_joined_network_holds_the_values_given_and_leaves_the_old_one():
    network = [Residual(1), Residual(2)]
    before = [_host_copy(module) for module in network]
    _, params, batch_stats = fdg_blocks.split_network(network)
    params, batch_stats = jax.tree.map(lambda a: a + 1, (params, batch_stats))
    joined = fdg_blocks.join_network(
        network, params, batch_stats, jax.devices()[0], "mine"
    )
    joined.eval()
    joined(_images())
    for k, module in enumerate(joined):
        expected = jax.tree.map(lambda a: a + 1, before[k])
        chex.assert_trees_all_equal(_host_copy(module), expected)
        chex.assert_trees_all_equal(_host_copy(network[k]), before[k])
        assert not network[k].dropout.deterministic


def test_a_block_computes_what_its_module_computes():
    module, x = Residual(1, rate=0.0), _images()
    block, params, batch_stats = _split_one(module)
    y, new_stats = block.apply(params, batch_stats, x, train=True)
    chex.assert_trees_all_close(y, module(x), rtol=1e-14)
    expected = _host_copy(module)["norm"]
    chex.assert_trees_all_close(new_stats["norm"]["mean"], expected["mean"], rtol=1e-14)
    chex.assert_trees_all_close(new_stats["norm"]["var"], expected["var"], rtol=1e-14)


def test_applying_a_block_leaves_its_module_as_it_is():
    module = Residual(1)
    before = _host_copy(module)
    block, params, batch_stats = _split_one(module)
    jax.jit(block.apply, static_argnames="train")(
        params, batch_stats, _images(), jax.random.key(0), train=True
    )
    block.apply(params, batch_stats, _images(), train=False)
    chex.assert_trees_all_equal(_host_copy(module), before)
    assert not module.dropout.deterministic


def test_statistics_move_in_training_and_rest_in_evaluation():
    block, params, batch_stats = _split_one(Residual(1))
    x = _images()
    _, trained = block.apply(params, batch_stats, x, train=True)
    _, evaluated = block.apply(params, batch_stats, x, train=False)
    chex.assert_trees_all_equal(evaluated, batch_stats)
    chex.assert_trees_all_equal_structs(trained, batch_stats)
    hidden = x @ params["linear"]["kernel"]
    # Momentum 0.9 keeps 0.9 of the old mean; the bias of Linear starts at 0.
    expected = 0.9 * batch_stats["norm"]["mean"] + 0.1 * hidden.mean(0)
    np.testing.assert_allclose(trained["norm"]["mean"], expected, rtol=1e-12)


def test_dropout_follows_its_key_in_training():
    block, params, batch_stats = _split_one(Residual(1))

    def call(seed):
        key = jax.random.key(seed)
        return block.apply(params, batch_stats, _images(), key, train=True)[0]

    np.testing.assert_array_equal(call(0), call(0))
    assert np.any(call(0) != call(1))


def test_dropout_is_off_in_evaluation():
    x = _images()
    outputs = []
    for rate, key in [(0.5, 0), (0.5, 1), (0.0, 0)]:
        block, params, batch_stats = _split_one(Residual(1, rate=rate))
        outputs.append(
            block.apply(params, batch_stats, x, jax.random.key(key), train=False)[0]
        )
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_randomness_comes_from_the_key_and_not_from_the_module():
    x, key = _images(), jax.random.key(3)
    draws = []
    for seed in (0, 1):
        block, params, batch_stats = _split_one(Noise(seed))
        draws.append(block.apply(params, batch_stats, x, key, train=True)[0])
    np.testing.assert_array_equal(draws[0], draws[1])


def test_several_streams_draw_apart_and_move_on_within_a_call():
    block, params, batch_stats = _split_one(Noise())
    assert jax.tree.leaves((params, batch_stats)) == []
    key = jax.random.key(0)
    draws, _ = block.apply(params, batch_stats, _images(), key, train=True)
    first, second, other = draws
    assert np.all(first != second)
    assert np.all(first != other)
    assert np.all(second != other)


def test_random_state_of_vmapped_modules_keeps_its_axis():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    class Branches(nnx.Module):
        def __init__(self):
            self.dropouts = create(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.vmap(lambda dropout, x: dropout(x), in_axes=(0, None))(
                self.dropouts, x
            )

    block, params, batch_stats = _split_one(Branches())
    x = jnp.ones((50, 4))
    branches, _ = block.apply(params, batch_stats, x, jax.random.key(1), train=True)
    assert branches.shape == (3, 50, 4)
    assert np.any(branches[0] != branches[1])
    assert np.any(branches[1] != branches[2])


def _stacked_and_not(length, first_index=2, rate=0.5):
    """A run of identical blocks as one stack, and the same blocks one by one."""
    network = [Residual(seed, rate) for seed in range(first_index + length)]
    blocks, params, batch_stats = fdg_blocks.split_network(network)
    chosen = slice(first_index, None)
    run = fdg_blocks.Run(blocks[first_index], length)
    singles = [fdg_blocks.Run(block, 1) for block in blocks[chosen]]
    return run, singles, params[chosen], batch_stats[chosen]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_stack_equals_its_blocks_one_after_another(rate, train):
    length, x, key = 4, _images(), jax.random.key(5)
    run, singles, params, batch_stats = _stacked_and_not(length, rate=rate)
    y, stats = run.apply(run.join(params), run.join(batch_stats), x, key, train=train)

    expected_y, expected_stats = x, []
    for single, p, s in zip(singles, params, batch_stats, strict=True):
        expected_y, s = single.apply(p, s, expected_y, key, train=train)
        expected_stats.append(s)
    # Were the dropout masks of one block others, the outputs would differ throughout.
    np.testing.assert_allclose(y, expected_y, rtol=1e-12)
    chex.assert_trees_all_close(run.split(stats), expected_stats, rtol=1e-12)


def test_a_stack_has_the_gradients_of_its_blocks():
    length, x, key = 3, _images(), jax.random.key(5)
    run, singles, params, batch_stats = _stacked_and_not(length)

    def stacked(params, x):
        y, _ = run.apply(params, run.join(batch_stats), x, key, train=True)
        return jnp.sum(jnp.sin(y))

    def one_by_one(params, x):
        for single, p, s in zip(singles, params, batch_stats, strict=True):
            x, _ = single.apply(p, s, x, key, train=True)
        return jnp.sum(jnp.sin(x))

    gradients = jax.grad(stacked, argnums=(0, 1))(run.join(params), x)
    expected, expected_x = jax.grad(one_by_one, argnums=(0, 1))(params, x)
    chex.assert_trees_all_close(
        run.split(gradients[0]), expected, rtol=1e-10, atol=1e-14
    )
    chex.assert_trees_all_close(gradients[1], expected_x, rtol=1e-10)


def test_every_block_of_a_network_draws_its_own_randomness():
    _, singles, params, batch_stats = _stacked_and_not(2)
    outputs = [
        # The same values and the same input: only the position differs.
        single.apply(
            params[0], batch_stats[0], _images(), jax.random.key(0), train=True
        )[0]
        for single in singles
    ]
    assert np.any(outputs[0] != outputs[1])


@pytest.mark.parametrize("length", [1, 3])
def test_stacked_values_come_apart_again(length):
    run, _, params, _ = _stacked_and_not(length)
    chex.assert_trees_all_equal(run.split(run.join(params)), params)


def test_identical_blocks_are_stacked_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(fdg_blocks, "SCAN_MIN_LENGTH", 3)
    network = [
        _linear(WIDTH, WIDTH),
        *[Residual(seed) for seed in range(4)],
        _linear(WIDTH, WIDTH),
        *[Residual(seed) for seed in range(2)],
        *[_linear(WIDTH, WIDTH, seed) for seed in range(3)],
    ]
    runs = _runs_of(network, _images())
    assert _positions(runs) == [(0, 1), (1, 4), (5, 1), (6, 1), (7, 1), (8, 3)]


def test_few_identical_blocks_are_not_stacked():
    network = [Residual(seed) for seed in range(4)]
    assert len(network) < fdg_blocks.SCAN_MIN_LENGTH
    assert _positions(_runs_of(network, _images())) == [(k, 1) for k in range(4)]


def test_runs_stay_inside_the_positions_given(monkeypatch):
    monkeypatch.setattr(fdg_blocks, "SCAN_MIN_LENGTH", 2)
    network = [Residual(seed) for seed in range(6)]
    runs = _runs_of(network, _images(), first=2, stop=5)
    assert _positions(runs) == [(2, 3)]


def test_blocks_that_differ_are_not_stacked(monkeypatch):
    monkeypatch.setattr(fdg_blocks, "SCAN_MIN_LENGTH", 2)
    network = [
        Residual(0, rate=0.5),
        Residual(0, rate=0.25),
        Residual(0, rate=0.25, scale=0.5),
        _linear(WIDTH, 3),
        _linear(3, 3),
    ]
    assert _positions(_runs_of(network, _images())) == [(k, 1) for k in range(5)]


def test_parameters_of_another_type_are_not_stacked(monkeypatch):
    class Shift(nnx.Module):
        def __init__(self, dtype):
            self.shift = nnx.Param(jnp.ones((1, WIDTH), dtype))

        def __call__(self, x):
            return x + self.shift[...].astype(x.dtype)

    monkeypatch.setattr(fdg_blocks, "SCAN_MIN_LENGTH", 2)
    network = [Shift(dtype) for dtype in (jnp.float32, jnp.float64, jnp.float64)]
    assert _positions(_runs_of(network, _images())) == [(0, 1), (1, 2)]


def test_a_module_used_twice_is_refused_naming_both_places():
    module = Residual(0)
    with pytest.raises(ValueError) as refused:
        fdg_blocks.split_network([module, _linear(WIDTH, WIDTH), module])
    message = str(refused.value)
    assert "block 0 (Residual)" in message
    assert "block 2 (Residual)" in message
    assert "must not share variables" in message


def test_a_variable_shared_by_two_blocks_is_refused_with_its_name():
    first, second = _linear(WIDTH, WIDTH), Residual(0)
    second.linear.kernel = first.kernel
    with pytest.raises(ValueError, match=r"block 0 \(Linear\).*block 1 \(Residual\)"):
        fdg_blocks.split_network([first, second])
    with pytest.raises(ValueError, match="share linear/kernel"):
        fdg_blocks.split_network([first, second])


def test_a_variable_shared_within_a_block_stays_shared():
    module = Residual(0)
    module.again = _linear(WIDTH, WIDTH)
    module.again.kernel = module.linear.kernel
    block, params, batch_stats = _split_one(module)
    assert "kernel" not in params["again"] or "kernel" not in params["linear"]
    (joined,) = fdg_blocks.join_network(
        [module], [params], [batch_stats], jax.devices()[0], "tied"
    )
    assert joined.again.kernel is joined.linear.kernel
    assert joined.again.kernel is not module.linear.kernel


def test_blocks_may_share_a_source_of_randomness():
    rngs = nnx.Rngs(0)
    network = [Noise(), Noise()]
    network[0].rngs = network[1].rngs = rngs
    assert len(fdg_blocks.split_network(network)[0]) == 2


@pytest.mark.parametrize(
    "element",
    [jnp.tanh, linen.Dense(3), "relu"],
    ids=["function", "linen", "text"],
)
def test_what_is_no_module_is_refused_with_the_way_out(element):
    with pytest.raises(ValueError) as refused:
        fdg_blocks.split_network([_linear(WIDTH, WIDTH), element])
    message = str(refused.value)
    assert f"block 1 ({type(element).__name__})" in message
    assert "sequence of nnx.Modules" in message
    assert "nnx.bridge.ToNNX" in message


def test_shapes_are_those_of_the_values():
    network = [_linear(WIDTH, 3), _linear(3, 5), Noise()]
    split = fdg_blocks.split_network(network)
    x, computed = _images(), [_images()]
    for block, params, batch_stats in zip(*split, strict=True):
        computed.append(block.apply(params, batch_stats, computed[-1], train=True)[0])
    shapes = fdg_blocks.trace_shapes(*split, x)
    assert [(a.shape, a.dtype) for a in shapes] == [
        (a.shape, a.dtype) for a in computed
    ]


def test_shapes_of_a_network_too_large_to_allocate_are_traced():
    width = 2**20
    # Abstract weights of 8 TiB each.
    module = nnx.eval_shape(lambda: _linear(width, width))
    image = jax.ShapeDtypeStruct((width, width), jnp.float64)
    shapes = fdg_blocks.trace_shapes(*fdg_blocks.split_network([module]), image)
    assert [a.shape for a in shapes] == [(width, width)] * 2
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in shapes)


def test_identical_blocks_are_traced_once():
    traces = []

    class Counted(nnx.Module):
        def __init__(self, seed):
            self.linear = _linear(WIDTH, WIDTH, seed)

        def __call__(self, x):
            traces.append(x.shape)
            return self.linear(x)

    split = fdg_blocks.split_network([Counted(seed) for seed in range(20)])
    shapes = fdg_blocks.trace_shapes(*split, _images())
    assert len(shapes) == 21
    assert len(traces) == 1


def test_a_block_that_does_not_fit_is_named_with_the_one_before_and_the_shape():
    split = fdg_blocks.split_network([_linear(WIDTH, 4), Residual(0)])
    with pytest.raises(ValueError) as refused:
        fdg_blocks.trace_shapes(*split, _images(batch_size=8))
    message = str(refused.value)
    assert "block 1 (Residual)" in message
    assert "block 0 (Linear)" in message
    assert "float64[8,4]" in message
    assert "\n" not in message
    assert refused.value.__cause__ is not None


def test_a_first_block_that_does_not_fit_is_named_with_the_images():
    split = fdg_blocks.split_network([_linear(WIDTH + 1, 4)])
    with pytest.raises(ValueError, match=r"block 0 \(Linear\).*the images.*\[4,6\]"):
        fdg_blocks.trace_shapes(*split, _images())


def test_the_first_line_of_a_blocks_own_error_is_passed_on():
    class Picky(nnx.Module):
        def __call__(self, x):
            raise RuntimeError("only on Sundays\nand never in the rain")

    split = fdg_blocks.split_network([Picky()])
    with pytest.raises(ValueError, match="it failed: only on Sundays$"):
        fdg_blocks.trace_shapes(*split, _images())


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_sowed_intermediates_do_not_enter_the_state():
    class Sowing(nnx.Module):
        def __init__(self):
            self.residual = Residual(0)

        def __call__(self, x):
            y = self.residual(x)
            self.sow(nnx.Intermediate, "hidden", y)
            return y

    module = Sowing()
    module(_images())  # leaves an Intermediate behind in the module
    block, params, batch_stats = _split_one(module)
    _, new_stats = block.apply(params, batch_stats, _images(), train=True)
    chex.assert_trees_all_equal_structs(new_stats, batch_stats)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_stats, batch_stats)
    device = jax.devices()[0]
    joined = fdg_blocks.join_network([module], [params], [new_stats], device, "sow")
    assert joined(_images()).shape == _images().shape
    chex.assert_trees_all_equal(
        _host_copy(joined[0])["residual"]["linear"], params["residual"]["linear"]
    )


def test_a_static_attribute_need_not_be_hashable():
    class Configured(nnx.Module):
        def __init__(self):
            self.options = {"scale": 2.0}

        def __call__(self, x):
            return self.options["scale"] * x

    blocks, params, batch_stats = fdg_blocks.split_network([Configured()])
    shapes = fdg_blocks.trace_shapes(blocks, params, batch_stats, _images())
    assert shapes[1].shape == shapes[0].shape


def test_a_linen_module_works_as_a_block():
    x = _images()
    module = nnx.bridge.ToNNX(linen.Dense(5, **DTYPES), rngs=nnx.Rngs(0)).lazy_init(x)
    block, params, batch_stats = _split_one(module)
    assert params["kernel"].shape == (WIDTH, 5)
    y, new_stats = block.apply(params, batch_stats, x, train=True)
    np.testing.assert_allclose(y, module(x), rtol=1e-14)
    assert new_stats == batch_stats == {}


def test_a_linen_module_draws_from_the_key_given():
    class Dropped(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dropout(0.5, deterministic=False)(x)

    x = _images()
    module = nnx.bridge.ToNNX(Dropped(), rngs=nnx.Rngs(0, dropout=1)).lazy_init(x)
    block, params, batch_stats = _split_one(module)
    a, b, c = (
        block.apply(params, batch_stats, x, jax.random.key(k), train=True)[0]
        for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)


def test_a_block_may_take_and_give_several_arrays():
    class Fork(nnx.Module):
        def __call__(self, x):
            return {"left": x, "right": x[:, :2]}

    class Join(nnx.Module):
        def __call__(self, x):
            return x["left"][:, :2] * x["right"]

    split = fdg_blocks.split_network([Fork(), Join()])
    shapes = fdg_blocks.trace_shapes(*split, _images())
    assert jax.tree.map(lambda a: a.shape, shapes[1]) == {
        "left": (4, WIDTH),
        "right": (4, 2),
    }
    assert words.describe(shapes[1]) == "float64[4,6], float64[4,2]"
    assert shapes[2].shape == (4, 2)


def test_elements_of_all_arrays_are_counted():
    _, params, _ = _split_one(_linear(3, 5))
    assert fdg_blocks.count_elements(params) == 3 * 5 + 5
    assert fdg_blocks.count_elements({}) == 0


def test_blocks_are_described_with_counts():
    names = ["Stem", "BasicBlock", "BasicBlock", "Head"]
    assert fdg_blocks.describe_blocks(names) == "Stem, 2 x BasicBlock, Head"


# --- what a forward cannot hand back ------------------------------------------------


class Sowing(nnx.Module):
    """Sows a loss of its own, as mixtures of experts do."""

    def __init__(self):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.linear(x)
        self.sow(nnx.Intermediate, "balance", y.mean())
        return y


class Growing(nnx.Module):
    """Makes a variable when it is called."""

    def __call__(self, x):
        self.seen = nnx.Variable(x.mean())
        return x


class Changing(nnx.Module):
    """Changes a parameter when it is called."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        self.scale[...] = self.scale[...] * 0.9
        return x * self.scale[...]


def _trace(block):
    blocks, params, batch_stats = fdg_blocks.split_network([block])
    x = jax.ShapeDtypeStruct((2, WIDTH), jnp.float32)
    return fdg_blocks.trace_shapes(blocks, params, batch_stats, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_block_sows_is_warned_of():
    message = r"block 0 \(Sowing\) sows balance, which nobody reads; .*carried along"
    with pytest.warns(UserWarning, match=message):
        _trace(Sowing())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Growing(), r"calling block 0 \(Growing\) adds or removes seen"),
        (Changing(), r"calling block 0 \(Changing\) changes scale; make it another"),
    ],
)
def test_what_a_forward_would_lose_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        _trace(block)


def test_a_parameter_without_a_gradient_is_refused():
    block = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    block.count = nnx.Param(jnp.zeros((), jnp.int32))
    with pytest.raises(ValueError, match=r"count of block 0 \(Linear\) is int32\[\]"):
        fdg_blocks.split_network([block])


def test_a_block_that_is_rematerialised_changes_no_parameter():
    class Rematerialised(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.remat(lambda linear, x: jnp.tanh(linear(x)))(self.linear, x)

    assert len(_trace(Rematerialised())) == 2


class Nested(nnx.Module):
    """Variables that hold pytrees, as nnx.Variable allows."""

    def __init__(self):
        self.weights = nnx.Param({"a": jnp.ones((WIDTH, 2)), "b": {"c": jnp.ones(2)}})
        self.nothing = nnx.Param(None)
        self.seen = nnx.BatchStat({"count": jnp.zeros(())})

    def __call__(self, x):
        count = self.seen.get_value()["count"]
        self.seen.set_value({"count": count + 1})
        weights = self.weights.get_value()
        return x @ weights["a"] + weights["b"]["c"][None]


def test_variables_may_hold_pytrees():
    network = [Nested()]
    (block,), (params,), (batch_stats,) = fdg_blocks.split_network(network)
    x = jnp.ones((3, WIDTH))
    y, new = block.apply(params, batch_stats, x, train=True)
    np.testing.assert_array_equal(y, WIDTH + jnp.ones((3, 2)))
    assert new["seen"]["count"] == 1
    doubled = jax.tree.map(lambda a: 2 * a, params)
    joined = fdg_blocks.join_network(
        network, [doubled], [new], jax.devices()[0], "nested"
    )
    np.testing.assert_array_equal(joined(x), 2 * y)


def test_a_network_that_is_put_together_again_is_in_evaluation_mode():
    network = [
        nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    ]
    _, params, batch_stats = fdg_blocks.split_network(network)
    joined = fdg_blocks.join_network(
        network, params, batch_stats, jax.devices()[0], "custom"
    )
    x = jax.random.normal(jax.random.key(0), (4, WIDTH))
    np.testing.assert_array_equal(joined(x), joined(x))  # no dropout
    for i in range(4):  # image by image as all at a time
        np.testing.assert_allclose(
            joined(x[i : i + 1]), joined(x)[i : i + 1], rtol=1e-6
        )
    np.testing.assert_array_equal(joined[0].mean[...], 0.0)
    assert not network[0].use_running_average  # the user's own is left as it is
