"""Every method, through every engine, against its paper's equation in float64."""

import functools
import itertools
import random
import time

import jax
import method_oracles
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from fdg_jax.stage import Stage

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CUTS = {1: (), 2: (2,), 3: (1, 3)}
BATCHES = oracle.make_batches(14)
IMAGES = method_oracles.make_image_batches(6)

# name: (method, values that it leaves open, simulation, its values); 14 batches are no
# multiple of 3, so the last two make no update.
VARIANTS = {
    "bp": ("bp", {}, method_oracles.bp, {}),
    "bp-accumulated": (
        "bp",
        {"accumulation": 3},
        method_oracles.bp,
        {"accumulation": 3},
    ),
    "gpipe": ("gpipe", {}, method_oracles.gpipe, {"micro_batches": 4}),
    "gpipe-recompute": (
        "gpipe",
        {"accumulation": 3, "backward": "recompute"},
        method_oracles.gpipe,
        {"micro_batches": 3},
    ),
    "pipedream": ("pipedream", {}, method_oracles.pipedream, {}),
    "ddg": ("ddg", {}, method_oracles.ddg, {}),
    "fr": ("fr", {}, method_oracles.fr, {}),
    "adl": ("adl", {}, method_oracles.adl, {"accumulation": 4}),
    "adl-paper": (
        "adl",
        {"schedule": "paper", "accumulation": 3, "shrink": 0.5},
        method_oracles.adl,
        {"accumulation": 3, "mode": "paper", "shrink": 0.5},
    ),
    "fdg": ("fdg", {"shrink": 0.5}, method_oracles.fdg, {"shrink": 0.5}),
    "fdg-paper": (
        "fdg",
        {"schedule": "paper", "shrink": 0.8},
        method_oracles.fdg,
        {"mode": "paper", "shrink": 0.8},
    ),
}


def optimizer():
    return optax.chain(
        optax.add_decayed_weights(method_oracles.WEIGHT_DECAY),
        optax.sgd(method_oracles.LEARNING_RATE, momentum=method_oracles.MOMENTUM),
    )


def make_pipeline(method, num_stages, engine, network=None, **values):
    arguments = fdg.methods.get(method).arguments(num_stages, **values)
    return fdg.Pipeline(
        oracle.make_network() if network is None else network,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optimizer(),
        cuts=CUTS[arguments["num_stages"]],
        engine=engine,
        seed=method_oracles.SEED,
        **arguments,
    )


def train(pipeline, batches=BATCHES):
    with pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(batches)]
    return losses, oracle.values(pipeline.network)


@functools.cache
def run(variant, num_stages, engine):
    method, values, *_ = VARIANTS[variant]
    return train(make_pipeline(method, num_stages, engine, **values))


@functools.cache
def expected(variant, num_stages):
    _, _, simulation, values = VARIANTS[variant]
    return simulation(oracle.make_network(), BATCHES, CUTS[num_stages], **values)


def assert_equal(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-10)
    assert oracle.relative_error(got[1], expected[1]) < 1e-10


def assert_bitwise(got, expected):
    assert got[0] == expected[0]
    jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])


CASES = [
    pytest.param(variant, num_stages, marks=marks)
    for variant in VARIANTS
    for num_stages in (2, 3)
    # K = 3 tells the methods apart.
    for marks in [[pytest.mark.slow] if num_stages == 2 else []]
]


@pytest.mark.parametrize(("variant", "num_stages"), CASES)
def test_serial_computes_the_equation(variant, num_stages):
    assert_equal(run(variant, num_stages, "serial"), expected(variant, num_stages))


@pytest.mark.parametrize(("variant", "num_stages"), CASES)
def test_threads_compute_the_same_bits(variant, num_stages):
    assert_bitwise(
        run(variant, num_stages, "threads"), run(variant, num_stages, "serial")
    )


@pytest.mark.parametrize(
    ("variant", "num_stages"),
    [
        ("adl", 3),
        *(
            pytest.param(variant, num_stages, marks=pytest.mark.slow)
            for variant in VARIANTS
            for num_stages in (2, 3)
            if not variant.startswith("gpipe") and (variant, num_stages) != ("adl", 3)
        ),
    ],
)
def test_fused_computes_the_equation(variant, num_stages):
    assert_equal(run(variant, num_stages, "fused"), expected(variant, num_stages))


@pytest.mark.parametrize("variant", ["gpipe", "adl"])
def test_timing_changes_no_bit(variant, monkeypatch):
    """Stages that dawdle, each in its own way, compute the same."""
    random_state = random.Random(3)
    for name in ("forward", "backward", "loss_step", "update"):
        call = getattr(Stage, name)

        def dawdle(*arguments, call=call):
            time.sleep(random_state.choice((0.0, 0.0, 0.004)))
            return call(*arguments)

        monkeypatch.setattr(Stage, name, dawdle)
    method, values, *_ = VARIANTS[variant]
    slowly = train(make_pipeline(method, 3, "threads", **values))
    assert_bitwise(slowly, run(variant, 3, "serial"))


# --- what the papers say of each other ---------------------------------------------


@pytest.mark.parametrize("engine", ["serial", "threads"])
def test_ddg_and_fdg_without_shrinking_are_one_with_two_stages(engine):
    """The weight choice is the same, and ``reference`` is then DDG's delay."""
    fdg_run = train(make_pipeline("fdg", 2, engine, shrink=1.0))
    assert_bitwise(fdg_run, run("ddg", 2, engine))


@pytest.mark.parametrize("num_stages", [2, 3])
def test_pipedream_and_ddg_are_one(num_stages):
    assert_bitwise(
        run("pipedream", num_stages, "serial"), run("ddg", num_stages, "serial")
    )


def test_with_three_stages_ddg_and_fdg_differ():
    assert run("ddg", 3, "serial")[0] != train(make_pipeline("fdg", 3, "serial"))[0]


@pytest.mark.parametrize("num_stages", [2, 3])
def test_gpipe_computes_what_accumulated_back_propagation_does(num_stages):
    gpipe = train(make_pipeline("gpipe", num_stages, "threads", accumulation=3))
    assert_bitwise(gpipe, run("bp-accumulated", num_stages, "serial"))


@pytest.mark.parametrize("backward", ["recompute", "replay"])
def test_gpipe_does_not_depend_on_which_weights_the_backward_sees(backward):
    got = train(make_pipeline("gpipe", 3, "serial", backward=backward))
    assert_equal(got, expected("gpipe", 3))


# --- GPipe and whole batches -------------------------------------------------------


class Smooth(nnx.Module):
    """A block without BatchNorm and without dropout."""

    def __init__(self, seed):
        types = {"dtype": np.float64, "param_dtype": np.float64}
        self.linear = nnx.Linear(6, 6, rngs=nnx.Rngs(seed), **types)

    def __call__(self, x):
        return x + jax.numpy.tanh(self.linear(x))


def in_pieces(batches, count):
    return [
        {name: values[i::count] for name, values in batch.items()}
        for batch in batches
        for i in range(count)
    ]


def test_gpipe_without_batch_norm_is_back_propagation_on_whole_batches():
    """The gradients are exact: M micro-batches are one batch, in M pieces."""

    def network():
        return [*(Smooth(i) for i in range(4)), oracle.make_network()[-1]]

    whole = oracle.make_batches(5)
    losses, values = train(make_pipeline("bp", 3, "serial", network()), whole)
    piece_losses, piece_values = train(
        make_pipeline("gpipe", 3, "threads", network(), accumulation=4),
        in_pieces(whole, 4),
    )
    means = np.reshape(piece_losses, (5, 4)).mean(1)
    assert means == pytest.approx(losses, rel=1e-10)
    assert oracle.relative_error(piece_values[0], values[0]) < 1e-10


def test_gpipe_normalises_each_micro_batch_by_its_own_statistics():
    """So that with BatchNorm it is not back-propagation on the whole batch."""
    whole = oracle.make_batches(2)
    network = oracle.make_network(rate=0.0)
    (loss, *_), _ = train(make_pipeline("bp", 2, "serial", network), whole)
    pieces = in_pieces(whole, 2)
    piece_losses, _ = train(
        make_pipeline("gpipe", 2, "serial", network, accumulation=2), pieces
    )
    assert abs(np.mean(piece_losses[:2]) - loss) > 1e-3
    # Micro-batches see the same weights, so each alone is a first batch.
    for piece, piece_loss in zip(pieces[:2], piece_losses[:2], strict=True):
        first, _ = train(make_pipeline("bp", 2, "serial", network), [piece])
        assert piece_loss == pytest.approx(first[0], rel=1e-12)


# --- data parallelism --------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "devices"),
    [
        ("serial", 2),
        ("threads", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("serial", 4), ("threads", 4), ("fused", 2), ("fused", 4)]
        ),
    ],
)
def test_data_parallelism_averages_the_gradients_of_the_shares(engine, devices):
    # BatchNorm of too few images is ill-conditioned; so each share has 6.
    batches = oracle.make_batches(12, batch_size=6 * devices)
    got = train(make_pipeline("dp", devices, engine), batches)
    simulated = method_oracles.dp(oracle.make_network(), batches, (), devices)
    assert_equal(got, simulated)
    if engine == "threads":
        assert_bitwise(got, train(make_pipeline("dp", devices, "serial"), batches))


def test_copies_of_a_data_parallel_network_agree():
    pipeline = make_pipeline("dp", 4, "serial")
    train(pipeline)
    state = pipeline.snapshot().result().stages[0].state
    for array in jax.tree.leaves(state):
        copies = [np.asarray(shard.data) for shard in array.addressable_shards]
        assert len(copies) == 4
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])


def test_data_parallelism_on_one_device_is_back_propagation():
    got = train(make_pipeline("dp", 1, "serial"))
    assert_equal(got, expected("bp", 2))


@pytest.mark.parametrize("engine", ["serial", "fused"])
def test_a_data_parallel_network_is_evaluated_on_any_number_of_images(engine):
    """The last batch of a test set may be no multiple of the devices."""
    batches = [*oracle.make_batches(2), *oracle.make_batches(1, batch_size=5)]
    network, metrics = oracle.make_network(), []
    for method in ("dp", "bp"):
        num_stages = 2 if method == "dp" else 1
        with make_pipeline(method, num_stages, engine, network) as pipeline:
            metrics.append(pipeline.evaluate_metrics(batches))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-10)


# --- DGL ---------------------------------------------------------------------------


def _head(values):
    return values[max(values)]  # its position is behind those of all blocks


def heads_of(pipeline):
    """Parameters and statistics of the heads of a running or closed pipeline."""
    states = [taken.state for taken in pipeline.snapshot().result().stages[:-1]]
    return jax.device_get(
        ([_head(s.params) for s in states], [_head(s.batch_stats) for s in states])
    )


def run_dgl(num_stages, engine):
    network = method_oracles.make_image_network()
    pipeline = make_pipeline("dgl", num_stages, engine, network)
    pipeline.build(IMAGES[0])
    at_start = heads_of(pipeline)
    result = train(pipeline, IMAGES)
    return *result, at_start, heads_of(pipeline)


@functools.cache
def dgl_serial(num_stages):
    return run_dgl(num_stages, "serial")


@functools.cache
def simulated_dgl(num_stages):
    x = jax.ShapeDtypeStruct(IMAGES[0]["image"].shape, np.float64)
    outputs = jax.ShapeDtypeStruct((len(x.shape), 3), np.float64)
    head = fdg.methods.dgl.MlpSr(x, outputs, nnx.Rngs(0))
    *_, at_start, _ = dgl_serial(num_stages)
    return method_oracles.dgl(
        method_oracles.make_image_network(),
        IMAGES,
        CUTS[num_stages],
        [head] * (num_stages - 1),
        at_start,
    )


@pytest.mark.parametrize(
    ("engine", "num_stages"),
    [
        ("threads", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(("serial", "threads", "fused"), (2, 3))
            if case != ("threads", 2)
        ),
    ],
)
def test_dgl_is_one_gradient_of_all_local_losses(engine, num_stages):
    serial = dgl_serial(num_stages)
    got = serial if engine == "serial" else run_dgl(num_stages, engine)
    losses, values, head_values = simulated_dgl(num_stages)
    assert_equal(got[:2], (losses, values))
    assert oracle.relative_error(got[3], head_values) < 1e-10
    if engine == "threads":
        assert_bitwise(got[:2], serial[:2])
        jax.tree.map(np.testing.assert_array_equal, got[3], serial[3])


@pytest.mark.slow
def test_the_heads_of_a_network_differ_from_each_other():
    *_, (params, _), _ = dgl_serial(3)
    kernels = [np.asarray(p["logits"]["kernel"]) for p in params]
    assert not np.array_equal(*kernels)


def test_no_cotangent_crosses_a_cut_in_dgl():
    """The stages above the last learn the same, whatever the last one does."""
    results = []
    for scale in (1.0, 100.0):
        network = method_oracles.make_image_network()
        network[-1].linear.kernel[...] *= scale
        pipeline = make_pipeline("dgl", 2, "serial", network)
        _, (params, _) = train(pipeline, IMAGES[:4])
        results.append(params)
    jax.tree.map(np.testing.assert_array_equal, results[0][:2], results[1][:2])
    kernels = [params[2]["linear"]["kernel"] for params in results]
    assert not np.array_equal(*kernels)
