import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax import losses


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


def test_accuracy_is_the_share_of_labels_with_the_largest_output():
    outputs = jnp.asarray([[3.0, 1.0], [1.0, 2.0], [5.0, 4.0], [0.0, 9.0]])
    accuracy = losses.accuracy(outputs, jnp.asarray([0, 1, 1, 1]))
    assert accuracy == 0.75
    assert accuracy.dtype == jnp.float32


def test_accuracy_counts_every_label_of_a_sequence():
    outputs = jnp.eye(3)[jnp.asarray([[0, 1], [2, 2]])]
    assert losses.accuracy(outputs, jnp.asarray([[0, 1], [2, 0]])) == 0.75


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "outputs,label,expected",
    [
        (jnp.float32, jnp.int32, True),
        (jnp.float32, jnp.uint8, True),
        (jnp.float32, jnp.float32, False),
    ],
)
def test_integer_labels_of_scores_are_a_classification(
    outputs, label, expected, compiled
):
    def ask(outputs, label):
        answers.append(losses.is_classification(outputs, label))
        return outputs

    answers = []
    (jax.jit(ask) if compiled else ask)(jnp.ones((5, 3), outputs), jnp.ones(5, label))
    assert answers == [expected]


@pytest.mark.parametrize(
    "outputs,label",
    [((5,), (5,)), ((5, 3), (4,)), ((5, 3), (5, 3)), ((5, 2, 3), (5,))],
)
def test_shapes_that_are_not_scores_per_label_are_no_classification(outputs, label):
    label = jnp.zeros(label, jnp.int32)
    assert not losses.is_classification(jnp.zeros(outputs), label)


def test_outputs_of_several_arrays_are_no_classification():
    outputs, label = _batch()
    assert not losses.is_classification((outputs, outputs), label)
