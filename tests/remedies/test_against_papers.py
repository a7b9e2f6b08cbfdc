"""Every remedy in a pipeline, against its paper's equation as a plain NumPy recursion.

The recursions keep two sequences where the paper has two: the weights w, and what the
forward sees of them. Nothing in them changes variables, queues or rings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from fdg_jax import remedies, schedule

pytestmark = pytest.mark.usefixtures("compiled_quickly")

RATE, MOMENTUM, DECAY = 0.2, 0.8, 1e-2
STRENGTH = {"dc_asgd": 0.7, "dc_asgd_adaptive": 0.3}
NUM_UPDATES = 9
CLIP_NORM = 0.1
WIDTH = 4
REMEDIES = [name for name in remedies.names() if name != "none"]
NUM_STAGES = 3


class Layer(nnx.Module):
    def __init__(self, kernel):
        self.kernel = nnx.Param(jnp.asarray(kernel))

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel)


def squared_error(outputs, label):
    return jnp.mean((outputs - label) ** 2)


def make_kernels(num_stages):
    rng = np.random.default_rng(1)
    return [rng.normal(size=(WIDTH, WIDTH)) for _ in range(num_stages)]


def make_batches():
    rng = np.random.default_rng(0)
    shape = (8, WIDTH)
    return [
        {
            "image": rng.normal(size=shape),
            "label": rng.uniform(-1, 1, size=shape),
        }
        for _ in range(20)
    ]


def unclipped(g):
    return g


def clipped(g):
    """As ``optax.clip_by_global_norm``, of the one array that a stage has."""
    return g * min(1.0, CLIP_NORM / np.linalg.norm(g))


def staleness_aware(w, s, clip):
    velocity = 0.0
    while True:
        g, _ = yield w
        velocity = MOMENTUM * velocity + clip(g) + DECAY * w
        w = w - RATE / (s if s > 0 else 1) * velocity


def weight_prediction(w, s, clip):
    """SpecTrain's form: along the velocity."""
    velocity = 0.0
    while True:
        g, _ = yield w - s * RATE * velocity
        velocity = MOMENTUM * velocity + clip(g) + DECAY * w
        w = w - RATE * velocity


def spike_compensation(w, s, clip):
    velocity = 0.0
    a, b = MOMENTUM**s, sum(MOMENTUM**i for i in range(s))
    while True:
        g, _ = yield w
        g = clip(g) + DECAY * w
        velocity = MOMENTUM * velocity + g
        w = w - RATE * (a * velocity + b * g)


def nesterov_lookahead(w, s, clip):
    del s
    before = w
    while True:
        ahead = w + MOMENTUM * (w - before)
        g, _ = yield ahead
        before = w
        w = ahead - RATE * (1 - MOMENTUM) * (clip(g) + DECAY * ahead)


def pipemare(w, s, clip):
    velocity, t = 0.0, 0
    while True:
        g, _ = yield w
        velocity = MOMENTUM * velocity + clip(g) + DECAY * w
        w = w - RATE / (s + 1) ** (1 - min(t / NUM_UPDATES, 1)) * velocity
        t += 1


def dc_asgd(w, s, clip):
    del s
    velocity = 0.0
    while True:
        g, w_forward = yield w
        g = g + STRENGTH["dc_asgd"] * g * g * (w - w_forward)
        velocity = MOMENTUM * velocity + clip(g) + DECAY * w
        w = w - RATE * velocity


def dc_asgd_adaptive(w, s, clip):
    del s
    velocity, mean_square = 0.0, 0.0
    while True:
        g, w_forward = yield w
        mean_square = 0.95 * mean_square + 0.05 * g * g
        strength = STRENGTH["dc_asgd_adaptive"] / np.sqrt(mean_square + 1e-7)
        g = g + strength * g * g * (w - w_forward)
        velocity = MOMENTUM * velocity + clip(g) + DECAY * w
        w = w - RATE * velocity


PAPERS = {
    "staleness_aware": staleness_aware,
    "weight_prediction": weight_prediction,
    "spike_compensation": spike_compensation,
    "nesterov_lookahead": nesterov_lookahead,
    "pipemare": pipemare,
    "dc_asgd": dc_asgd,
    "dc_asgd_adaptive": dc_asgd_adaptive,
}


def simulate(paper, batches, staleness, shrink=1.0, clip=unclipped):
    """Losses, and what the forward of the next batch would see, after the drain."""
    stages = range(len(staleness))
    papers = [
        paper(w, s, clip)
        for w, s in zip(make_kernels(len(stages)), staleness, strict=True)
    ]
    seen = [next(papers[k]) for k in stages]
    used, losses = {}, []
    inputs, cotangents = {}, {}
    for turn in range(len(batches) + staleness[0]):
        if turn < len(batches):
            x = batches[turn]["image"]
            for k in stages:
                used[k, turn], inputs[k, turn] = seen[k], x
                x = np.tanh(x @ seen[k])
                inputs[k + 1, turn] = x
            error = x - batches[turn]["label"]
            losses.append(np.mean(error**2))
            cotangents[stages[-1], turn] = 2 * error / error.size
        for k in reversed(stages):
            n = turn - staleness[k]
            if not 0 <= n < len(batches):
                continue
            w, x = used[k, n], inputs[k, n]
            inner = cotangents[k, n] * (1 - np.tanh(x @ w) ** 2)
            cotangents[k - 1, n] = shrink * inner @ w.T
            seen[k] = papers[k].send((x.T @ inner, w))
    return losses, seen


def make_pipeline(name, engine, schedule_name, shrink=1.0, clip_norm=0.0):
    return fdg.Pipeline(
        [Layer(kernel) for kernel in make_kernels(NUM_STAGES)],
        loss_fn=squared_error,
        optimizer=remedies.create(
            name,
            "sgd",
            RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            clip_norm=clip_norm,
            strength=STRENGTH.get(name),
            num_updates=NUM_UPDATES,
        ),
        num_stages=NUM_STAGES,
        cuts=tuple(range(1, NUM_STAGES)),
        schedule=schedule_name,
        shrink=shrink,
        engine=engine,
    )


def weights_of(pipeline):
    return [jax.device_get(layer.kernel[...]) for layer in pipeline.network]


@functools.cache
def train(name, engine, schedule_name, **options):
    with make_pipeline(name, engine, schedule_name, **options) as pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(make_batches())]
    return losses, weights_of(pipeline)


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize(
    ("engine", "schedule_name"), [("serial", "reference"), ("fused", "paper")]
)
def test_a_run_follows_the_equation_of_the_paper(name, engine, schedule_name):
    losses, weights = train(name, engine, schedule_name)
    staleness = schedule.resolve(schedule_name, NUM_STAGES).staleness
    expected_losses, expected = simulate(PAPERS[name], make_batches(), staleness)
    assert losses == pytest.approx(expected_losses, rel=1e-10)
    assert oracle.relative_error(weights, expected) < 1e-10


@pytest.mark.parametrize("name", REMEDIES)
def test_gradients_are_shrunk_compensated_and_clipped_in_this_order(name):
    options = {"shrink": 0.5, "clip_norm": CLIP_NORM}
    losses, weights = train(name, "serial", "reference", **options)
    short = []

    def clip(g):
        short.append(np.linalg.norm(g) <= CLIP_NORM)
        return clipped(g)

    staleness = schedule.resolve("reference", NUM_STAGES).staleness
    simulated = simulate(PAPERS[name], make_batches(), staleness, 0.5, clip)
    assert losses == pytest.approx(simulated[0], rel=1e-10)
    assert oracle.relative_error(weights, simulated[1]) < 1e-10
    # Some were clipped and others not, or the order would make no difference.
    assert 0.1 < np.mean(short) < 0.9


@pytest.mark.parametrize("name", REMEDIES)
def test_threads_and_serial_give_the_same_bits(name):
    losses, weights = train(name, "serial", "reference")
    same_losses, same = train(name, "threads", "reference")
    assert losses == same_losses
    jax.tree.map(np.testing.assert_array_equal, weights, same)


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_changes_the_run(name):
    """Else the tests above could not tell one from none."""
    _, without = train("none", "serial", "reference")
    _, with_it = train(name, "serial", "reference")
    assert oracle.relative_error(with_it, without) > 1e-3


@pytest.mark.parametrize("name", ["weight_prediction", "pipemare", "dc_asgd_adaptive"])
def test_a_run_goes_on_from_a_snapshot_as_if_nothing_had_been(name):
    """What a remedy remembers of old weights is in the snapshot."""
    batches = make_batches()
    with make_pipeline(name, "serial", "reference") as begun:
        list(begun.train(batches[:6]))
        snapshot = begun.snapshot().result()
    going_on = make_pipeline(name, "serial", "reference")
    going_on.build(batches[0])
    going_on.restore(snapshot)
    with going_on:
        rest = [metrics["loss"] for metrics in going_on.train(batches[6:])]
    losses, weights = train(name, "serial", "reference")
    assert rest == losses[6:]
    jax.tree.map(np.testing.assert_array_equal, weights_of(going_on), weights)
