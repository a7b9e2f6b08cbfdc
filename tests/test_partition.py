import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import blocks as fdg_blocks
from fdg_jax import partition

# Published: N, then the cuts for K = 2, 3, 4, 5 of [stem, block 1 ... N, head].
PUBLISHED = {
    "resnet20": (9, [(5,), (4, 7)]),
    "resnet56": (27, [(14,), (10, 19), (7, 14, 21)]),
    "resnet110": (54, [(28,), (19, 37), (14, 28, 42), (11, 22, 33, 44)]),
    "resnet1202": (600, [(251,), (201, 401), (76, 251, 426), (61, 221, 281, 441)]),
    "resnet18": (8, [(5,), (3, 6)]),
    "resnet50": (16, [(8,), (6, 11), (5, 9, 13)]),
    "resnet101": (33, [(17,), (12, 23), (9, 17, 25), (7, 14, 21, 28)]),
    "wrn28_10": (12, [(7,), (5, 9), (4, 7, 10)]),
}
ROWS = [
    (name, n + 2, num_stages, cuts)
    for name, (n, row) in PUBLISHED.items()
    for num_stages, cuts in enumerate(row, start=2)
]


def _resolve(cuts, num_stages=3, num_blocks=11, network_name=None):
    return partition.resolve_cuts(
        cuts,
        num_stages=num_stages,
        num_blocks=num_blocks,
        network_name=network_name,
    )


def _slowest(costs, cuts):
    """Cost of the costliest stage; an empty stage is an error."""
    edges = (0, *cuts, len(costs))
    assert all(a < b for a, b in itertools.pairwise(edges))
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))


@st.composite
def costs_and_stages(draw):
    costs = draw(st.lists(st.integers(0, 20), min_size=1, max_size=8))
    return costs, draw(st.integers(1, min(5, len(costs))))


@given(costs_and_stages())
@settings(max_examples=200, deadline=None)
def test_balanced_cuts_are_as_good_as_the_best_of_all_cuts(case):
    costs, num_stages = case
    cuts = partition.balanced_cuts(costs, num_stages)
    assert len(cuts) == num_stages - 1
    every = itertools.combinations(range(1, len(costs)), num_stages - 1)
    assert _slowest(costs, cuts) == min(_slowest(costs, other) for other in every)


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=30), st.integers(1, 3))
@settings(deadline=None)
def test_balanced_cuts_of_measured_seconds_are_valid_positions(costs, num_stages):
    cuts = partition.balanced_cuts(costs, num_stages)
    assert all(type(c) is int for c in cuts)
    assert _resolve(cuts, num_stages, len(costs)) == cuts


def test_balanced_cuts_of_equal_blocks_make_equal_stages():
    assert partition.balanced_cuts([1.0] * 12, 4) == (3, 6, 9)


def test_balanced_cuts_with_a_stage_per_block_cut_everywhere():
    assert partition.balanced_cuts([9, 0, 0, 5], 4) == (1, 2, 3)


@pytest.mark.parametrize("name,num_blocks,num_stages,cuts", ROWS)
def test_paper_means_the_published_cuts(name, num_blocks, num_stages, cuts):
    assert _resolve("paper", num_stages, num_blocks, name) == cuts


def test_nothing_else_is_called_published():
    published = {
        (name, k): cuts
        for name, by_stages in partition.PAPER_CUTS.items()
        for k, cuts in by_stages.items()
    }
    assert published == {(name, k): cuts for name, _, k, cuts in ROWS}


@pytest.mark.parametrize(
    "written",
    ["4,7", " 4, 7 ", "(4, 7)", (4, 7), [4, 7], np.array([4, 7])],
    ids=repr,
)
def test_text_and_sequences_mean_the_same_positions(written):
    assert _resolve(written) == (4, 7)


def test_one_cut_may_be_written_as_text_or_tuple():
    assert _resolve("4", 2) == _resolve("(4,)", 2) == _resolve((4,), 2) == (4,)


def test_balanced_waits_for_measurements():
    assert _resolve("balanced") is None


@pytest.mark.parametrize("cuts", ["paper", "", ()])
def test_a_single_stage_has_no_cuts(cuts):
    assert _resolve(cuts, num_stages=1) == ()


@pytest.mark.parametrize("word,nearest", [("papper", "paper"), ("balance", "balanced")])
def test_an_unknown_word_is_answered_with_the_nearest(word, nearest):
    with pytest.raises(ValueError, match=f"got '{word}'; did you mean '{nearest}'"):
        _resolve(word)


def test_a_word_like_no_other_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match="'paper', 'balanced' or positions") as refused:
        _resolve("middle")
    assert "did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    "cuts,rule",
    [
        ((7, 4), "cuts must increase"),
        ((4, 4), "cuts must increase"),
        ((0, 4), "inside the network"),
        ((-3, 4), "inside the network"),
        ((4, 11), "inside the network"),
        ((4,), "K stages need K - 1 cuts, here 2"),
        ((2, 4, 7), "K stages need K - 1 cuts, here 2"),
        ((4.0, 7), "must be integers"),
        ((True, 7), "must be integers"),
    ],
)
def test_invalid_positions_are_refused_with_rule_value_and_way_out(cuts, rule):
    with pytest.raises(ValueError) as refused:
        _resolve(cuts)
    message = str(refused.value)
    assert rule in message
    assert f"cuts={cuts}" in message
    assert "num_stages=3" in message
    assert "1 to 10" in message
    assert "\n" not in message


@pytest.mark.parametrize("cuts", ["balanced", "paper", (1, 2)])
def test_more_stages_than_blocks_are_refused(cuts):
    with pytest.raises(ValueError, match="num_stages=3.* 2 blocks; use at most 2"):
        _resolve(cuts, num_stages=3, num_blocks=2)


@pytest.mark.parametrize("num_stages", [0, -1])
def test_less_than_one_stage_is_refused(num_stages):
    with pytest.raises(ValueError, match=f"at least 1; got {num_stages}"):
        _resolve("balanced", num_stages=num_stages)


@pytest.mark.parametrize("name,num_stages", [("resnet20", 4), ("mine", 2), (None, 2)])
def test_paper_without_published_cuts_is_refused_with_those_that_are(name, num_stages):
    with pytest.raises(ValueError) as refused:
        _resolve("paper", num_stages, network_name=name)
    message = str(refused.value)
    assert f"{name!r} with num_stages={num_stages}" in message
    assert "resnet56: K=[2, 3, 4]" in message


def _measure(network, x, repeats=5):
    blocks, params, batch_stats = fdg_blocks.split_network(network)
    shapes = fdg_blocks.trace_shapes(blocks, params, batch_stats, x)
    device = jax.devices()[1]
    return partition.measure_costs(
        blocks, params, batch_stats, shapes, device, repeats=repeats
    )


def _linear(width_in, width_out, seed=0):
    return nnx.Linear(width_in, width_out, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))


def test_measured_costs_are_positive_and_shared_by_alike_blocks():
    network = [
        _linear(8, 8),
        _linear(8, 8, seed=1),
        nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        _linear(8, 8, seed=2),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
    ]
    costs = _measure(network, jnp.ones((4, 8), jnp.float32))
    assert len(costs) == len(network)
    assert all(cost > 0 for cost in costs)
    # The same float, not only the same value to the clock's grain: measured once. The
    # first block differs, since nobody asks for the gradient of its input.
    assert costs[1] is costs[3]
    assert costs[0] is not costs[1]


def test_a_much_larger_block_costs_more():
    network = [_linear(4, 4), _linear(4, 4), _linear(4, 768), _linear(768, 768)]
    _, small, _, large = _measure(network, jnp.ones((256, 4), jnp.float32))
    assert large > 2 * small


def test_measuring_leaves_the_network_as_it_is():
    network = [_linear(4, 4), nnx.BatchNorm(4, rngs=nnx.Rngs(0))]
    before = jax.device_get(jax.tree.leaves(nnx.state(network)))
    _measure(network, jnp.ones((4, 4), jnp.float32), repeats=1)
    after = jax.device_get(jax.tree.leaves(nnx.state(network)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
