from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fdg_jax import checkpoint


class Net(nnx.Module):
    """Parameters, statistics and random state, nested in a list as blocks are."""

    def __init__(self, features, seed, param_dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        dense = nnx.Linear(3, features, param_dtype=param_dtype, rngs=rngs)
        norm = nnx.BatchNorm(features, rngs=rngs)
        self.blocks = nnx.List([dense, norm, nnx.Dropout(0.5, rngs=rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def batch():
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


def _trained(features, seed, batch, **kwargs):
    network = Net(features, seed, **kwargs)
    network(batch)  # moves the running statistics away from their start
    network.eval()
    return network


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_a_restored_network_computes_the_same(tmp_path, batch, param_dtype):
    saved = _trained(4, 0, batch, param_dtype=param_dtype)
    other = Net(4, 1, param_dtype=param_dtype)
    other.eval()
    assert not jnp.array_equal(saved(batch), other(batch))
    checkpoint.save_network(saved, tmp_path, 7)
    restored = checkpoint.restore_network(other, tmp_path)
    assert restored is other
    np.testing.assert_array_equal(saved(batch), restored(batch))


def test_values_land_on_the_device_of_the_network(tmp_path, batch):
    checkpoint.save_network(_trained(4, 0, batch), tmp_path, 7)
    other = Net(4, 1)
    device = jax.devices()[1]
    nnx.update(other, jax.device_put(nnx.state(other), device))
    checkpoint.restore_network(other, tmp_path)
    assert other.blocks[0].kernel[...].devices() == {device}


def test_the_latest_step_is_restored_unless_one_is_named(tmp_path, batch):
    first, second = (_trained(4, seed, batch) for seed in (0, 1))
    checkpoint.save_network(first, tmp_path, 9)
    checkpoint.save_network(second, tmp_path, 10)
    fresh = Net(4, 2)
    fresh.eval()
    checkpoint.restore_network(fresh, tmp_path)
    np.testing.assert_array_equal(fresh(batch), second(batch))
    checkpoint.restore_network(fresh, tmp_path, 9)
    np.testing.assert_array_equal(fresh(batch), first(batch))


def test_a_missing_checkpoint_is_named_and_nothing_is_made(tmp_path, batch):
    missing = tmp_path / "missing"
    with pytest.raises(ValueError, match="no checkpoint in .*missing.*none"):
        checkpoint.restore_network(Net(4, 0), missing)
    assert not missing.exists()
    checkpoint.save_network(_trained(4, 0, batch), tmp_path, 7)
    with pytest.raises(ValueError, match=r"no checkpoint 8 in .*\[7\]"):
        checkpoint.restore_network(Net(4, 0), tmp_path, 8)


@pytest.mark.parametrize("name", ["a[1]", "[a]", "\\", "gs:", "\udcff"])
def test_a_network_is_kept_in_a_folder_of_any_name(tmp_path, batch, name):
    saved = _trained(4, 0, batch)
    checkpoint.save_network(_trained(4, 2, batch), tmp_path / "a" / "c", 7)
    checkpoint.save_network(saved, tmp_path / name / "c", 7)
    assert checkpoint.steps(tmp_path / name / "c") == [7]
    other = checkpoint.restore_network(Net(4, 1), tmp_path / name / "c")
    other.eval()
    np.testing.assert_array_equal(saved(batch), other(batch))


def test_an_address_is_refused_and_nothing_is_made(tmp_path, batch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is an address"):
        checkpoint.save_network(_trained(4, 0, batch), "gs://bucket", 7)
    with pytest.raises(ValueError, match="is an address"):
        checkpoint.restore_network(Net(4, 1), "gs://bucket")
    assert list(tmp_path.iterdir()) == []


def test_another_network_is_refused(tmp_path, batch):
    checkpoint.save_network(_trained(4, 0, batch), tmp_path, 7)
    with pytest.raises(ValueError):
        checkpoint.restore_network(Net(5, 0), tmp_path)


def test_threads_save_at_the_same_time(tmp_path, batch):
    """Several times, since it takes luck for two saves to meet."""
    networks = [_trained(4, seed, batch) for seed in range(4)]

    def save(pair):
        for step in range(3):
            checkpoint.save_network(pair[1], tmp_path / str(pair[0]), step)

    with ThreadPoolExecutor(len(networks)) as pool:
        list(pool.map(save, enumerate(networks)))
    for i, saved in enumerate(networks):
        assert checkpoint.steps(tmp_path / str(i)) == [0, 1, 2]
        restored = checkpoint.restore_network(Net(4, 9), tmp_path / str(i))
        restored.eval()
        np.testing.assert_array_equal(saved(batch), restored(batch))
