import jax.numpy as jnp
import numpy as np
import pytest

from fdg_jax.remedies import reschedule_learning_rate


def factors(staleness, num_updates, length, dtype=jnp.float64):
    transform = reschedule_learning_rate(staleness, num_updates)
    state, factors = transform.init(None), []
    for _ in range(length):
        update, state = transform.update(jnp.ones((), dtype), state)
        assert update.dtype == dtype
        factors.append(float(update))
    return factors


@pytest.mark.parametrize("staleness", [1, 3, 6])
def test_it_begins_at_one_over_the_delay_and_ends_at_one(staleness):
    got = factors(staleness, 8, 12)
    assert got[0] == pytest.approx(1 / (staleness + 1), rel=1e-15)
    assert got[4] == pytest.approx((staleness + 1) ** -0.5, rel=1e-14)
    assert got[8:] == [1.0] * 4
    # Geometric in between: every update multiplies by the same.
    np.testing.assert_allclose(
        np.diff(np.log(got[:9])), np.log(staleness + 1) / 8, rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_type_of_an_update_is_kept(dtype):
    exact = factors(3, 4, 6)
    np.testing.assert_allclose(
        factors(3, 4, 6, dtype), exact, rtol=jnp.finfo(dtype).eps
    )


def test_no_updates_at_all_are_refused_with_their_number():
    with pytest.raises(ValueError, match="at least 1 update; got 0"):
        reschedule_learning_rate(2, 0)
