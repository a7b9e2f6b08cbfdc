import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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


def _stages(cuts, num_blocks):
    """First block and end of every stage; an empty stage is an error."""
    stages = list(itertools.pairwise((0, *cuts, num_blocks)))
    assert all(first < stop for first, stop in stages)
    return stages


def _slowest(seconds, cuts):
    return max(seconds[i, j] for i, j in _stages(cuts, len(seconds) - 1))


def _sums(costs):
    """Cost of every stage, where it is the sum of its blocks."""
    total = np.cumsum([0, *costs])
    return np.subtract.outer(total, total).T


@st.composite
def seconds_and_stages(draw):
    """Any cost for any stage, with no rhyme or reason to them."""
    size = draw(st.integers(2, 9))
    cells = st.lists(st.integers(0, 20), min_size=size**2, max_size=size**2)
    seconds = np.array(draw(cells), float).reshape(size, size)
    return seconds, draw(st.integers(1, min(5, size - 1)))


@given(seconds_and_stages())
@settings(max_examples=200)
def test_balanced_cuts_are_as_good_as_the_best_of_all_cuts(case):
    seconds, num_stages = case
    cuts = partition.balanced_cuts(seconds, num_stages)
    assert len(cuts) == num_stages - 1
    every = itertools.combinations(range(1, len(seconds) - 1), num_stages - 1)
    assert _slowest(seconds, cuts) == min(_slowest(seconds, other) for other in every)


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=30), st.integers(1, 3))
def test_balanced_cuts_of_measured_seconds_are_valid_positions(costs, num_stages):
    cuts = partition.balanced_cuts(_sums(costs), num_stages)
    assert all(type(c) is int for c in cuts)
    assert _resolve(cuts, num_stages, len(costs)) == cuts


def test_balanced_cuts_of_equal_blocks_make_equal_stages():
    assert partition.balanced_cuts(_sums([1.0] * 12), 4) == (3, 6, 9)


def test_balanced_cuts_with_a_stage_per_block_cut_everywhere():
    assert partition.balanced_cuts(_sums([9, 0, 0, 5]), 4) == (1, 2, 3)


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
