import functools
import itertools
import logging
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import fdg_jax as fdg
from fdg_jax import blocks as fdg_blocks
from fdg_jax import costs
from fdg_jax.stage import Stage

# --- the model ----------------------------------------------------------------------


@st.composite
def measured(draw):
    """Costs of a network, whole numbers so that sums are exact."""
    size = draw(st.integers(2, 9))
    numbers = st.lists(st.integers(0, 50), min_size=size, max_size=size)
    block, block_in_last, handover = (draw(numbers) for _ in range(3))
    block[-1] = block_in_last[0] = handover[0] = 0
    return costs.Costs(tuple(block), tuple(block_in_last), tuple(handover))


@given(measured())
def test_a_stage_pays_for_its_blocks_and_for_what_it_sends(case):
    num_blocks = len(case.block)
    seconds = case.seconds()
    for i, j in itertools.combinations(range(num_blocks + 1), 2):
        if j == num_blocks:
            expected = sum(case.block_in_last[i:]) + case.handover[i]
        else:
            sent = case.handover[i] + case.handover[j]
            expected = sum(case.block[i:j]) + sent
        assert seconds[i, j] == expected


def _simulated_tick(seconds, staleness, num_batches=400):
    """Plays the stage program with a device per stage; a backward takes two thirds."""
    num_stages = len(seconds)
    forward = [s / 3 for s in seconds]
    backward = [2 * s / 3 for s in seconds]
    free = [0.0] * num_stages  # when each stage has done all it was told so far
    sent = {}  # when the cotangent of a batch left a stage
    turn = [0] * num_stages
    down = {(-1, n): 0.0 for n in range(num_batches)}
    while min(turn) < num_batches:
        for k in range(num_stages):
            n = turn[k]
            m = n - staleness[k]
            if n == num_batches or (k - 1, n) not in down:
                continue
            if k < num_stages - 1:
                if (k, n) not in down:
                    free[k] = max(free[k], down[k - 1, n]) + forward[k]
                    down[k, n] = free[k]
                if m >= 0:
                    if (k + 1, m) not in sent:
                        continue
                    free[k] = max(free[k], sent[k + 1, m]) + backward[k]
                    sent[k, m] = free[k]
            else:
                free[k] = max(free[k], down[k - 1, n]) + seconds[k]
                sent[k, n] = free[k]
            turn[k] += 1
    half = num_batches // 2
    last = num_stages - 1
    return (sent[last, num_batches - 1] - sent[last, half - 1]) / half


@pytest.mark.parametrize("schedule", ["bp", "minimal", "reference", "paper"])
@pytest.mark.parametrize("seconds", [(3, 3, 3, 3), (3, 9, 6, 3), (6, 3, 3, 12)])
def test_the_tick_is_that_of_the_stage_program(schedule, seconds):
    staleness = fdg.schedule.resolve(schedule, len(seconds)).staleness
    predicted = costs.tick(seconds, staleness, devices="abcd")
    assert predicted == pytest.approx(_simulated_tick(seconds, staleness))
    assert predicted == (sum(seconds) if schedule == "bp" else max(seconds))


def test_stages_on_one_device_take_turns():
    assert costs.tick([1, 2, 4], (3, 1, 0), devices="aab") == 4
    assert costs.tick([1, 4, 2], (3, 1, 0), devices="aab") == 5
    assert costs.tick([1, 2, 4], (3, 1, 0), devices="aaa") == 7


# --- the choice of cuts ---------------------------------------------------------------


def _truth(costs_, factors):
    """What stages take when each block takes other times than alone."""
    num_blocks = len(factors)

    def seconds(cuts):
        bounds = [0, *cuts, num_blocks]
        columns = [costs_.block] * len(cuts) + [costs_.block_in_last]
        return [
            sum(column[i] * factors[i] for i in range(first, stop))
            for column, first, stop in zip(columns, bounds, bounds[1:], strict=False)
        ]

    return seconds


def _costs(block, handover=0.0):
    size = len(block)
    return costs.Costs(
        (*block[:-1], 0.0), tuple(block), (0.0, *[handover] * (size - 1))
    )


positive = st.lists(st.integers(1, 50), min_size=4, max_size=9)


@given(positive, st.integers(2, 4), st.data())
def test_corrected_costs_give_what_the_stages_took(block, num_stages, data):
    measured = _costs([float(b) for b in block], handover=3.0)
    cuts = sorted(
        data.draw(
            st.sets(
                st.integers(1, len(block) - 1),
                min_size=num_stages - 1,
                max_size=num_stages - 1,
            )
        )
    )
    took = data.draw(
        st.lists(st.integers(1, 99), min_size=num_stages, max_size=num_stages)
    )
    seconds = measured.corrected(cuts, took).seconds()
    bounds = [0, *cuts, len(block)]
    sent = [3.0 * ((i > 0) + (j < len(block))) for i, j in itertools.pairwise(bounds)]
    np.testing.assert_allclose(
        seconds[bounds[:-1], bounds[1:]], np.add(took, sent), rtol=1e-12
    )


@given(positive, st.integers(2, 3), st.data())
def test_the_best_of_the_timed_cuts_is_chosen(block, num_stages, data):
    measured = _costs([float(b) for b in block])
    factors = data.draw(
        st.lists(st.floats(0.5, 2.0), min_size=len(block), max_size=len(block))
    )
    truth, timed = _truth(measured, factors), {}

    def time_stages(cuts):
        timed[cuts] = truth(cuts)
        return timed[cuts]

    cuts, seconds = costs.choose_cuts(measured, num_stages, time_stages)
    assert 1 <= len(timed) <= costs.MOST_PROPOSALS
    assert max(timed[cuts]) == min(max(stages) for stages in timed.values())
    np.testing.assert_allclose(seconds, timed[cuts], rtol=1e-12)


def test_a_model_that_is_wrong_about_a_whole_stage_is_put_right():
    # Blocks 0 to 3 take half as long in a stage as alone, which moves the best cut.
    measured = _costs([4.0] * 8)
    truth = _truth(measured, [0.5] * 4 + [1.0] * 4)
    assert fdg.partition.balanced_cuts(measured.seconds(), 2) == (4,)
    best = min(((cut,) for cut in range(1, 8)), key=lambda cuts: max(truth(cuts)))
    assert best == (5,)
    assert costs.choose_cuts(measured, 2, truth) == (best, truth(best))


def test_a_model_that_is_right_is_asked_once():
    measured, calls = _costs([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]), []

    def time_stages(cuts):
        calls.append(cuts)
        return _truth(measured, [1.0] * 8)(cuts)

    cuts, _ = costs.choose_cuts(measured, 3, time_stages)
    assert calls == [cuts] == [fdg.partition.balanced_cuts(measured.seconds(), 3)]


def _blocks(size):
    return [fdg_blocks.Block(i, f"block {i} (B)", *[None] * 4) for i in range(size)]


@st.composite
def networks(draw):
    """Additive costs of blocks, and which of the cuts between them are possible."""
    size = draw(st.integers(2, 9))
    numbers = st.lists(st.integers(1, 50), min_size=size, max_size=size)
    block, block_in_last, handover = (draw(numbers) for _ in range(3))
    block[-1] = handover[0] = 0
    whole = costs.Costs(tuple(block), tuple(block_in_last), tuple(handover))
    possible = draw(st.sets(st.integers(1, size - 1)))
    return whole, sorted(possible), draw(st.integers(2, min(4, size)))


def _balance(whole, possible, num_stages):
    """Balances with the given costs in place of measured ones."""
    size = len(whole.block)
    types = [jnp.float32 if i in possible else jnp.int32 for i in range(size + 1)]
    shapes = [jax.ShapeDtypeStruct((2,), dtype) for dtype in types]
    alone = costs.Costs(whole.block, whole.block_in_last, (0,) * size).seconds()

    def measure(*args, starts, **options):
        def pieces(column):
            bounds = itertools.pairwise([*starts, size])
            return tuple(sum(column[first:stop]) for first, stop in bounds)

        handover = tuple(whole.handover[start] for start in starts)
        return costs.Costs(pieces(whole.block), pieces(whole.block_in_last), handover)

    def time_stages(cuts):
        return [alone[bounds] for bounds in itertools.pairwise([0, *cuts, size])]

    with mock.patch.object(costs, "measure", mock.Mock(side_effect=measure)) as timed:
        try:
            return costs.balance(
                *(None, _blocks(size), [], [], shapes, None),
                time_stages=time_stages,
                staleness=1,
                devices="abcdefghi"[:num_stages],
            )
        finally:
            assert timed.call_count == (len(possible) >= num_stages - 1)


@given(networks())
@settings(max_examples=200)
def test_balanced_cuts_are_the_best_of_those_that_are_possible(case):
    whole, possible, num_stages = case
    if len(possible) < num_stages - 1:
        with pytest.raises(ValueError, match=f"this network has {len(possible)}"):
            _balance(*case)
        return
    seconds, size = whole.seconds(), len(whole.block)

    def slowest(cuts):
        return max(seconds[bounds] for bounds in itertools.pairwise([0, *cuts, size]))

    found = _balance(*case)
    assert set(found.cuts) <= set(possible)
    every = itertools.combinations(possible, num_stages - 1)
    best = min(map(slowest, every))
    assert slowest(found.cuts) == pytest.approx(best)
    assert max(found.stage_seconds) == pytest.approx(best)


def test_the_log_says_that_balancing_takes_time_and_what_skips_it(caplog):
    found = _balance(_costs([1.0] * 6), [2, 3, 5], 3)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("fdg_jax", logging.WARNING)
    assert "4 pieces" in record.message and "3 stages" in record.message
    assert "positions skip this" in record.message
    assert found.seconds_taken > 0


@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_calls_side_by_side_go_on_until_the_slowest_is_done(num_calls):
    counts, deadline = [0] * num_calls, time.monotonic() + 20

    def call(k):
        def run():
            counts[k] += 1
            if k == 0 and counts[0] == 4:
                # Its last one does not end before the others have been made once more.
                while min(counts[1:], default=5) < 5 and time.monotonic() < deadline:
                    time.sleep(1e-4)
            time.sleep(1e-4)

        return run

    seconds = costs.side_by_side([call(k) for k in range(num_calls)], repeats=4)
    assert counts[0] == 4
    assert all(count > 4 for count in counts[1:])
    assert len(seconds) == num_calls and min(seconds) > 0


def test_a_failing_call_ends_the_others():
    def fails():
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        costs.side_by_side([fails, lambda: time.sleep(1e-4)], repeats=3)


# --- the measurement ----------------------------------------------------------------


def _measure(network, x, label, num_stages=2, starts=None, **options):
    blocks, params, batch_stats = fdg_blocks.split_network(network)
    shapes = fdg_blocks.trace_shapes(blocks, params, batch_stats, x)
    make_stage = functools.partial(
        Stage,
        num_stages=num_stages,
        **{
            "loss_fn": fdg.softmax_cross_entropy,
            "metrics": {},
            "optimizer": optax.sgd(0.1, momentum=0.9),
            "shrink_factor": 1.0,
            "backward": "stored",
            "seed": 0,
            **options,
        },
    )
    return costs.measure(
        make_stage,
        blocks,
        params,
        batch_stats,
        shapes,
        label,
        starts=range(len(network)) if starts is None else starts,
        staleness=1,
        devices=jax.devices()[:num_stages],
    )


def _linear(width_in, width_out, seed=0):
    return nnx.Linear(width_in, width_out, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))


@pytest.fixture
def network():
    return [
        _linear(8, 8),
        _linear(8, 8, seed=1),
        nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        _linear(8, 8, seed=2),
        nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        _linear(8, 8, seed=3),
    ]


IMAGES = jax.ShapeDtypeStruct((4, 8), jnp.float32)
LABELS = jax.ShapeDtypeStruct((4,), jnp.int32)


@pytest.mark.parametrize("backward", ["stored", "recompute", "replay"])
def test_costs_are_positive_where_a_stage_can_have_them(network, backward):
    measured = _measure(network, IMAGES, LABELS, backward=backward)
    assert all(cost > 0 for cost in measured.block[:-1]) and measured.block[-1] == 0
    assert all(cost > 0 for cost in measured.block_in_last)
    assert all(cost > 0 for cost in measured.handover[1:]) and measured.handover[0] == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_timed_are_updates_that_are_made(network, monkeypatch, accumulation):
    states = []

    def update(stage, state, gradient, original=Stage.update):
        state = original(stage, state, gradient)
        states.append(jax.device_get(state.progress))
        return state

    monkeypatch.setattr(Stage, "update", update)
    _measure(network, IMAGES, LABELS, accumulation=accumulation)
    assert max(int(progress.next_gradient) for progress in states) > 2
    assert not any(p.is_halted or p.in_a_row for p in states)


def test_blocks_that_are_alike_are_measured_once(network):
    measured = _measure(network, IMAGES, LABELS)
    # To the last bit, which no two measurements are. The first block differs, since
    # nobody asks for the gradient of its input; the last has the loss.
    for column in (measured.block, measured.block_in_last):
        assert column[1] == column[3]
        assert len(set(column)) == 5
    assert len(set(measured.handover[1:])) == 1


def test_a_much_larger_block_costs_more():
    network = [_linear(4, 4), _linear(4, 4), _linear(4, 768), _linear(768, 768)]
    network += [_linear(768, 4)]
    x = jax.ShapeDtypeStruct((256, 4), jnp.float32)
    label = jax.ShapeDtypeStruct((256,), jnp.int32)
    measured = _measure(network, x, label)
    assert measured.block[3] > 2 * measured.block[1]
    assert measured.block_in_last[3] > 2 * measured.block_in_last[1]


class _Slow(nnx.Module):
    """A block whose backward needs what its forward took long to compute."""

    def __init__(self, width):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x):
        def step(_, y):
            return jnp.tanh(y @ jnp.full((y.shape[1],) * 2, 1e-3, y.dtype))

        busy = jax.lax.fori_loop(0, 100, step, jax.lax.stop_gradient(x))
        return x + busy * self.scale[...].reshape(1, -1)


def test_a_stage_that_recomputes_pays_for_two_forwards_and_the_last_for_one():
    network = [_linear(256, 256), _Slow(256), _linear(256, 4)]
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    label = jax.ShapeDtypeStruct((256,), jnp.int32)
    # Each is held against one that was timed in turns with it.
    stored = _measure(network, x, label)
    assert stored.block[1] < 1.4 * stored.block_in_last[1]
    recomputed = _measure(network, x, label, backward="recompute")
    assert recomputed.block[1] > 1.4 * recomputed.block_in_last[1]


def test_outputs_may_be_any_pytree_and_images_integers():
    class Embed(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(jnp.ones((5, 3), jnp.float32))

        def __call__(self, tokens):
            return {"a": self.table[...][tokens], "b": (jnp.ones((2,), jnp.float32),)}

    class Scale(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones((), jnp.float32))

        def __call__(self, x):
            return {"a": x["a"] * self.scale[...], "b": x["b"]}

    class Head(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(jnp.ones((), jnp.float32))

        def __call__(self, x):
            return x["a"] * self.scale[...]

    measured = _measure(
        [Embed(), Scale(), Head()], jax.ShapeDtypeStruct((4,), jnp.int32), LABELS
    )
    assert np.isfinite(measured.seconds()).all()


class _Embed(nnx.Module):
    """Gives integers beside its activation, and a mask."""

    def __init__(self):
        self.table = nnx.Param(jnp.ones((5, 3), jnp.float32))

    def __call__(self, x):
        noise = jax.random.normal(x["key"][0], (3,), jnp.float32).reshape(1, 3)
        y = self.table[...][x["tokens"]] + noise
        return {"x": y, "keys": x["key"], "mask": x["tokens"] > 2, "nothing": None}


class _Masked(nnx.Module):
    """Uses them, and passes on a part."""

    def __init__(self, keep):
        self.scale = nnx.Param(jnp.ones((), jnp.float32))
        self.keep = keep

    def __call__(self, inputs):
        y = jnp.where(inputs["mask"][:, None], inputs["x"] * self.scale[...], 0.0)
        kept = inputs if self.keep else {"nothing": None}
        return {**kept, "x": y}


class _Scale(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones((), jnp.float32))

    def __call__(self, inputs):
        return {**inputs, "x": inputs["x"] * self.scale[...]}


def test_blocks_between_which_no_cut_is_possible_are_timed_together():
    network = [_Embed(), _Masked(True), _Masked(True), _Masked(False), _Scale()]
    network.append(_Scale())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
    images = {"tokens": jax.ShapeDtypeStruct((4,), jnp.int32), "key": keys}
    measured = _measure(
        network,
        images,
        {"class": LABELS, "used": jax.ShapeDtypeStruct((4,), bool), "key": keys},
        starts=(0, 4, 5),
        loss_fn=lambda y, label: fdg.softmax_cross_entropy(y["x"], label["class"]),
    )
    assert [len(column) for column in vars(measured).values()] == [3, 3, 3]
    assert all(cost > 0 for cost in measured.block[:-1]) and measured.block[-1] == 0
    assert all(cost > 0 for cost in measured.block_in_last)
    assert all(cost > 0 for cost in measured.handover[1:])


def test_an_optimizer_is_asked_for_stages_that_there_will_be(network):
    asked = []

    def optimizer(stage):
        asked.append(stage[:3])
        return optax.sgd([0.1, 0.2][stage.index])

    _measure(network, IMAGES, LABELS, optimizer=optimizer)
    assert set(asked) == {(0, 2, 1), (1, 2, 0)}


def _values(network):
    state = nnx.state(network, nnx.Not(nnx.RngState))
    return jax.device_get(jax.tree.leaves(state))


def test_measuring_leaves_the_network_as_it_is(network):
    before = _values(network)
    _measure(network, IMAGES, LABELS)
    after = _values(network)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
