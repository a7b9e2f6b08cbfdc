"""The timeline of real runs: the algorithm can be read off it."""

import functools
import gc
import itertools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_threads
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from fdg_jax.recorder import WAITS, WORK, Slice
from fdg_jax.stage import Stage
from fdg_jax.timeline import _clock_without, _not_training

BATCHES = oracle.make_batches(12)


def make_pipeline(network=None, **options):
    options = {
        "loss_fn": fdg.softmax_cross_entropy,
        "optimizer": optax.sgd(0.1, momentum=0.9),
        "num_stages": 3,
        "cuts": (1, 3),
        "engine": "threads",
        **options,
    }
    return fdg.Pipeline(network or oracle.make_network(), **options)


def record(batches=BATCHES, **options):
    timeline = fdg.Timeline()
    with make_pipeline(timeline=timeline, **options) as pipeline:
        list(pipeline.train(batches))
    return timeline


def work_of(slices):
    return [(piece.kind, piece.batch) for piece in slices if not piece.is_wait]


def no_thread_is_left():
    return not own_threads.left()


# --- what happens ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "schedule"),
    [
        *(("threads", name) for name in fdg.schedule.NAMED),
        *[("threads", (5, 1, 0)), ("serial", "paper")],
    ],
)
def test_every_batch_is_worked_on_once_at_the_staleness_of_the_schedule(
    engine, schedule
):
    timeline = record(schedule=schedule, engine=engine)
    staleness = fdg.schedule.resolve(schedule, 3).staleness
    for k, slices in enumerate(timeline.slices()):
        work = work_of(slices)
        kinds = ("forward", "backward", "update") if k < 2 else ("loss_step", "update")
        expected = [(kind, n) for kind in kinds for n in range(len(BATCHES))]
        assert sorted(work) == sorted(expected)
        for n in range(len(BATCHES)):
            first = work.index((kinds[0], n))
            used = work.index((kinds[-2], n))
            between = [kind for kind, _ in work[first:used]].count("update")
            assert between == min(n, staleness[k])
            assert work[used + 1] == ("update", n)


@pytest.mark.parametrize("engine", ["serial", "threads", "fused"])
def test_the_slices_of_a_lane_follow_each_other(engine):
    timeline = fdg.Timeline()
    with make_pipeline(timeline=timeline, engine=engine) as pipeline:
        list(pipeline.train(BATCHES[:5]))
        pipeline.evaluate(BATCHES[:2])
        list(pipeline.train(BATCHES[5:]))
    with pipeline:
        list(pipeline.train(BATCHES[:5]))
    for slices in timeline.slices():
        assert all(piece.start <= piece.end for piece in slices)
        pairs = list(itertools.pairwise(slices))
        assert all(a.end <= b.start for a, b in pairs)
        # They leave a gap only while the pipeline was closed.
        assert sum(a.end < b.start for a, b in pairs) <= 1
        assert {piece.kind for piece in slices} <= {*WORK, *WAITS}
        assert [kind for kind, _ in work_of(slices)].count("evaluate") == 2


@pytest.mark.parametrize(
    ("engine", "backward"),
    [
        ("threads", "stored"),
        ("fused", "stored"),
        pytest.param("threads", "replay", marks=pytest.mark.slow),
        pytest.param("serial", "recompute", marks=pytest.mark.slow),
    ],
)
def test_results_are_the_same_bits_with_and_without_a_timeline(engine, backward):
    def train(timeline):
        options = {"engine": engine, "backward": backward, "timeline": timeline}
        with make_pipeline(**options) as pipeline:
            metrics = list(pipeline.train(BATCHES))
            metrics.append(pipeline.evaluate_metrics(BATCHES[:2]))
        return metrics, jax.tree.leaves(oracle.values(pipeline.network))

    (metrics, values), (recorded_metrics, recorded) = train(None), train(fdg.Timeline())
    assert recorded_metrics == metrics
    jax.tree.map(np.testing.assert_array_equal, recorded, values)


def test_the_fused_engine_has_one_lane_of_its_calls():
    timeline = record(engine="fused", schedule="paper")
    (slices,) = timeline.slices()
    trained = [piece for piece in slices if piece.kind == "train"]
    assert [(piece.batch, piece.num_batches) for piece in trained] == [(0, 8), (8, 4)]
    assert work_of(slices)[2:] == [("drain", 12)]
    (lane,) = timeline.busy()
    assert lane["name"] == "fused"
    assert lane["batches"] == 4  # from the end of the first call to that of the second


def test_the_hot_loop_copies_nothing_implicitly():
    devices = jax.devices()
    batches = [
        {
            "image": jax.device_put(b["image"], devices[0]),
            "label": jax.device_put(b["label"], devices[2]),
        }
        for b in BATCHES
    ]
    with make_pipeline(timeline=fdg.Timeline()) as pipeline:
        list(pipeline.train(batches))
        pipeline.evaluate(batches)
        # For all threads, unlike the context manager.
        jax.config.update("jax_transfer_guard", "disallow")
        try:
            list(pipeline.train(batches))
            pipeline.evaluate(batches)
        finally:
            jax.config.update("jax_transfer_guard", "allow")


def test_no_activation_is_kept_alive():
    batches = oracle.make_batches(6, batch_size=13)
    timeline = record(batches, schedule="paper")
    gc.collect()
    assert not [a for a in jax.live_arrays() if a.shape[:1] == (13,)]
    assert len(timeline.slices()) == 3


# --- when it happens ---------------------------------------------------------------


class Slow(nnx.Module):
    """A linear block that takes its time."""

    def __init__(self, repeats, rngs):
        self.linear = nnx.Linear(160, 160, rngs=rngs)
        self._repeats = repeats

    def __call__(self, x):
        return jax.lax.fori_loop(
            0, self._repeats, lambda _, x: jnp.tanh(self.linear(x)), x
        )


@functools.cache
def record_a_slow_stage():
    """The timeline of three stages, of which the one in the middle is slow."""
    network = [Slow(n, nnx.Rngs(k)) for k, n in enumerate((4, 100, 4))]
    # Enough batches for whole ticks of a filled pipeline, however late threads are.
    batches = oracle.make_batches(40, batch_size=128, width=160, dtype=np.float32)
    return record(batches, network=network, cuts=(1, 2), schedule="paper")


def test_a_stage_starts_on_what_it_waited_for_when_that_is_ready():
    first, slow, last = [
        {(piece.kind, piece.batch): piece for piece in slices if not piece.is_wait}
        for slices in record_a_slow_stage().slices()
    ]
    handed_over = {
        "activation": [(slow["forward", n], last["loss_step", n]) for n in range(40)],
        "cotangent": [(slow["backward", n], first["backward", n]) for n in range(40)],
    }
    for pairs in handed_over.values():
        # Two threads took the two times, and either may be late by any time now and
        # then: hence the median, as a share of the time that the slow stage took.
        late = [(b.start - a.end) / (a.end - a.start) for a, b in pairs]
        assert abs(np.median(late)) < 0.5


def test_the_slowest_stage_is_the_busiest():
    lanes = record_a_slow_stage().busy()
    busy = [lane["busy"] for lane in lanes]
    assert busy[1] > 2 * max(busy[0], busy[2])
    assert busy[1] > 0.6
    for lane in lanes:
        assert 0.0 < lane["work"] == pytest.approx(lane["busy"] * lane["tick"])
    # The others wait for it: what comes from it, or room to send to it.
    first, _, last = [lane["seconds"] for lane in lanes]
    waits = {kind: first[kind] for kind in WAITS if kind != "compile"}
    assert max(waits, key=waits.get) in ("cotangent", "room")
    waits = {kind: last[kind] for kind in WAITS if kind != "compile"}
    assert max(waits, key=waits.get) == "activation"


def test_compilation_and_evaluation_do_not_count_as_training():
    timeline = fdg.Timeline()
    with make_pipeline(timeline=timeline) as pipeline:
        list(pipeline.train(BATCHES))
        before = timeline.busy()
        pipeline.evaluate(BATCHES)
    for slices, lane, earlier in zip(
        timeline.slices(), timeline.busy(), before, strict=True
    ):
        raw = {kind: 0.0 for kind in ("compile", "evaluate")}
        for piece in slices:
            if piece.kind in raw:
                raw[piece.kind] += piece.end - piece.start
        assert {kind: lane["seconds"][kind] for kind in raw} == pytest.approx(raw)
        assert raw["compile"] > 0.0 and raw["evaluate"] > 0.0
        training = sum(s for k, s in lane["seconds"].items() if k not in raw)
        assert lane["tick"] * lane["batches"] == pytest.approx(training)
        assert training < slices[-1].end - slices[0].start - sum(raw.values()) + 1e-9
        assert lane["batches"] >= earlier["batches"] > 0


def test_a_clock_stands_still_while_a_stage_compiles_evaluates_or_is_closed():
    lanes = [
        [Slice("compile", 0, 1.0, 3.0), Slice("forward", 0, 3.0, 6.5)],
        [Slice("evaluate", 0, 2.0, 4.0), Slice("update", 0, 4.0, 6.0)],
        [Slice("update", 0, 4.0, 6.0), Slice("update", 1, 7.0, 8.0)],
    ]
    clock = _clock_without(_not_training(lanes))
    times = clock([0.0, 1.0, 2.0, 4.0, 5.0, 6.5, 7.0, 9.0])
    np.testing.assert_allclose(times, [0.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.0, 5.0])
    np.testing.assert_allclose(_clock_without([])([0.0, 2.5]), [0.0, 2.5])


def test_only_whole_ticks_of_a_filled_pipeline_count():
    """Two stages, staleness 1, a tick of 3: the upper works for 2, the lower for 3."""
    timeline = fdg.Timeline()
    upper, lower = (timeline.lane(f"stage {k}", jax.devices()[k]) for k in range(2))

    def add(lane, *times):
        kinds = [kind for kind, _ in times]
        edges = [0.0, *np.cumsum([length for _, length in times])]
        lane.slices.extend(
            Slice(kind, 0, start, end)
            for kind, (start, end) in zip(kinds, itertools.pairwise(edges), strict=True)
        )

    update = [("backward", 0.75), ("update", 0.25)]
    tick = [("forward", 1.0), ("cotangent", 1.0), *update]
    add(upper, ("compile", 9.0), ("forward", 1.0), *tick * 20, ("room", 7.0), *update)
    add(lower, ("activation", 10.0), *[("loss_step", 2.5), ("update", 0.5)] * 21)
    one, other = timeline.busy()
    # The upper's first update ends at 13 and its last forward starts at 67.
    assert (one["batches"], other["batches"]) == (18, 18)
    assert (one["tick"], other["tick"]) == pytest.approx((3.0, 3.0))
    assert (one["work"], other["work"]) == pytest.approx((2.0, 3.0))
    assert (one["busy"], other["busy"]) == pytest.approx((2 / 3, 1.0))
    seconds = {"forward": 18, "cotangent": 18, "backward": 13.5, "update": 4.5}
    expected = {**seconds, "compile": 9.0, "room": 0.0}
    assert one["seconds"] == pytest.approx(expected)


def test_the_table_has_a_row_per_stage_whose_columns_add_up():
    timeline = record()
    header, *rows = timeline.table().splitlines()
    assert [row.split()[:3] for row in rows] == [
        ["stage", f"{k}", f"cpu:{jax.devices()[k].id}"] for k in range(3)
    ]
    assert "busy" in header and "forward" in header and "compile" not in header
    for row in rows:
        tick, *parts = map(float, row.split()[5:])
        assert sum(parts) == pytest.approx(tick, abs=0.01 * len(WORK + WAITS))
    assert fdg.Timeline().table()


# --- the file ----------------------------------------------------------------------


def read(path):
    return json.loads(path.read_text("utf-8"))["traceEvents"]


def test_the_file_is_in_the_trace_event_format(tmp_path):
    timeline = record()
    timeline.write(tmp_path / "timeline.json")
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]
    events = read(tmp_path / "timeline.json")
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {
        k: f"stage {k} (cpu:{device.id})" for k, device in enumerate(jax.devices()[:3])
    }
    lanes = timeline.slices()
    pieces = [e for e in events if e["ph"] == "X"]
    for k, slices in enumerate(lanes):
        shown = [e for e in pieces if e["tid"] == k]
        assert len(shown) == len(slices)
        for event, piece in zip(shown, slices, strict=True):
            assert event["name"].removeprefix("wait: ") == piece.kind
            assert event["name"].startswith("wait: ") == piece.is_wait
            assert event["args"]["batch"] == piece.batch
            assert event["ts"] == pytest.approx(1e6 * piece.start, abs=1e-3)
            assert event["dur"] == pytest.approx(
                1e6 * (piece.end - piece.start), abs=1e-3
            )
    for event in events:
        assert {"ph", "name", "pid", "tid"} <= event.keys()


def test_the_file_shows_what_stages_send_each_other(tmp_path):
    record().write(tmp_path / "timeline.json")
    events = read(tmp_path / "timeline.json")

    def around(flow):
        (piece,) = [
            e
            for e in events
            if e["ph"] == "X"
            and e["tid"] == flow["tid"]
            and e["ts"] <= flow["ts"] <= e["ts"] + e["dur"]
        ]
        return piece["tid"], piece["name"], piece["args"]["batch"]

    ends = {
        phase: {e["id"]: e for e in events if e["ph"] == phase} for phase in ("s", "f")
    }
    assert ends["s"].keys() == ends["f"].keys()
    flows = {
        (end["name"], around(ends["s"][i]), around(end)) for i, end in ends["f"].items()
    }
    n = range(len(BATCHES))
    assert flows == {
        *(("activation", (0, "forward", i), (1, "forward", i)) for i in n),
        *(("activation", (1, "forward", i), (2, "loss_step", i)) for i in n),
        *(("cotangent", (2, "loss_step", i), (1, "backward", i)) for i in n),
        *(("cotangent", (1, "backward", i), (0, "backward", i)) for i in n),
    }


def test_memory_and_file_are_bounded(tmp_path):
    timeline = fdg.Timeline(max_slices=20)
    with make_pipeline(timeline=timeline) as pipeline:
        list(pipeline.train(BATCHES * 3))
    lanes = timeline.slices()
    assert all(0 < len(slices) <= 20 for slices in lanes)
    assert max(piece.batch for piece in lanes[0]) == 35
    # All reach back to the oldest slice of a lane that has dropped some.
    oldest = [slices[0].start for slices in lanes if len(slices) == 20]
    assert min(slices[0].start for slices in lanes) == max(oldest)
    timeline.write(tmp_path / "timeline.json")
    assert len(read(tmp_path / "timeline.json")) < 150


def test_after_an_error_the_timeline_is_whole_and_no_thread_is_left(
    tmp_path, monkeypatch
):
    def broken(stage, state, entry, cotangent, original=Stage.backward):
        if stage.index == 1 and int(state.batch.number) == 6:
            raise OSError("broken on purpose")
        return original(stage, state, entry, cotangent)

    monkeypatch.setattr(Stage, "backward", broken)
    timeline = fdg.Timeline()
    pipeline = make_pipeline(timeline=timeline, schedule=(4, 2, 0))
    with pytest.raises(OSError, match="broken on purpose"), pipeline:
        list(pipeline.train(BATCHES))
    assert no_thread_is_left()
    timeline.write(tmp_path / "timeline.json")
    done = {
        (e["tid"], e["name"], e["args"]["batch"])
        for e in read(tmp_path / "timeline.json")
        if e["ph"] == "X"
    }
    assert (1, "update", 2) in done and (1, "forward", 5) in done
    assert (1, "backward", 3) not in done


def test_no_thread_outlives_a_pipeline_that_nobody_closed():
    timeline = fdg.Timeline()
    pipeline = make_pipeline(timeline=timeline)
    next(pipeline.train(BATCHES))
    assert not no_thread_is_left()
    del pipeline
    gc.collect()
    # Watchers are told to end, not waited for.
    deadline = time.monotonic() + 10
    while not no_thread_is_left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert no_thread_is_left()


def test_a_pipeline_may_be_collected_while_a_timeline_is_read():
    timeline = fdg.Timeline()
    pipelines = [make_pipeline(timeline=timeline)]

    def forget():
        pipelines.clear()
        gc.collect()

    collector = threading.Thread(target=forget)
    # As slices() does; the collector can run in any thread, so in this one as well.
    with timeline._clock.lock:
        list(pipelines[0].train(BATCHES[:2]))
        collector.start()
        collector.join(timeout=20)
        finished = not collector.is_alive()
    collector.join()
    assert finished
    timeline.stop()
    # The stages were told to end, and nobody has waited for them.
    deadline = time.monotonic() + 20
    while not no_thread_is_left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert no_thread_is_left()
    assert ("loss_step", 1) in work_of(timeline.slices()[-1])


def test_wrong_uses_are_refused():
    with pytest.raises(ValueError, match="max_slices must be at least 1; got 0"):
        fdg.Timeline(max_slices=0)
    timeline = fdg.Timeline()
    make_pipeline(timeline=timeline)
    with pytest.raises(ValueError, match="records one pipeline.*make a new"):
        make_pipeline(timeline=timeline)
