import itertools
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdg_jax import methods, schedule

# Time per batch in ticks for K = 4, by one-way delay in forwards; worked out apart.
DELAYS = (0, 0.1, 0.5, 1, 1.5, 3)
TICKS = {
    "bp": (4.00, 4.20, 5.00, 6.00, 7.00, 10.00),
    "minimal": (1.00, 1.05, 1.25, 1.50, 1.75, 2.50),
    "reference": (1.00, 1.03, 1.17, 1.33, 1.50, 2.00),
    "paper": (1.00, 1.00, 1.00, 1.00, 1.00, 1.43),
}
STALENESS = {
    "bp": (0, 0, 0, 0),
    "minimal": (3, 2, 1, 0),
    "reference": (5, 3, 1, 0),
    "paper": (6, 4, 2, 0),
}


@st.composite
def schedules(draw, max_stages=5, max_step=3):
    """Any s_0 >= ... >= s_{K-1} = 0, built from the last stage upwards."""
    steps = draw(st.lists(st.integers(0, max_step), max_size=max_stages - 1))
    staleness = tuple(int(s) for s in np.cumsum([0, *steps])[::-1])
    return schedule.resolve(staleness, len(staleness))


# Multiples of 1/4 add up exactly in floating point.
durations = st.integers(1, 12).map(lambda quarters: quarters / 4)
delays = st.integers(0, 12).map(lambda quarters: quarters / 4)


@pytest.mark.parametrize(
    "name,delay,ticks",
    [
        (name, delay, ticks)
        for name, row in TICKS.items()
        for delay, ticks in zip(DELAYS, row, strict=True)
    ],
)
def test_ticks_per_batch_are_those_of_the_design(name, delay, ticks):
    measured = schedule.resolve(name, 4).ticks_per_batch(delay)
    # The table is rounded to two places.
    assert measured == pytest.approx(ticks, abs=0.005 + 1e-9)


@pytest.mark.parametrize("num_stages", range(1, 7))
def test_back_propagation_takes_a_tick_per_stage_and_two_delays_per_cut(num_stages):
    ticks = schedule.resolve("bp", num_stages).ticks_per_batch(delay=0.5)
    assert ticks == pytest.approx(num_stages + 2 * (num_stages - 1) * 0.5 / 3)


@given(schedules(max_stages=4))
@settings(max_examples=25)
def test_all_stages_are_busy_exactly_when_staleness_falls_at_every_cut(resolved):
    # Of two neighbours with the same staleness each waits for the other in every turn.
    falls = all(a > b for a, b in itertools.pairwise(resolved.staleness))
    ticks = resolved.ticks_per_batch()
    assert ticks == pytest.approx(1.0) if falls else ticks > 1.01


@pytest.mark.parametrize("name", STALENESS)
def test_a_name_means_its_row_of_the_design(name):
    resolved = schedule.resolve(name, 4)
    assert resolved.staleness == STALENESS[name]
    assert resolved.name == name
    assert resolved.num_stages == 4


@pytest.mark.parametrize("name", schedule.NAMED)
def test_a_single_stage_has_no_staleness(name):
    assert schedule.resolve(name, 1).staleness == (0,)


def test_minimal_and_reference_are_the_same_with_two_stages():
    minimal, reference = (schedule.resolve(n, 2) for n in ("minimal", "reference"))
    assert minimal.staleness == reference.staleness == (1, 0)


@pytest.mark.parametrize("num_stages", range(1, 9))
@pytest.mark.parametrize("name", schedule.NAMED)
def test_every_named_schedule_is_valid_for_any_number_of_stages(name, num_stages):
    named = schedule.resolve(name, num_stages)
    explicit = schedule.resolve(named.staleness, num_stages)
    assert explicit.staleness == named.staleness


@pytest.mark.parametrize(
    "written",
    [
        "3,1,0",
        "3, 1, 0",
        "(3, 1, 0)",
        "3,1,0,",
        (3, 1, 0),
        [3, 1, 0],
        np.array([3, 1, 0]),
    ],
    ids=repr,
)
def test_text_and_sequences_mean_the_same(written):
    resolved = schedule.resolve(written, 3)
    assert resolved.staleness == (3, 1, 0)
    assert resolved.name == "custom"


def test_a_schedule_resolves_to_the_same_staleness():
    resolved = schedule.resolve((3, 1, 0), 3)
    assert schedule.resolve(resolved, 3) == resolved


def test_str_shows_the_name_and_every_stage():
    assert str(schedule.resolve("reference", 4)) == "reference (s = 5, 3, 1, 0)"
    assert str(schedule.resolve("2,0", 2)) == "custom (s = 2, 0)"


@pytest.mark.parametrize(
    "staleness,num_stages,rule",
    [
        ((1, -1), 2, "cannot be negative"),
        ((0, 1, 0), 3, "must not increase"),
        ((2, 1), 2, "last stage must be 0"),
        ((1, 0), 3, "one staleness per stage, 3 in all"),
        ((2, 1, 0), 2, "one staleness per stage, 2 in all"),
        ((1.0, 0), 2, "must be an integer"),
        ((True, 0), 2, "must be an integer"),
        (("1", "0"), 2, "must be an integer"),
    ],
)
def test_an_invalid_tuple_is_refused_with_rule_value_and_way_out(
    staleness, num_stages, rule
):
    with pytest.raises(ValueError) as refused:
        schedule.resolve(staleness, num_stages)
    message = str(refused.value)
    assert rule in message
    assert str(staleness) in message
    assert f"num_stages={num_stages}" in message
    assert all(name in message for name in schedule.NAMED)
    assert "\n" not in message


def test_text_is_validated_like_a_tuple():
    with pytest.raises(ValueError, match="must not increase"):
        schedule.resolve("0,1,0", 3)


def test_a_schedule_for_another_number_of_stages_is_refused():
    with pytest.raises(ValueError, match="3 in all"):
        schedule.resolve(schedule.resolve("paper", 4), 3)


@pytest.mark.parametrize(
    "word,nearest",
    [("referense", "reference"), ("Paper", "paper"), ("minimum", "minimal")],
)
def test_an_unknown_name_is_answered_with_the_nearest(word, nearest):
    with pytest.raises(ValueError, match=f"got '{word}'; did you mean '{nearest}'"):
        schedule.resolve(word, 3)


@pytest.mark.parametrize("word", ["zigzag", "", "3;1;0", "1.5,0"])
def test_a_word_like_no_name_is_answered_with_all_of_them(word):
    with pytest.raises(ValueError) as refused:
        schedule.resolve(word, 3)
    message = str(refused.value)
    assert all(name in message for name in schedule.NAMED)
    assert repr(word) in message
    assert "did you mean" not in message


@given(schedules(), st.integers(1, 12))
def test_every_stage_runs_the_program_of_the_algorithm(resolved, num_batches):
    for staleness, lane in zip(
        resolved.staleness, resolved.simulate(num_batches), strict=True
    ):
        program = []
        for n in range(num_batches):
            program.append(("F", n))
            if n >= staleness:
                program.append(("B", n - staleness))
        assert [(piece.kind, piece.batch) for piece in lane] == program


@given(schedules(), st.integers(1, 12), durations, durations, delays)
def test_work_starts_when_its_input_has_come_and_its_stage_is_free(
    resolved, num_batches, forward, backward, delay
):
    lanes = resolved.simulate(
        num_batches, forward=forward, backward=backward, delay=delay
    )
    end = {
        (piece.kind, k, piece.batch): piece.end
        for k, lane in enumerate(lanes)
        for piece in lane
    }
    for k, lane in enumerate(lanes):
        free = 0.0
        for kind, batch, start, stop in lane:
            arrival = end.get((kind, k - 1 if kind == "F" else k + 1, batch))
            arrival = 0.0 if arrival is None else arrival + delay
            assert start == max(free, arrival)
            assert stop == start + (forward if kind == "F" else backward)
            free = stop


@given(schedules(), st.integers(1, 12))
def test_a_stage_holds_one_batch_more_than_its_staleness_at_most(resolved, num_batches):
    for staleness, lane in zip(
        resolved.staleness, resolved.simulate(num_batches), strict=True
    ):
        held = np.cumsum([1 if piece.kind == "F" else -1 for piece in lane])
        assert held.max() == min(staleness + 1, num_batches)


@given(schedules(), st.integers(1, 12))
def test_the_diagram_draws_every_slice_in_its_place(resolved, num_batches):
    rows = resolved.diagram(num_batches).splitlines()
    lanes = resolved.simulate(num_batches)
    for k, (row, lane) in enumerate(zip(rows, lanes, strict=True)):
        label, drawing = row.split("|")
        assert label == f"stage {k} "
        expected = {
            cell: f"{piece.kind}{piece.batch}"
            for piece in lane
            for cell in range(int(piece.start), int(piece.end))
        }
        drawn = dict(enumerate(drawing.split()))
        assert {i: text for i, text in drawn.items() if text != "."} == expected


def test_the_diagram_of_back_propagation_shows_the_lock():
    assert schedule.resolve("bp", 2).diagram(2) == (
        "stage 0 |  F0   .   .   .  B0  B0  F1   .   .   .  B1  B1\n"
        "stage 1 |   .  F0  B0  B0   .   .   .  F1  B1  B1"
    )


# --- draining ---------------------------------------------------------------------


@given(schedules(), st.integers(1, 12), st.integers(1, 5))
def test_a_drained_schedule_starts_anew_after_every_drain(
    resolved, num_batches, drain_every
):
    """As if the batches between two drains were a training of their own."""
    drained = schedule.Schedule("custom", resolved.staleness, drain_every)
    lanes = drained.simulate(num_batches)
    for k, lane in enumerate(lanes):
        program = []
        for begin in range(0, num_batches, drain_every):
            window = range(begin, min(begin + drain_every, num_batches))
            for n in window:
                program.append(("F", n))
                if n - resolved.staleness[k] >= begin:
                    program.append(("B", n - resolved.staleness[k]))
            if len(window) == drain_every:
                done = {n for kind, n in program if kind == "B"}
                program += [("B", n) for n in window if n not in done]
        assert [(piece.kind, piece.batch) for piece in lane] == program


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_gpipe_idles_in_one_turn_less_than_there_are_stages(num_stages, micro_batches):
    """Of M + K - 1 turns (Huang et al., section 2.3: a bubble of (K-1)/(M+K-1))."""
    arguments = methods.get("gpipe").arguments(num_stages, accumulation=micro_batches)
    ticks = arguments["schedule"].ticks_per_batch(num_batches=16 * micro_batches)
    expected = (micro_batches + num_stages - 1) / micro_batches
    assert ticks == pytest.approx(expected)


def test_a_drained_schedule_says_so():
    drained = schedule.Schedule("gpipe", (3, 3, 0), drain_every=4)
    assert str(drained) == "gpipe (s = 3, 3, 0; drained every 4)"
    assert schedule.resolve(drained, 3) is drained
    # A turn takes three cells; idle are those of K - 1 turns.
    row = drained.diagram(4).splitlines()[0]
    assert row.startswith("stage 0 |  F0  F1  F2  F3   .   .   .  B0  B0")
    assert row.endswith("B3  B3") and row.count(" .") == 3 * (3 - 1)


def _finishes(staleness, activations, cotangents, num_batches, drain_every=0):
    """Whether the stages, each draining at the end, finish over bounded channels.

    The stages are a Kahn process network, so one order of execution decides for all.
    """
    last = len(staleness) - 1
    down, up = ([deque() for _ in range(last)] for _ in range(2))

    def program(k):
        held = 0
        for turn in range(num_batches):
            yield from () if k == 0 else receive(down[k - 1])
            yield from () if k == last else send(down[k], activations)
            held += 1
            drains = drain_every and (turn + 1) % drain_every == 0
            ends = turn + 1 == num_batches
            while held > (0 if drains or ends else staleness[k]):
                yield from () if k == last else receive(up[k])
                yield from () if k == 0 else send(up[k - 1], cotangents[k - 1])
                held -= 1

    def receive(channel):
        while not channel:
            yield False
        channel.popleft()
        yield True

    def send(channel, capacity):
        while len(channel) >= capacity:
            yield False
        channel.append(None)
        yield True

    running = [program(k) for k in range(last + 1)]
    while True:
        moves = [next(stage, None) for stage in running]
        if not any(moves):
            return all(move is None for move in moves)


def _combinations():
    """All schedules of 2 to 4 stages with s <= 7, with 1 to 3 activations of room."""
    for cuts in (1, 2, 3):
        for head in itertools.combinations_with_replacement(range(7, -1, -1), cuts):
            for activations in (1, 2, 3):
                yield schedule.resolve((*head, 0), cuts + 1), activations


@pytest.mark.parametrize("drain_every", range(6))
def test_no_schedule_deadlocks_with_the_cotangent_capacity(drain_every):
    combinations = list(_combinations())
    assert len(combinations) == 492
    for resolved, activations in combinations:
        cuts = range(resolved.num_stages - 1)
        cotangents = [resolved.cotangent_capacity(k) for k in cuts]
        limits = (activations, cotangents, 12, drain_every)
        assert _finishes(resolved.staleness, *limits)


def test_with_room_for_one_cotangent_steep_schedules_deadlock():
    for resolved, activations in _combinations():
        s = resolved.staleness
        steepest = max(a - b for a, b in itertools.pairwise(s))
        # A stage waits to send a second cotangent; the one before may still run ahead
        # by the activations that the channel holds before it waits for the first.
        sticks = steepest > activations + 1
        assert _finishes(s, activations, [1] * (len(s) - 1), 12) != sticks
