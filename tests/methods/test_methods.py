"""What methods set, what they refuse, and what ADL's staleness is, measured."""

import jax
import method_oracles
import ml_collections
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from configs import digits
from fdg_jax import data, from_config
from fdg_jax.stage import Stage

pytestmark = pytest.mark.usefixtures("compiled_quickly")

NAMES = ("bp", "dp", "gpipe", "pipedream", "ddg", "fr", "dgl", "adl", "fdg")


def make_pipeline(network=None, cuts=(2,), engine="serial", **arguments):
    return fdg.Pipeline(
        oracle.make_network() if network is None else network,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(0.1),
        cuts=cuts,
        engine=engine,
        **arguments,
    )


def refusal(function, *arguments, **values):
    """The one line with which a call is refused."""
    with pytest.raises(ValueError) as refused:
        function(*arguments, **values)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- what a method sets ------------------------------------------------------------


def test_the_methods_are_those_of_the_literature():
    assert tuple(fdg.methods.METHODS) == NAMES
    assert all(fdg.methods.get(name).name == name for name in NAMES)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("bp", lambda distance: 0),
        ("pipedream", lambda distance: distance),
        ("ddg", lambda distance: distance),
        ("fr", lambda distance: distance),
        ("dgl", lambda distance: 0),
        ("adl", lambda distance: max(0, 2 * distance - 1)),
        ("fdg", lambda distance: max(0, 2 * distance - 1)),
        ("gpipe", lambda distance: 3 if distance else 0),
    ],
)
def test_the_integer_of_each_stage_is_the_papers(name, late, num_stages):
    arguments = fdg.methods.get(name).arguments(num_stages)
    expected = tuple(late(num_stages - 1 - k) for k in range(num_stages))
    assert arguments["schedule"].staleness == expected
    assert arguments["num_stages"] == num_stages and arguments["replicas"] == 1


@pytest.mark.parametrize("schedule", [(3, 1, 0), [3, 1, 0], np.array([3, 1, 0])])
def test_an_open_schedule_may_be_any_sequence(schedule):
    arguments = fdg.methods.get("fdg").arguments(3, schedule=schedule)
    assert arguments["schedule"].staleness == (3, 1, 0)


def test_an_open_shrink_may_be_a_schedule():
    beta = optax.linear_schedule(0.2, 1.0, 10)
    assert fdg.methods.get("fdg").arguments(2, shrink=beta)["shrink"] is beta


# --- ADL's level of staleness, measured --------------------------------------------


@pytest.mark.parametrize("mode", ["reference", "paper"])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4])
def test_updates_between_forward_and_use_are_those_of_adl(
    mode, accumulation, monkeypatch
):
    """floor(n / M) - floor(max(0, n - s) / M) for batch n, read off the optimizer."""
    seen = []

    def forward(stage, state, activation, call=Stage.forward):
        seen.append(("forward", stage.index, _updates(state)))
        return call(stage, state, activation)

    def backward(stage, state, *arguments, call=Stage.backward):
        seen.append(("backward", stage.index, _updates(state)))
        return call(stage, state, *arguments)

    def _updates(state):
        counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
        return int(counts[-1][1])

    monkeypatch.setattr(Stage, "forward", forward)
    monkeypatch.setattr(Stage, "backward", backward)
    arguments = fdg.methods.get("adl").arguments(
        3, schedule=mode, accumulation=accumulation
    )
    pipeline = fdg.Pipeline(
        [nnx.Linear(6, 6, rngs=nnx.Rngs(i), dtype=np.float64) for i in range(3)],
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.sgd(optax.constant_schedule(0.1)),
        cuts=(1, 2),
        engine="serial",
        **arguments,
    )
    with pipeline:
        list(pipeline.train(oracle.make_batches(13)))
    for k, late in enumerate(arguments["schedule"].staleness[:-1]):
        at_forward, at_use = (
            [count for kind, stage, count in seen if (kind, stage) == (wanted, k)]
            for wanted in ("forward", "backward")
        )
        n = np.arange(13)
        expected = n // accumulation - np.maximum(0, n - late) // accumulation
        np.testing.assert_array_equal(np.subtract(at_use, at_forward), expected)


def test_the_authors_sum_is_the_mean_with_another_rate_and_decay():
    """Their program adds M gradients up: M times the rate, 1/M of the decay."""
    batches, accumulation = oracle.make_batches(14), 4
    pipeline = fdg.Pipeline(
        oracle.make_network(),
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optax.chain(
            optax.add_decayed_weights(method_oracles.WEIGHT_DECAY / accumulation),
            optax.sgd(
                method_oracles.LEARNING_RATE * accumulation,
                momentum=method_oracles.MOMENTUM,
            ),
        ),
        cuts=(1, 3),
        engine="serial",
        seed=method_oracles.SEED,
        **fdg.methods.get("adl").arguments(3, accumulation=accumulation),
    )
    with pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(batches)]
    expected = method_oracles.adl(
        oracle.make_network(),
        batches,
        (1, 3),
        accumulation,
        combine=method_oracles.total,
    )
    assert losses == pytest.approx(expected[0], rel=1e-10)
    assert oracle.relative_error(oracle.values(pipeline.network), expected[1]) < 1e-10


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("ddgs", "ddg"), ("GPipe", "gpipe"), ("pipedreem", "pipedream")],
)
def test_an_unknown_method_is_answered_with_the_nearest(name, nearest):
    message = refusal(fdg.methods.get, name)
    assert message.endswith(f"got {name!r}; did you mean {nearest!r}?") or (
        f"got {name!r}; did you mean {nearest!r}" in message
    )
    assert all(known in message for known in NAMES)


def closed_values():
    values = {"schedule": "paper", "backward": "replay", "accumulation": 2}
    for name, method in fdg.methods.METHODS.items():
        for argument, value in {**values, "shrink": 0.5}.items():
            own = getattr(method, argument, 1.0)
            if argument not in method.leaves_open and value != own:
                yield name, argument, value


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_sets_may_be_said(name):
    method = fdg.methods.get(name)
    said = {"backward": method.backward, "accumulation": method.accumulation}
    if isinstance(method.schedule, str):
        said["schedule"] = method.schedule
    for shrink in (1, 1.0, np.float32(1.0)):
        got = method.arguments(2, **said, shrink=shrink)
        assert got == method.arguments(2)


@pytest.mark.parametrize(("name", "argument", "value"), list(closed_values()))
def test_what_a_method_sets_cannot_be_changed(name, argument, value):
    message = refusal(fdg.methods.get(name).arguments, 2, **{argument: value})
    assert f"method {name!r} sets {argument} itself; got {value!r}" in message
    assert "leave it at" in message and "'fdg'" in message


def test_everything_is_closed_somewhere_and_open_in_fdg():
    assert len(list(closed_values())) > 20
    values = {"schedule": "paper", "backward": "replay", "accumulation": 2}
    arguments = fdg.methods.get("fdg").arguments(2, **values, shrink=0.5)
    assert (arguments["backward"], arguments["accumulation"]) == ("replay", 2)


def config(**changes):
    config = ml_collections.ConfigDict(digits.get_config())
    config.update(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"method": "gpipe", "batch_size": 66}, 4),
        ({"method": "adl", "accumulation": 5}, 5),
        ({"method": "dp", "num_stages": 3}, 3),
        # A piece of 3 images cannot be shared out, though 12 divides by 4 and by 2.
        ({"method": "dp", "accumulation": 4, "batch_size": 12}, 8),
    ],
)
def test_a_batch_must_fall_into_equal_parts(changes, parts):
    wanted = config(**changes)
    message = refusal(from_config.method_arguments, wanted)
    assert f"method {wanted.method!r} cuts a batch into {parts} equal parts" in message
    assert f"got batch_size={wanted.batch_size}" in message


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_all_methods_make_as_many_updates_in_an_epoch(dataset):
    given = {"dataset": dataset, "batch_size": 60}
    configs = [config(method=name, **given) for name in NAMES]
    updates = data.spec(dataset).num_train // 60
    for c in configs:
        assert from_config.updates_per_epoch(c) == updates
        assert from_config.images_per_epoch(c) == updates * 60
        pieces = from_config.method_arguments(c)["accumulation"]
        assert from_config.steps_per_epoch(c) == updates * pieces


@pytest.mark.parametrize("accumulation", [-1, -4])
def test_accumulation_must_be_positive(accumulation):
    message = refusal(fdg.methods.get("gpipe").arguments, 2, accumulation=accumulation)
    assert "accumulation must be at least 1, or 0 for the method's own; got " in message
    assert f"got {accumulation}" in message
    assert "at least 1; got 0" in refusal(make_pipeline, num_stages=2, accumulation=0)


def test_the_fused_engine_refuses_to_drain():
    arguments = fdg.methods.get("gpipe").arguments(2)
    message = refusal(make_pipeline, engine="fused", **arguments)
    assert "never drains" in message and "gpipe (s = 3, 0; drained every 4)" in message
    assert "engine='serial'" in message


def test_no_piece_of_a_drained_window_may_be_left_out():
    """The stage's update would then fall into the next window, as would all others."""
    arguments = fdg.methods.get("gpipe").arguments(2)
    message = refusal(make_pipeline, skip_nonfinite=2, **arguments)
    assert "got skip_nonfinite=2; use 0, or schedule 'bp'" in message
    make_pipeline(skip_nonfinite=2, **fdg.methods.get("bp").arguments(2))


def test_replicas_are_for_one_stage_on_as_many_devices():
    message = refusal(make_pipeline, num_stages=2, replicas=2)
    assert "replicas=2 with num_stages=2" in message and "num_stages=1" in message
    message = refusal(make_pipeline, cuts=(), **fdg.methods.get("dp").arguments(5))
    assert "replicas=5 with num_stages=1 and 4 device(s)" in message
    refusal(make_pipeline, cuts=(), **fdg.methods.get("dp").arguments(0))


def test_replicas_share_out_equally():
    pipeline = make_pipeline(cuts=(), **fdg.methods.get("dp").arguments(3))
    message = refusal(list, pipeline.train(oracle.make_batches(1, batch_size=8)))
    assert "3 replicas share out a batch equally; got one of 8" in message


def test_stages_with_their_own_loss_have_nothing_to_shrink():
    head = fdg.methods.get("dgl").local_head
    given = {"num_stages": 2, "local_head": head, "schedule": "bp"}
    assert "got shrink=0.5; leave it at 1.0" in refusal(
        make_pipeline, **given, shrink=0.5
    )
    beta = optax.constant_schedule(1.0)
    assert "leave it at 1.0" in refusal(make_pipeline, **given, shrink=beta)


def test_stages_with_their_own_loss_have_no_staleness():
    head = fdg.methods.get("dgl").local_head
    message = refusal(make_pipeline, num_stages=2, local_head=head, schedule="minimal")
    assert "schedule is 'bp'; got minimal (s = 1, 0)" in message


def test_the_head_of_dgl_wants_images():
    pipeline = make_pipeline(**fdg.methods.get("dgl").arguments(2))
    message = refusal(pipeline.build, oracle.make_batches(1)[0])
    assert "images [batch, height, width, channels]" in message
    assert "got (8, 6) and (8, 3)" in message and "local_head of your own" in message


def _fails(width):
    return lambda x, outputs, rngs: nnx.Linear(width, 3, rngs=rngs, dtype=np.float64)


def test_a_head_that_does_not_take_its_stages_output_is_refused():
    pipeline = make_pipeline(num_stages=2, schedule="bp", local_head=_fails(9))
    message = refusal(pipeline.build, oracle.make_batches(1)[0])
    assert "local head" in message and "float64[8,6]" in message
    assert "must take what its stage gives" in message


def test_a_head_whose_output_does_not_suit_the_loss_is_refused():
    def local_head(x, outputs, rngs):
        return nnx.LinearGeneral(6, (3, 3), rngs=rngs, dtype=np.float64)

    pipeline = make_pipeline(num_stages=2, schedule="bp", local_head=local_head)
    assert "loss_fn" in refusal(pipeline.build, oracle.make_batches(1)[0])


def test_a_head_that_is_no_module_is_refused():
    pipeline = make_pipeline(
        num_stages=2, schedule="bp", local_head=lambda *arguments: len
    )
    assert "nnx.Module" in refusal(pipeline.build, oracle.make_batches(1)[0])


# --- the hot loop ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dgl", "gpipe", "adl", "dp"])
@pytest.mark.parametrize(
    "engine", [pytest.param("serial", marks=pytest.mark.slow), "threads"]
)
def test_the_hot_loop_copies_nothing_implicitly(name, engine):
    images = name == "dgl"
    make_batches = method_oracles.make_image_batches if images else oracle.make_batches
    make_network = method_oracles.make_image_network if images else oracle.make_network
    network, batches = make_network(num_blocks=2), make_batches(8)
    arguments = fdg.methods.get(name).arguments(2)
    cuts = (1,) if arguments["num_stages"] == 2 else ()
    pipeline = make_pipeline(network, cuts, engine, **arguments)
    pipeline.build(batches[0])
    places = {"image": pipeline.stages[0].device, "label": pipeline.stages[-1].device}
    batches = [
        {name: jax.device_put(value, places[name]) for name, value in batch.items()}
        for batch in batches
    ]
    with pipeline:
        list(pipeline.train(batches))
        pipeline.evaluate(batches)
        # For all threads, unlike the context manager.
        jax.config.update("jax_transfer_guard", "disallow")
        try:
            list(pipeline.train(batches))
            pipeline.evaluate(batches)
        finally:
            jax.config.update("jax_transfer_guard", "allow")
