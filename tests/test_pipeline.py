"""The pipeline as its user meets it."""

import functools
import re
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_threads
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from fdg_jax.stage import Stage

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BATCHES = oracle.make_batches(12)
ENGINES = ["serial", "threads", "fused"]


def make_pipeline(network=None, **options):
    options = {
        "loss_fn": fdg.softmax_cross_entropy,
        "optimizer": optax.sgd(0.1, momentum=0.9),
        "num_stages": 3,
        "cuts": (1, 3),
        "engine": "serial",
        **options,
    }
    if options["num_stages"] == 1:
        options["cuts"] = ()
    return fdg.Pipeline(network or oracle.make_network(), **options)


def train(batches=BATCHES, **options):
    with make_pipeline(**options) as pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(batches)]
    return losses, oracle.values(pipeline.network)


def train_whole(network, batches, optimizer):
    """Plain jax.value_and_grad and Optax on the whole network."""
    whole = nnx.Sequential(*network)
    whole.train()
    graphdef, params, rest = nnx.split(whole, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state, rest, batch):
        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            loss = oracle.cross_entropy(model(batch["image"]), batch["label"])
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, rest, loss

    opt_state, losses = optimizer.init(params), []
    for batch in batches:
        params, opt_state, rest, loss = step(params, opt_state, rest, batch)
        losses.append(float(loss))
    whole = nnx.merge(graphdef, params, rest)
    return losses, oracle.values(whole.layers)


OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)),
    "adam": optax.adam(optax.linear_schedule(1e-2, 1e-3, 10)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_bp_equals_plain_training(engine, optimizer, num_stages):
    optimizer = OPTIMIZERS[optimizer]
    network = oracle.make_network(rate=0.0)
    expected_losses, expected = train_whole(network, BATCHES, optimizer)
    losses, values = train(
        network=oracle.make_network(rate=0.0),
        optimizer=optimizer,
        num_stages=num_stages,
        schedule="bp",
        engine=engine,
    )
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    assert oracle.relative_error(values, expected) < 1e-10


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_initial_parameters_do_not_depend_on_the_cuts(num_stages):
    network = fdg.models.create("resnet8", in_channels=1, seed=3)
    pipeline = make_pipeline(
        network=network, num_stages=num_stages, cuts=tuple(range(1, num_stages))
    )
    images, labels = np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.int32)
    pipeline.build({"image": images, "label": labels})
    jax.tree.map(
        np.testing.assert_array_equal,
        oracle.values(pipeline.network),
        oracle.values(network),
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_does_not_depend_on_the_cuts(engine):
    one, _ = train(num_stages=1, schedule="bp")
    other, _ = train(num_stages=3, schedule="bp", engine=engine)
    assert one == pytest.approx(other, rel=1e-10)
    seeded, _ = train(num_stages=1, schedule="bp", seed=1)
    assert seeded[0] != one[0]  # so there was something random to agree on


@pytest.mark.slow
def test_stacked_blocks_train_like_single_ones(monkeypatch):
    single = train(num_stages=2, cuts=(4,), schedule="paper")
    monkeypatch.setattr("fdg_jax.blocks.SCAN_MIN_LENGTH", 2)
    pipeline = make_pipeline(num_stages=2, cuts=(4,))
    pipeline.build(BATCHES[0])
    assert [run.length for run in pipeline.stages[0].runs] == [4]
    for backward in ("stored", "recompute"):
        for engine in ("serial", "fused"):
            stacked = train(
                num_stages=2,
                cuts=(4,),
                schedule="paper",
                backward=backward,
                engine=engine,
            )
            assert stacked[0] == pytest.approx(single[0], rel=1e-10)
            assert oracle.relative_error(stacked[1], single[1]) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_training_may_pause_for_evaluation_and_for_a_look_at_the_network(engine):
    straight = train(engine=engine)
    with make_pipeline(engine=engine) as pipeline:
        losses = [m["loss"] for m in pipeline.train(BATCHES[:5])]
        assert 0 <= pipeline.evaluate(BATCHES[:2]) <= 1
        assert len(pipeline.network) == 5
        losses += [m["loss"] for m in pipeline.train(BATCHES[5:])]
    assert losses == straight[0]
    values = oracle.values(pipeline.network)
    jax.tree.map(np.testing.assert_array_equal, values, straight[1])


def test_a_drained_pipeline_goes_on():
    pipeline = make_pipeline(schedule="bp")
    with pipeline:
        losses = [m["loss"] for m in pipeline.train(BATCHES[:5])]
    with pipeline:
        losses += [m["loss"] for m in pipeline.train(BATCHES[5:])]
    assert losses == train(schedule="bp")[0]  # dropout keys go on counting, too


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_counts_every_example_once(engine):
    ragged = [*oracle.make_batches(3), *oracle.make_batches(1, batch_size=5, seed=1)]
    with make_pipeline(engine=engine) as pipeline:
        metrics = pipeline.evaluate_metrics(ragged)
        network = pipeline.network
    network.eval()
    images = np.concatenate([b["image"] for b in ragged])
    labels = np.concatenate([b["label"] for b in ragged])
    outputs = network(images)
    loss = float(oracle.cross_entropy(outputs, labels))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-10)
    accuracy = float((outputs.argmax(-1) == labels).mean())
    assert metrics["accuracy"] == pytest.approx(accuracy)


def test_metrics_come_lazily_and_in_order():
    drawn = []

    def endless():
        while True:
            drawn.append(len(drawn))
            yield BATCHES[drawn[-1] % len(BATCHES)]

    with make_pipeline(engine="threads", schedule="minimal") as pipeline:
        metrics = pipeline.train(endless())
        assert drawn == []
        losses = [next(metrics)["loss"] for _ in range(12)]
        assert len(drawn) < 12 + 15
        metrics.close()
    assert losses == train(schedule="minimal")[0]


def test_two_pipelines_work_side_by_side():
    with make_pipeline(engine="threads") as one, make_pipeline(engine="threads") as two:
        pairs = list(zip(one.train(BATCHES), two.train(BATCHES), strict=True))
    assert [a for a, _ in pairs] == [b for _, b in pairs]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_hot_loop_copies_nothing_implicitly(engine):
    pipeline = make_pipeline(engine=engine)
    first, last = jax.devices()[0], jax.devices()[0 if engine == "fused" else 2]
    batches = [
        {
            "image": jax.device_put(b["image"], first),
            "label": jax.device_put(b["label"], last),
        }
        for b in BATCHES
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


def test_buffers_are_given_up_where_nothing_needs_them():
    with make_pipeline(num_stages=2, cuts=(2,), schedule="minimal") as pipeline:
        list(pipeline.train(BATCHES[:1]))
        states = [p.state for p in pipeline._engine._wiring.programs]
        list(pipeline.train(BATCHES[1:3]))

    def deleted(tree):
        return [a.is_deleted() for a in jax.tree.leaves(tree)]

    upper, lower = states
    assert all(deleted(upper.opt_state))
    assert not any(deleted(upper.params))  # the stash may hold them
    assert all(deleted((lower.params, lower.opt_state)))


def test_the_users_network_is_left_as_it_is():
    network = oracle.make_network()
    before = jax.tree.map(np.array, oracle.values(network))
    train(network=network, schedule="bp")
    jax.tree.map(np.testing.assert_array_equal, oracle.values(network), before)


@pytest.mark.slow
def test_bfloat16_works_end_to_end():
    network = fdg.models.create("resnet8", in_channels=1, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(8, 8, 8, 1)).astype(jnp.bfloat16),
        "label": np.arange(8, dtype=np.int32),
    }
    for engine in ENGINES:
        with make_pipeline(network=network, engine=engine) as pipeline:
            losses = [m["loss"] for m in pipeline.train([batch] * 10)]
        assert losses[-1] < losses[0]
        params, _ = oracle.values(pipeline.network)
        assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}


class NanBlock(nnx.Module):
    """Passes its input on, until an element is large."""

    def __call__(self, x):
        return jnp.where(jnp.abs(x).max() > 50.0, jnp.nan, x)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_names_batch_and_stage(engine):
    blocks = oracle.make_network()
    network = [blocks[0], NanBlock(), *blocks[1:]]
    batches = [dict(b) for b in BATCHES]
    batches[6]["image"] = batches[6]["image"] * 1000.0
    pipeline = make_pipeline(network=network, cuts=(1, 3), engine=engine)
    with pytest.raises(fdg.NonFiniteLossError, match="batch 6 is nan.* stage 1") as e:
        with pipeline:
            list(pipeline.train(batches))
    assert (e.value.batch, e.value.stage) == (6, 1)
    assert not own_threads.left()
    assert pipeline.batches_applied == [6, 6, 6]


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_stops_the_run_at_the_last_stage(label):
    batches = [dict(b) for b in BATCHES]
    batches[3]["label"] = np.full(8, label, np.int32)
    with pytest.raises(fdg.NonFiniteLossError, match="labels are in range") as e:
        train(batches=batches)
    assert (e.value.batch, e.value.stage) == (3, 2)


def test_an_error_inside_a_stage_reaches_the_caller_with_its_place(monkeypatch):
    def broken(stage, state, entry, cotangent, original=Stage.backward):
        if stage.index == 1 and int(state.batch.number) == 6:
            raise OSError("broken on purpose")
        return original(stage, state, entry, cotangent)

    monkeypatch.setattr(Stage, "backward", broken)
    pipeline = make_pipeline(engine="threads", schedule=(4, 2, 0))
    with pytest.raises(OSError, match="broken on purpose") as caught, pipeline:
        list(pipeline.train(BATCHES))
    # Six forwards are done when the gradient of batch 5 - 2 is used.
    assert "raised in stage 1, batch 3" in caught.value.__notes__
    assert not own_threads.left()


INVALID = {
    "engine": ("thread", "engine must be one of .*'thread'; did you mean 'threads'"),
    "schedule": ("referense", "schedule must be one of .*did you mean 'reference'"),
    "backward": ("store", "backward must be one of stored, recompute, replay"),
    "shrink": (1.5, r"shrink \(beta\) must be a number in \(0, 1\]; got 1.5"),
    "cuts": ((3, 1), "cuts must increase"),
    "num_stages": (6, "use at most 5 stages"),
    "channel_capacity": (0, "channel_capacity must be at least 1"),
    "devices": ((), "at least one device"),
    "network": (nnx.Sequential(), "a network is a sequence of nnx.Modules"),
    "optimizer": ("sgd", "an optimizer is an Optax transform.*got 'sgd'"),
}


@pytest.mark.parametrize("argument", INVALID)
def test_a_wrong_argument_is_one_clear_error(argument):
    value, message = INVALID[argument]
    with pytest.raises(ValueError, match=message):
        make_pipeline(**{argument: value})


def test_a_function_that_makes_no_optimizer_is_refused():
    with pytest.raises(ValueError, match="function from StageInfo to one; got 0.1"):
        make_pipeline(optimizer=lambda stage: 0.1)


REFUSED_OPTIMIZERS = {
    "uncalled": (optax.adam, r"the function adam itself; call it, as in optax.adam"),
    "partly called": (functools.partial(optax.adam, b1=0.8), "the function adam"),
    "contributed": (optax.contrib.muon, "the function muon itself"),
    "several steps": (optax.MultiSteps(optax.sgd(0.1), 4), r"Pipeline\(accumulation=M"),
    "plateau": (
        optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        "that of stage 0 failed.*value.*use a schedule",
    ),
    "polyak": (optax.polyak_sgd(), "of gradients and parameters.*polyak_sgd"),
    "lbfgs": (optax.lbfgs(), "of gradients and parameters.*lbfgs"),
    "a foreign factory": (lambda rate: optax.sgd(rate), "that of stage 0 failed"),
    "a stage's": (
        lambda stage: optax.lbfgs() if stage.index == 1 else optax.sgd(0.1),
        "that of stage 1 failed",
    ),
}


@pytest.mark.parametrize("name", REFUSED_OPTIMIZERS)
@pytest.mark.parametrize("cuts", [(1, 3), "balanced"])
def test_an_optimizer_that_would_fail_is_refused_at_construction(name, cuts):
    optimizer, message = REFUSED_OPTIMIZERS[name]
    with pytest.raises(ValueError, match=message):
        make_pipeline(optimizer=optimizer, cuts=cuts)


@pytest.mark.parametrize(
    "name", ["optimizer", "schedule", "engine", "stages", "shrink"]
)
def test_assignments_which_would_change_nothing_are_refused(name):
    pipeline = make_pipeline()
    with pytest.raises(AttributeError, match=f"fixed when it is made.*{name!r}"):
        setattr(pipeline, name, None)


def test_an_optimizer_sees_blocks_by_their_position_whatever_the_cuts():
    def paths(num_stages, cuts):
        seen = set()

        def see(path, leaf):
            seen.add((jax.tree_util.keystr(path), leaf.shape))
            return leaf

        def init(params):
            jax.tree_util.tree_map_with_path(see, params)
            return optax.EmptyState()

        watching = optax.GradientTransformation(init, lambda g, s, p: (g, s))
        with make_pipeline(
            optimizer=watching, num_stages=num_stages, cuts=cuts
        ) as pipeline:
            list(pipeline.train(BATCHES[:1]))
        return seen

    whole = paths(1, ())
    assert ("[3]['linear']['kernel']", (6, 6)) in whole
    assert paths(3, (1, 3)) == paths(2, (4,)) == whole


@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_says_which_batches_it_is_of(engine):
    with make_pipeline(engine=engine) as pipeline:
        for metrics in pipeline.train(BATCHES):
            if metrics["batch"] == 4:
                evaluated = pipeline.evaluate_metrics(BATCHES[:1])
                # Some batches are drawn ahead of the metrics that come out.
                assert evaluated["batch"] == pipeline.num_batches > 4
        assert pipeline.num_batches == 12
        assert pipeline.evaluate_metrics(BATCHES[:1])["batch"] == 12


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "a batch is a dict"),
        ({"image": np.zeros((2, 6)), "label": [0, 1]}, "NumPy or JAX arrays"),
        ({"image": np.zeros((2, 6))}, r"got \['image'\]"),
        ({"image": np.zeros((2, 6)), "label": np.zeros(3, int)}, "same, non-empty"),
        ({"image": np.zeros((0, 6)), "label": np.zeros(0, int)}, "same, non-empty"),
        (
            {"image": np.zeros((2, 7)), "label": np.zeros(2, int)},
            r"block 0 \(BatchNormBlock\) must take what the images give.*\[2,7\]",
        ),
        (
            {"image": np.zeros((2, 6)), "label": np.zeros((2, 9))},
            "loss_fn must take the network's outputs",
        ),
    ],
)
def test_a_wrong_batch_is_one_clear_error(batch, message):
    with pytest.raises(ValueError, match=message):
        next(make_pipeline().train([batch]))


def test_a_later_batch_that_does_not_fit_is_as_clear():
    batches = [*BATCHES[:3], *oracle.make_batches(1, width=7)]
    with pytest.raises(ValueError, match=r"block 0 .* the images give, float64\[8,7\]"):
        train(batches=batches)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_may_be_filled_anew_by_its_owner(engine):
    def refilled():
        # JAX shares memory that lies on 64 bytes, unless it is told not to.
        room = np.zeros(8 * 6 * 8 + 64, np.uint8)
        start = -room.ctypes.data % 64
        image = room[start : start + 8 * 6 * 8].view(np.float64).reshape(8, 6)
        label = np.zeros(8, np.int32)
        for batch in BATCHES:
            image[:], label[:] = batch["image"], batch["label"]
            yield {"image": image, "label": label}

    assert train(batches=refilled(), engine=engine)[0] == train(engine=engine)[0]


def test_labels_may_be_a_pytree():
    def loss_fn(outputs, label):
        return oracle.cross_entropy(outputs, label["class"]) * label["weight"].mean()

    def weighted(batch):
        label = {"class": batch["label"], "weight": np.ones(8)}
        return {"image": batch["image"], "label": label}

    with make_pipeline(loss_fn=loss_fn) as pipeline:
        losses = [m["loss"] for m in pipeline.train(map(weighted, BATCHES))]
        metrics = pipeline.evaluate_metrics(map(weighted, BATCHES))
    assert losses == pytest.approx(train()[0], rel=1e-10)
    assert metrics.keys() == {"loss", "batch"}


def test_an_idle_pipeline_holds_no_activation():
    width = 257  # of no other array's size
    blocks = [
        nnx.Linear(6, width, rngs=nnx.Rngs(0)),
        nnx.Linear(width, 3, rngs=nnx.Rngs(1)),
    ]
    pipeline = make_pipeline(
        blocks, num_stages=2, cuts=(1,), schedule="bp", engine="threads"
    )
    with pipeline:
        list(pipeline.train(BATCHES[:4]))
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:  # the last update may be under way
            held = sum(a.shape == (8, width) for a in jax.live_arrays())
            if not held:
                break
            time.sleep(0.01)
        assert not held


def test_a_very_deep_network_is_scanned():
    network = fdg.models.create("resnet236", in_channels=1)  # 39 blocks of each width
    batch = {"image": np.ones((2, 8, 8, 1), np.float32), "label": np.zeros(2, np.int32)}
    pipeline = make_pipeline(network=network, num_stages=2, cuts=(60,))
    pipeline.build(batch)
    lengths = [run.length for stage in pipeline.stages for run in stage.runs]
    assert sum(lengths) == 119 and len(lengths) < 60


@pytest.mark.slow
def test_resnet1202_takes_a_step():
    network = fdg.models.create("resnet1202")
    batch = {
        "image": np.ones((2, 32, 32, 3), np.float32),
        "label": np.zeros(2, np.int32),
    }
    pipeline = make_pipeline(
        network=network, num_stages=4, cuts="paper", engine="threads"
    )
    with pipeline:
        (metrics,) = pipeline.train([batch])
    assert metrics["loss"] > 0


def test_blocks_that_do_not_fit_are_both_named():
    blocks = oracle.make_network()
    misfit = nnx.Linear(7, 6, rngs=nnx.Rngs(0))
    network = [*blocks[:2], misfit, *blocks[2:]]
    message = r"block 2 \(Linear\) .* block 1 \(BatchNormBlock\) gives, float64\[8,6\]"
    with pytest.raises(ValueError, match=message):
        train(network=network)


def test_a_loss_must_be_scalar():
    with pytest.raises(ValueError, match=r"scalar mean.*\[8\]"):
        train(loss_fn=lambda outputs, label: outputs.sum(-1))


def test_stages_share_devices_with_a_warning():
    devices = jax.devices()[:2]
    with pytest.warns(UserWarning, match=r"3 stages share 2 device\(s\).*no speed-up"):
        pipeline = make_pipeline(engine="threads", devices=devices)
    pipeline.build(BATCHES[0])
    assert [s.device for s in pipeline.stages] == [devices[0], devices[0], devices[1]]


def test_auto_takes_threads_where_there_are_devices_enough():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_pipeline(engine="auto").engine == "threads"
    with pytest.warns(UserWarning, match="fused engine"):
        pipeline = make_pipeline(engine="auto", devices=jax.devices()[:2])
    assert pipeline.engine == "fused"


def test_balanced_cuts_are_measured_and_shown():
    pipeline = make_pipeline(cuts="balanced")
    began = time.monotonic()
    pipeline.build(BATCHES[0])
    elapsed = time.monotonic() - began
    header, *rows, tick = pipeline.summary().splitlines()
    assert "predicted" in header
    stages = [float(re.search(r"([\d.]+) ms", row)[1]) for row in rows]
    assert len(stages) == 3 and min(stages) > 0
    # A device for each stage, staleness enough: the costliest stage sets the pace.
    tick, seconds = re.fullmatch(r"(.*); balancing took ([\d.]+) s", tick).groups()
    assert tick == f"predicted tick {max(stages):.1f} ms"
    assert 0 < float(seconds) <= elapsed + 0.05
    assert pipeline.predicted_tick == pytest.approx(max(stages) / 1e3, abs=1e-4)
    assert sum(len(stage.blocks) for stage in pipeline.stages) == 5


def test_nothing_is_predicted_or_logged_where_nothing_was_measured(caplog):
    pipeline = make_pipeline(cuts=(1, 3))
    pipeline.build(BATCHES[0])
    assert pipeline.predicted_tick is None
    assert len(pipeline.summary().splitlines()) == 4
    assert caplog.records == []


class Embed(nnx.Module):
    """Tokens to an activation and positions, integers that no gradient is of."""

    def __init__(self):
        self.table = nnx.Param(jnp.linspace(-1.0, 1.0, 9 * 6).reshape(9, 6))

    def __call__(self, tokens):
        return [self.table[...][tokens], jnp.argsort(tokens)]


class Carry(nnx.Module):
    """Uses the positions, and passes them on, or None in their place."""

    def __init__(self, passes_on):
        self.passes_on = passes_on
        self.linear = nnx.Linear(6, 6, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def __call__(self, inputs):
        x, positions = inputs
        x = x + jnp.tanh(self.linear(x[positions]))
        return [x, positions if self.passes_on else None]


class Merge(nnx.Module):
    """Takes both, and gives a single array."""

    def __call__(self, inputs):
        return jnp.sin(inputs[0])


TOKENS = [
    {"image": np.random.default_rng(i).integers(0, 9, 8), "label": batch["label"]}
    for i, batch in enumerate(BATCHES)
]


def make_token_network(rate=0.25):
    """Blocks 0 to 7, of which stages may begin with those from 4 on."""
    carries = [Carry(True), Carry(True), Carry(False)]
    return [Embed(), *carries, Merge(), *oracle.make_network(3, rate=rate)]


@pytest.mark.parametrize("engine", ENGINES)
def test_balanced_cuts_are_where_cuts_are_possible(engine):
    options = {"num_stages": 3, "engine": engine}
    pipeline = make_pipeline(make_token_network(), cuts="balanced", **options)
    pipeline.build(jax.eval_shape(lambda: TOKENS[0]))
    cuts = tuple(stage.blocks.start for stage in pipeline.stages[1:])
    assert {4, 5, 6, 7} > set(cuts)
    with pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(TOKENS)]
    again = train(network=make_token_network(), batches=TOKENS, cuts=cuts, **options)
    assert losses == again[0] and len(set(losses)) == len(losses)
    values = oracle.values(pipeline.network)
    jax.tree.map(np.testing.assert_array_equal, values, again[1])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backward", ["stored", "recompute"])
def test_none_may_cross_a_cut(engine, backward):
    optimizer = OPTIMIZERS["sgd"]
    expected_losses, expected = train_whole(make_token_network(0.0), TOKENS, optimizer)
    losses, values = train(
        network=make_token_network(0.0),
        batches=TOKENS,
        optimizer=optimizer,
        cuts=(4, 6),
        schedule="bp",
        engine=engine,
        backward=backward,
    )
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    assert oracle.relative_error(values, expected) < 1e-10


@pytest.mark.parametrize("cuts", ["balanced", ()])
def test_one_stage_may_hold_any_arrays(cuts):
    pipeline = make_pipeline(make_token_network(), num_stages=1, cuts=cuts)
    with pipeline:
        assert len(list(pipeline.train(TOKENS[:2]))) == 2


@pytest.fixture
def never_timed(monkeypatch):
    def fail(*args, **options):
        raise AssertionError("timed")

    monkeypatch.setattr("fdg_jax.costs.measure", fail)
    monkeypatch.setattr("fdg_jax.costs.time_stages", fail)


@pytest.mark.parametrize("cuts", ["balanced", (1, 2, 4)])
def test_too_few_possible_cuts_are_told_with_what_is_in_their_way(
    never_timed, caplog, cuts
):
    network = make_token_network()[:5] + oracle.make_network(1)
    pipeline = make_pipeline(network, cuts=cuts, num_stages=4)
    with pytest.raises(ValueError) as refused:
        pipeline.build(TOKENS[0])
    assert str(refused.value) == (
        "what crosses a cut must be floating-point arrays, since their gradient comes "
        "back; num_stages=4 needs 3 positions where it is, and this network has 2 "
        "(4-5): block 0 (Embed) to block 2 (Carry) give int64[8]; use at most 3 "
        "stage(s), or compute integers and booleans in the blocks that need them"
    )
    assert caplog.records == []


class Silent(nnx.Module):
    """Gives no array at all."""

    def __call__(self, x):
        return [None]


class Constant(nnx.Module):
    """Needs none."""

    def __call__(self, x):
        return jnp.ones((8, 3))


def test_a_network_that_cannot_be_cut_says_what_each_block_gives(never_timed):
    network = [Embed(), Silent(), Constant()]
    pipeline = make_pipeline(network, cuts="balanced", num_stages=2)
    told = "has 0: block 0 (Embed) gives int64[8], block 1 (Silent) gives no arrays; "
    with pytest.raises(ValueError, match=re.escape(told)):
        pipeline.build(TOKENS[0])


@pytest.mark.parametrize(
    ("cuts", "moved"),
    [((2, 4), "the cut at 2 to 5, or"), ((1, 3), "the cut at 1 to 4")],
)
def test_an_impossible_cut_is_told_where_it_may_be(cuts, moved):
    # A head is not asked of what cannot cross, which would be another error.
    options = {"schedule": "bp", "local_head": lambda *args: pytest.fail("asked")}
    pipeline = make_pipeline(make_token_network(), cuts=cuts, **options)
    with pytest.raises(ValueError, match="floating-point arrays") as refused:
        pipeline.build(TOKENS[0])
    given = f"block {cuts[0] - 1} (Carry) gives float64[8,6], int64[8]"
    given = given.replace("block 0 (Carry)", "block 0 (Embed)")
    assert f"; {given}; move {moved}" in str(refused.value)


class Through(nnx.Module):
    """Passes what it does not know on."""

    def __call__(self, inputs):
        return {**inputs, "x": jnp.sin(inputs["x"])}


class Take(nnx.Module):
    """A head that takes what it needs."""

    def __init__(self):
        self.linear = nnx.Linear(6, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def __call__(self, inputs):
        return self.linear(inputs["x"])


@pytest.mark.parametrize("cuts", [(1,), "balanced"])
def test_a_later_batch_of_which_integers_would_cross_is_refused(cuts):
    def batch(dtype):
        image = {"x": np.ones((8, 6)), "weight": np.ones(8, dtype)}
        return {"image": image, "label": BATCHES[0]["label"]}

    pipeline = make_pipeline([Through(), Take()], num_stages=2, cuts=cuts)
    with pipeline:
        list(pipeline.train([batch(np.float64)]))
        with pytest.raises(ValueError, match=r"\(Through\) gives int32\[8\]"):
            list(pipeline.train([batch(np.int32)]))
        assert len(list(pipeline.train([batch(np.float64)]))) == 1  # it goes on


def test_a_process_ends_though_nobody_closed_its_pipeline():
    script = """
        import jax
        jax.config.update("jax_num_cpu_devices", 2)
        import numpy as np, optax
        from flax import nnx
        import fdg_jax as fdg
        blocks = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
        pipeline = fdg.Pipeline(
            blocks, loss_fn=fdg.softmax_cross_entropy, cuts=(1,),
            optimizer=optax.sgd(0.1), num_stages=2, engine="threads",
        )
        batch = {"image": np.ones((2, 4), np.float32), "label": np.zeros(2, np.int32)}
        print(next(pipeline.train([batch] * 9))["loss"] > 0)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")
