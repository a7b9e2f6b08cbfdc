"""Names, parameter counts, and where initial parameters come from."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax import models

# Parameters for 10 and 100 classes, and the number of residual blocks.
COUNTS = {
    "resnet20": (269_722, 275_572, 9),
    "resnet56": (853_018, 858_868, 27),
    "resnet110": (1_727_962, 1_733_812, 54),
    "resnet1202": (19_421_274, 19_427_124, 600),
    "resnet18": (11_173_962, 11_220_132, 8),
    "resnet50": (23_520_842, 23_705_252, 16),
    "resnet101": (42_512_970, 42_697_380, 33),
    "wrn28_10": (36_489_290, 36_546_980, 12),
}


def _abstract(name, **kwargs):
    return nnx.eval_shape(lambda: models.create(name, **kwargs))


def _values(module):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))]


def _equal(left, right):
    pairs = zip(_values(left), _values(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_names_are_the_papers_networks():
    assert set(models.names()) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    ten, hundred, residual_blocks = COUNTS[name]
    network = _abstract(name)
    assert network.name == name
    assert len(network) == residual_blocks + 2
    assert models.count_parameters(network) == ten
    if name != "resnet1202":
        assert models.count_parameters(_abstract(name, num_classes=100)) == hundred
    # All that the classes change is the head.
    head = lambda classes: models.count_parameters(  # noqa: E731
        _abstract("resnet8", num_classes=classes)[-1]
    )
    assert head(100) - head(10) == 90 * 65


def test_the_largest_network_is_quick_to_describe_and_to_create():
    start = time.perf_counter()
    network = _abstract("resnet1202", num_classes=100)
    assert models.count_parameters(network) == COUNTS["resnet1202"][1]
    assert time.perf_counter() - start < 20
    start = time.perf_counter()
    jax.block_until_ready(nnx.state(models.create("resnet1202")))
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "name, blocks", [("resnet8", 3), ("wrn10_2", 3), ("wrn16_1", 6)]
)
def test_any_depth_of_the_families(name, blocks):
    assert len(_abstract(name)) == blocks + 2


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("resnet21", "resnet20"),
        ("resnet2", "resnet20"),
        ("resnet020", "resnet20"),
        ("wrn27_10", "wrn28_10"),
        ("wrn28", "wrn28_10"),
        ("wrn4_1", "wrn28_10"),
        ("wrn28_0", "wrn28_10"),
        ("ResNet50", "resnet50"),
    ],
)
def test_unknown_names_say_the_rules_and_the_nearest(name, nearest):
    with pytest.raises(ValueError) as error:
        models.create(name)
    message = str(error.value)
    assert message.startswith(f"Unknown network {name!r}") and "\n" not in message
    assert "6n+2" in message and "6n+4" in message and "resnet101" in message
    assert message.endswith(f"did you mean {nearest!r}?")


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"num_classes": 0}, ["num_classes", "at least 1", "got 0"]),
        ({"in_channels": -3}, ["in_channels", "at least 1", "got -3"]),
        ({"dropout_rate": 1.0}, ["dropout_rate", "[0, 1)", "got 1.0"]),
        ({"dropout_rate": -0.1}, ["dropout_rate", "got -0.1"]),
        ({"init": "he"}, ["init", "'torch'", "'he_normal'", "got 'he'"]),
        ({"dtype": "int32"}, ["dtype", "floating-point", "'int32'"]),
        ({"param_dtype": bool}, ["param_dtype", "'bool'"]),
    ],
)
def test_arguments_out_of_range(kwargs, words):
    with pytest.raises(ValueError) as error:
        models.create("resnet8", **kwargs)
    assert all(word in str(error.value) for word in words)


def test_float64_needs_x64():
    with jax.enable_x64(False), pytest.raises(ValueError, match="jax_enable_x64"):
        models.create("resnet8", dtype="float64")


def test_a_block_is_drawn_from_the_seed_and_its_position_alone():
    small, large = models.create("resnet8"), models.create("resnet14")
    # Both begin with stem, 16 -> 16; then resnet14 has one more such block.
    assert _equal(small[0], large[0]) and _equal(small[1], large[1])
    assert not _equal(large[1], large[2])
    hundred = models.create("resnet8", num_classes=100)
    assert all(_equal(a, b) for a, b in zip(small[:-1], hundred[:-1], strict=True))


@pytest.mark.parametrize(
    "name", ["resnet8", pytest.param("wrn10_1", marks=pytest.mark.slow)]
)
def test_seed_decides_the_parameters_and_dropout_does_not(name):
    network = models.create(name, seed=3)
    assert _equal(network, models.create(name, seed=3))
    assert _equal(network, models.create(name, seed=3, dropout_rate=0.3))
    other = models.create(name, seed=4)
    assert not any(_equal(a, b) for a, b in zip(network, other, strict=True))


@pytest.mark.parametrize("name", ["resnet8", "wrn10_1"])
def test_random_state_only_with_dropout(name):
    assert not jax.tree.leaves(nnx.state(_abstract(name), nnx.RngState))
    network = models.create(name, dropout_rate=0.5)
    drops = [m for _, m in nnx.iter_modules(network) if isinstance(m, nnx.Dropout)]
    assert len(drops) == 3
    keys = {tuple(jax.random.key_data(drop.rngs.key[...]).tolist()) for drop in drops}
    assert len(keys) == 3


@pytest.mark.parametrize(
    "name, positions",
    [
        ("resnet20", [(2, 3), (5, 6), (8, 9)]),
        ("resnet50", [(2, 3), (5, 6), (9, 10), (15, 16)]),
        ("wrn16_4", [(2, 2), (4, 4), (6, 6)]),
        ("wrn22_4", [(2, 3), (5, 6), (8, 9)]),
    ],
)
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_middle_blocks_of_one_width_have_equal_structure(name, positions, dropout_rate):
    first = _abstract(name, dropout_rate=dropout_rate)
    second = _abstract(name, dropout_rate=dropout_rate)
    for left, right in positions:
        graph_left, state_left = nnx.split(first[left])
        graph_right, state_right = nnx.split(second[right])
        assert graph_left == graph_right and hash(graph_left) == hash(graph_right)
        shapes = [
            jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            for state in (state_left, state_right)
        ]
        assert shapes[0] == shapes[1]


def test_blocks_of_other_widths_differ():
    network = _abstract("resnet20")
    stem, first, strided, middle = (nnx.split(network[i])[0] for i in (0, 1, 4, 5))
    assert first != strided and strided != middle and stem != first


@pytest.mark.parametrize(
    "dtype, param_dtype, statistics",
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float64", "float64", "float64"),
        ("float32", "float64", "float64"),
        ("float64", "float32", "float64"),
    ],
)
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn10_1"])
def test_types_of_everything(name, dtype, param_dtype, statistics):
    def run(x):
        network = models.create(name, dtype=dtype, param_dtype=param_dtype)
        outputs = []
        for block in network:
            outputs.append(x := block(x))
        return outputs, nnx.state(network, nnx.Param, nnx.BatchStat)

    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    (*features, logits), (params, stats) = jax.eval_shape(run, images)
    assert {leaf.dtype for leaf in features} == {jnp.dtype(dtype)}
    assert logits.dtype == jnp.promote_types(dtype, "float32")
    types = lambda tree: {leaf.dtype for leaf in jax.tree.leaves(tree)}  # noqa: E731
    assert types(params) == {jnp.dtype(param_dtype)}
    # The same before and after the forward, or a step would not be one program.
    assert types(stats) == {jnp.dtype(statistics)}
    before = _abstract(name, dtype=dtype, param_dtype=param_dtype)
    assert types(nnx.state(before, nnx.BatchStat)) == {jnp.dtype(statistics)}


def test_bfloat16_agrees_with_float32_roughly():
    call = nnx.jit(lambda network, images: network(images))
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3), jnp.float32)
    wide = call(models.create("resnet8"), images)
    narrow = call(models.create("resnet8", dtype="bfloat16"), images)
    assert narrow.dtype == jnp.float32 and not np.array_equal(wide, narrow)
    np.testing.assert_allclose(narrow, wide, atol=0.05)
