import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fdg_jax.remedies import scale_by_staleness


@pytest.mark.parametrize(("staleness", "divisor"), [(0, 1), (1, 1), (2, 2), (7, 7)])
@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(0.1, weight_decay=0.3),
    ],
)
def test_the_step_is_that_of_the_learning_rate_over_the_staleness(
    optimizer, staleness, divisor
):
    params, gradient = jnp.asarray([1.0, -2.0]), jnp.asarray([0.5, 0.1])
    transform = optax.chain(optimizer, scale_by_staleness(staleness))
    updates, _ = transform.update(gradient, transform.init(params), params)
    whole, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates, whole / divisor, rtol=1e-15)


def test_a_negative_staleness_is_refused_with_its_value():
    with pytest.raises(ValueError, match="it is >= 0; got -1"):
        scale_by_staleness(-1)
