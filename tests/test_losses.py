import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdg_jax import losses

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def _batch(dtype=np.float64, batch_size=6, num_classes=4):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(batch_size, num_classes)) * 3
    label = rng.integers(0, num_classes, batch_size).astype(np.int32)
    return jnp.asarray(outputs, dtype), jnp.asarray(label)


def test_cross_entropy_is_the_mean_negative_log_probability_of_the_label():
    outputs, label = _batch()
    probabilities = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    expected = -np.log(probabilities[np.arange(len(label)), label]).mean()
    loss = losses.softmax_cross_entropy(outputs, label)
    np.testing.assert_allclose(loss, expected, rtol=1e-13)


def test_the_gradient_is_softmax_less_the_label_over_the_batch_size():
    outputs, label = _batch()
    gradient = jax.grad(losses.softmax_cross_entropy)(outputs, label)
    expected = (jax.nn.softmax(outputs) - jax.nn.one_hot(label, 4)) / len(label)
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-15)


def test_equal_outputs_cost_the_logarithm_of_the_number_of_classes():
    loss = losses.softmax_cross_entropy(jnp.zeros((3, 10)), jnp.arange(3))
    np.testing.assert_allclose(loss, np.log(10), rtol=1e-14)


@pytest.mark.parametrize(
    "given,computed",
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ],
)
def test_the_loss_is_computed_in_float32_at_least(given, computed):
    outputs, label = _batch(given)
    loss = losses.softmax_cross_entropy(outputs, label)
    assert loss.dtype == computed
    exact = losses.softmax_cross_entropy(outputs.astype(jnp.float64), label)
    np.testing.assert_allclose(loss, exact, rtol=1e-6)


def test_large_outputs_do_not_overflow():
    outputs = jnp.asarray([[1e4, 0.0], [0.0, 1e4]], jnp.float32)
    loss = losses.softmax_cross_entropy(outputs, jnp.asarray([0, 0]))
    np.testing.assert_allclose(loss, 0.5e4, rtol=1e-6)


@pytest.mark.parametrize("wrong", [4, 255])
def test_a_label_out_of_range_makes_the_loss_nan(wrong):
    outputs, label = _batch()
    loss = losses.softmax_cross_entropy(outputs, label.at[2].set(wrong))
    assert np.isnan(loss)


def test_accuracy_counts_the_labels_with_the_largest_output():
    outputs = jnp.asarray([[3.0, 1.0], [1.0, 2.0], [5.0, 4.0], [0.0, 9.0]])
    right, count = losses.accuracy(outputs, jnp.asarray([0, 1, 1, 1]))
    assert (right, count) == (3, 4)
    assert right.dtype == count.dtype == jnp.float32


def test_accuracy_counts_every_label_of_a_sequence():
    outputs = jnp.eye(3)[jnp.asarray([[0, 1], [2, 2]])]
    assert losses.accuracy(outputs, jnp.asarray([[0, 1], [2, 0]])) == (3, 4)


def test_accuracy_does_not_count_labels_that_are_masked():
    outputs = jnp.eye(3)[jnp.asarray([[0, 1], [2, 2]])]
    assert losses.accuracy(outputs, jnp.asarray([[0, -100], [-100, 0]])) == (1, 2)
    assert losses.accuracy(outputs, jnp.full((2, 2), -100)) == (0, 0)


@pytest.mark.parametrize(
    ("outputs", "label"), [((4, 1), (4,)), ((4, 3), (4, 1)), ((4, 2, 3), (4,))]
)
def test_cross_entropy_wants_classes_and_a_label_for_each(outputs, label):
    with pytest.raises(ValueError, match="two or more classes for labels"):
        losses.softmax_cross_entropy(jnp.zeros(outputs), jnp.zeros(label, jnp.int32))


def test_accuracy_comes_with_the_loss_that_takes_class_scores_only():
    def own_loss(outputs, label):
        return losses.softmax_cross_entropy(outputs, label)

    assert losses.metrics_of(own_loss, None) == {}
    assert losses.metrics_of(losses.softmax_cross_entropy, {}) == {}
    known = losses.metrics_of(losses.softmax_cross_entropy, None)
    assert known == {"accuracy": losses.accuracy}


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": losses.accuracy}, "none of loss, batch"),
        ({"top5": 5}, "dict from names to functions"),
        ([losses.accuracy], "dict from names to functions"),
    ],
)
def test_a_wrong_metric_is_refused(metrics, message):
    with pytest.raises(ValueError, match=message):
        losses.metrics_of(losses.softmax_cross_entropy, metrics)


def test_a_mean_over_nothing_is_zero_and_has_no_gradient():
    def loss(x):
        return losses.mean((x.sum(), 0))

    assert loss(jnp.zeros(3)) == 0.0
    assert np.isfinite(jax.grad(loss)(jnp.zeros(3))).all()


def _entropies(outputs, label):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, label)


def _in_chunks(outputs, label):
    """As for outputs that are too large to be looked at at once."""

    def step(carry, chunk):
        total, count = carry
        return (total + _entropies(*chunk).sum(), count + (chunk[1] >= 0).sum()), None

    chunks = outputs.reshape(2, -1, outputs.shape[-1]), label.reshape(2, -1)
    return jax.lax.scan(
        step, (jnp.zeros((), outputs.dtype), jnp.zeros((), int)), chunks
    )[0]


LEARNED = {
    "mean": lambda o, n: _entropies(o, n).mean(),
    "pair": lambda o, n: (_entropies(o, n).sum(), n.size),
    "masked": lambda o, n: (
        jnp.where(n >= 0, _entropies(o, n), 0).sum(),
        (n > 0).sum(),
    ),
    "compiled": jax.jit(lambda o, n: (_entropies(o, n).sum(), (n > 0).sum())),
    "in chunks": lambda o, n: _in_chunks(o, n),
    "rematerialised": jax.checkpoint(lambda o, n: (_entropies(o, n).sum(), n.size)),
    "weighted": lambda o, n: (
        (jax.nn.relu(n * 0.5) * _entropies(o, n)).sum(),
        jax.nn.relu(n * 0.5).sum(),
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_loss_that_can_be_learned_from_is_accepted(name):
    losses.check_loss(LEARNED[name], *_batch())


NOT_LEARNED = {
    "integer": (lambda o, n: (o.argmax(-1) == n).sum(), "must return a floating-point"),
    "argmax": (lambda o, n: (o.argmax(-1) == n).mean(), "must have a gradient"),
    "compiled": (jax.jit(lambda o, n: (o > 0).mean()), "must have a gradient"),
    "stopped": (lambda o, n: jax.lax.stop_gradient(o).mean(), "must have a gradient"),
    "constant": (lambda o, n: 1.0, "must have a gradient"),
    "array": (lambda o, n: o.sum(-1), r"scalar mean.*\(sum, count\); got 'float"),
    "triple": (lambda o, n: (o.sum(), 1.0, 1.0), "pair of scalars"),
    "auxiliary": (
        lambda o, n: (_entropies(o, n).mean(), (o.argmax(-1) == n).mean()),
        "count must not depend on the network's outputs.*metrics=",
    ),
    "compiled auxiliary": (
        jax.jit(lambda o, n: (_entropies(o, n).mean(), (o.argmax(-1) == n).mean())),
        "count must not depend on the network's outputs",
    ),
    # What has a derivative of its own, or is looped over, is not looked into.
    **{
        f"{name} weights": (
            lambda o, n, weigh=weigh: (
                (weigh(o.max(-1)) * _entropies(o, n)).sum(),
                weigh(o.max(-1)).sum(),
            ),
            "count must not depend on the network's outputs",
        )
        for name, weigh in {
            "custom": jax.nn.relu,
            "rematerialised": jax.checkpoint(jnp.tanh),
            "looped": lambda x: jax.lax.map(jnp.tanh, x),
        }.items()
    },
}


@pytest.mark.parametrize("name", NOT_LEARNED)
def test_a_loss_that_cannot_be_learned_from_is_refused(name):
    loss_fn, message = NOT_LEARNED[name]
    with pytest.raises(ValueError, match=message):
        losses.check_loss(loss_fn, *_batch())


def test_a_network_that_gives_integers_has_no_gradient():
    outputs = jax.ShapeDtypeStruct((4,), jnp.int32)
    with pytest.raises(ValueError, match="must have a gradient"):
        losses.check_loss(lambda o, n: (o * 1.0).mean(), outputs, None)


@pytest.mark.parametrize(
    ("outputs", "label"), [((6, 1), (6,)), ((6, 3), (6, 1)), ((6, 3), (3,))]
)
@pytest.mark.parametrize("name", ["accuracy", "softmax_cross_entropy"])
def test_what_is_no_class_score_is_refused(name, outputs, label):
    with pytest.raises(ValueError, match=f"{name} wants outputs .* two or more"):
        getattr(losses, name)(jnp.zeros(outputs), jnp.zeros(label, jnp.int32))
