"""Losses and metrics that are pairs (sum, count): as if all batches were one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ENGINES = ["serial", "threads", "fused"]
TIME, WIDTH = 5, 6


def make_network(seed=0):
    """Blocks on sequences, [batch, time, width]."""
    options = {"param_dtype": jnp.float64, "dtype": jnp.float64}
    return [
        *(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(seed + i), **options) for i in (0, 1)),
        Tanh(),
        nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(seed + 2), **options),
    ]


class Tanh(nnx.Module):
    def __call__(self, x):
        return jnp.tanh(x)


def make_batches(sizes, seed=0):
    """Sequences whose labels are masked, each batch with another share of them."""
    draw = np.random.default_rng(seed)
    batches = []
    for n, size in enumerate(sizes):
        label = draw.integers(0, 3, (size, TIME)).astype(np.int32)
        label[draw.random((size, TIME)) < 0.2 + 0.6 * (n % 2)] = -100
        image = draw.normal(size=(size, TIME, WIDTH))
        batches.append({"image": image, "label": label})
    return batches


def masked_loss(outputs, label):
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.maximum(label, 0)
    )
    is_counted = label >= 0
    return jnp.where(is_counted, losses, 0.0).sum(), is_counted.sum()


def mean_loss(outputs, label):
    """A mean over examples: of the squares, so that masks play no part."""
    return ((outputs - label[..., None]) ** 2).mean()


def make_pipeline(**options):
    options = {
        "loss_fn": masked_loss,
        "optimizer": optax.adam(0.01),
        "num_stages": 2,
        "cuts": (1,),
        "schedule": "bp",
        "engine": "serial",
        **options,
    }
    return fdg.Pipeline(make_network(), **options)


def joined(batches):
    return jax.tree.map(lambda *a: np.concatenate(a), *batches)


def train_whole(updates, loss_fn):
    """Plain Optax on the whole network; an update is of all its batches as one."""
    graphdef, params = nnx.split(nnx.Sequential(*make_network()))
    optimizer = optax.adam(0.01)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        def objective(params):
            value = loss_fn(nnx.merge(graphdef, params)(batch["image"]), batch["label"])
            return value[0] / value[1] if isinstance(value, tuple) else value

        updates, state = optimizer.update(jax.grad(objective)(params), state, params)
        return optax.apply_updates(params, updates), state

    for batches in updates:
        params, state = step(params, state, joined(batches))
    return nnx.merge(graphdef, params).layers


def assert_close(network, expected):
    got, wanted = oracle.values(network)[0], oracle.values(expected)[0]
    assert oracle.relative_error(got, wanted) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("loss_fn", [masked_loss, mean_loss])
def test_an_evaluation_is_that_of_all_batches_as_one(engine, loss_fn):
    batches = make_batches([4, 3, 6])
    with make_pipeline(loss_fn=loss_fn, engine=engine) as pipeline:
        together = pipeline.evaluate_metrics([joined(batches)])
        assert pipeline.evaluate_metrics(batches) == pytest.approx(together, rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_update_is_that_of_its_batches_as_one(engine, num_stages, accumulation):
    batches = make_batches([4] * 6)
    options = {"num_stages": num_stages, "cuts": (1,)[: num_stages - 1]}
    with make_pipeline(engine=engine, accumulation=accumulation, **options) as pipeline:
        losses = [m["loss"] for m in pipeline.train(batches)]
    updates = [batches[i : i + accumulation] for i in range(0, 6, accumulation)]
    assert_close(pipeline.network, train_whole(updates, masked_loss))
    outputs = nnx.Sequential(*make_network())(batches[0]["image"])
    total, count = masked_loss(outputs, batches[0]["label"])
    assert losses[0] == pytest.approx(float(total / count), rel=1e-12)


@pytest.mark.parametrize("engine", ["serial", "threads"])
def test_a_scalar_loss_is_a_mean_over_examples_also_of_pieces_of_other_sizes(engine):
    batches = make_batches([4, 2, 6, 3])
    with make_pipeline(loss_fn=mean_loss, engine=engine, accumulation=2) as pipeline:
        list(pipeline.train(batches))
    expected = train_whole([batches[:2], batches[2:]], mean_loss)
    assert_close(pipeline.network, expected)


def test_gradients_that_are_late_are_weighted_by_what_their_batch_counts():
    """With staleness the same gradients come later; here the parameters stand still."""
    batches = make_batches([4] * 4)
    gradients = {}
    for schedule in ("bp", "reference"):
        options = {"optimizer": optax.sgd(1e-9), "accumulation": 4}
        with make_pipeline(schedule=schedule, **options) as pipeline:
            list(pipeline.train(batches))
        gradients[schedule] = oracle.values(pipeline.network)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-24),
        gradients["bp"],
        gradients["reference"],
    )


def test_a_batch_that_counts_nothing_changes_nothing_and_is_no_nan():
    batches = make_batches([4] * 3)
    batches[1]["label"][:] = -100
    with make_pipeline(optimizer=optax.sgd(0.1)) as pipeline:
        losses = [m["loss"] for m in pipeline.train(batches)]
    assert losses[1] == 0.0
    with make_pipeline(optimizer=optax.sgd(0.1)) as other:
        list(other.train([batches[0], batches[2]]))
    assert_close(pipeline.network, other.network)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replicas_share_a_masked_batch_as_if_it_were_one(accumulation):
    batches = make_batches([8] * 4)
    options = {"num_stages": 1, "cuts": (), "accumulation": accumulation}
    with make_pipeline(replicas=4, **options) as pipeline:
        losses = [m["loss"] for m in pipeline.train(batches)]
        # One batch that can be shared, and one that cannot.
        ragged = make_batches([8, 5])
        metrics = pipeline.evaluate_metrics(ragged)
    with make_pipeline(**options) as alone:
        expected = [m["loss"] for m in alone.train(batches)]
        assert metrics == pytest.approx(alone.evaluate_metrics(ragged), rel=1e-12)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert_close(pipeline.network, alone.network)


@pytest.mark.parametrize("engine", ENGINES)
def test_metrics_of_the_users_are_averaged_alike(engine):
    def largest(outputs, label):
        return outputs.max(axis=(1, 2)).mean()

    batches = make_batches([4, 3, 6])
    metrics = {"accuracy": fdg.accuracy, "largest": largest}
    with make_pipeline(metrics=metrics, engine=engine) as pipeline:
        (trained,) = pipeline.train(batches[:1])
        together = pipeline.evaluate_metrics([joined(batches)])
        apart = pipeline.evaluate_metrics(batches)
        accuracy = pipeline.evaluate(batches)
        network = pipeline.network
    assert trained.keys() == {"loss", "accuracy", "largest", "batch"}
    assert apart == pytest.approx(together, rel=1e-12)
    whole = joined(batches)
    outputs = nnx.Sequential(*network)(whole["image"])
    is_counted = whole["label"] >= 0
    right = (outputs.argmax(-1) == whole["label"])[is_counted]
    assert apart["accuracy"] == accuracy == pytest.approx(float(right.mean()))
    assert apart["largest"] == pytest.approx(float(largest(outputs, None)))


def test_a_batch_of_a_size_that_the_loss_cannot_see_is_refused():
    """Without a label, and with something that all examples share beside them."""

    class Split(nnx.Module):
        def __call__(self, x):
            return {"aux": x.mean(0), "x": x}

    class Join(nnx.Module):
        def __call__(self, inputs):
            return inputs["x"] + inputs["aux"][None]

    linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    options = {
        "loss_fn": lambda outputs, label: (outputs**2).mean(),
        "optimizer": optax.sgd(0.1),
        "num_stages": 2,
        "cuts": (2,),
        "engine": "serial",
    }
    blocks = [linear, Split(), Join(), nnx.Linear(WIDTH, 1, rngs=nnx.Rngs(1))]
    batch = {"image": np.ones((8, WIDTH), np.float32), "label": None}
    pipeline = fdg.Pipeline(blocks, **options, accumulation=2)
    with pytest.raises(ValueError, match="batch of 8 counts as its size"):
        pipeline.build(batch)
    fdg.Pipeline(blocks, **options).build(batch)
    options["loss_fn"] = lambda outputs, label: ((outputs**2).sum(), outputs.size)
    fdg.Pipeline(blocks, **options, accumulation=2).build(batch)


# --- a number that means nothing is not given ---------------------------------------


def test_one_logit_has_no_accuracy_of_its_own():
    def sigmoid_loss(outputs, label):
        return optax.sigmoid_binary_cross_entropy(outputs[:, 0], label).mean()

    def binary_accuracy(outputs, label):
        return ((outputs[:, 0] > 0) == label).mean()

    draw = np.random.default_rng(0)
    image = draw.normal(size=(32, WIDTH))
    batch = {"image": image, "label": (image.sum(1) > 0).astype(np.int32)}
    rngs = nnx.Rngs(0)
    blocks = [nnx.Linear(WIDTH, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)]
    options = {"loss_fn": sigmoid_loss, "optimizer": optax.adam(0.1), "num_stages": 2}
    with fdg.Pipeline(blocks, cuts=(1,), **options) as pipeline:
        metrics = list(pipeline.train([batch] * 40))
        assert metrics[0].keys() == {"loss", "batch"}
        with pytest.raises(ValueError, match="computes no accuracy.*metrics="):
            pipeline.evaluate([batch])
    options["metrics"] = {"accuracy": binary_accuracy}
    with fdg.Pipeline(blocks, cuts=(1,), **options) as pipeline:
        list(pipeline.train([batch] * 40))
        assert pipeline.evaluate([batch]) > 0.9


def test_embeddings_with_integer_labels_have_no_accuracy():
    def triplet(outputs, label):
        apart = ((outputs[:, None] - outputs[None]) ** 2).sum(-1)
        alike = label[:, None] == label[None]
        return jnp.where(alike, apart, jnp.maximum(0.0, 1.0 - apart)).mean()

    batch = oracle.make_batches(1)[0]
    with make_pipeline(loss_fn=triplet) as pipeline:
        image = np.zeros((8, TIME, WIDTH)) + batch["image"][:, None]
        batch = {"image": image[:, 0], "label": batch["label"]}
        metrics = pipeline.evaluate_metrics([batch])
    assert metrics.keys() == {"loss", "batch"}
