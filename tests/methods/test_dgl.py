"""DGL's head, MLP-SR: PyTorch's pooling, and the layers of the paper's program."""

import jax
import numpy as np
import pytest
from flax import nnx

import oracle
from fdg_jax.methods.dgl import MlpSr, average_areas

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SIZES = [(8, 8), (7, 5), (9, 4), (2, 3), (1, 1), (13, 6)]


def pooled_in_a_loop(x, shape):
    """Area (i, j) of (n, m): rows floor(i h / n) up to ceil((i + 1) h / n)."""
    (height, width), (n, m) = x.shape[1:3], shape
    y = np.zeros((len(x), n, m, x.shape[-1]))
    for i in range(n):
        for j in range(m):
            rows = slice(
                int(np.floor(i * height / n)), int(np.ceil((i + 1) * height / n))
            )
            columns = slice(
                int(np.floor(j * width / m)), int(np.ceil((j + 1) * width / m))
            )
            y[:, i, j] = x[:, rows, columns].mean((1, 2))
    return y


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (3, 2), (4, 5)])
def test_areas_are_averaged_as_in_a_plain_loop(size, shape):
    x = np.random.default_rng(0).normal(size=(3, *size, 4))
    np.testing.assert_allclose(
        average_areas(x, shape), pooled_in_a_loop(x, shape), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(2, 2), (1, 1), (3, 2), (4, 5)])
def test_areas_are_averaged_as_in_pytorch(size, shape):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(3, *size, 4))
    expected = torch.nn.functional.adaptive_avg_pool2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), shape
    )
    got = np.asarray(average_areas(x, shape)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-12, atol=1e-14)


def make_head(shape, classes=5):
    x = jax.ShapeDtypeStruct(shape, np.float64)
    outputs = jax.ShapeDtypeStruct((shape[0], classes), np.float64)
    return MlpSr(x, outputs, nnx.Rngs(1))


def normalised(x, scale, bias):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) * scale + bias


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_the_head_has_the_layers_of_mlp_sr(size):
    """Pool to a quarter, 3 1x1 convolutions, pool 2x2, 3 hidden layers, logits."""
    head = make_head((6, *size, 3))
    (params,), _ = oracle.values([head])
    x = image = np.random.default_rng(2).normal(size=(6, *size, 3))
    x = pooled_in_a_loop(x, [int(np.ceil(s / 4)) for s in size])
    for i in range(3):
        conv = params["convs"][i]
        assert conv["conv"]["kernel"].shape == (1, 1, 3, 3)
        x = x @ np.asarray(conv["conv"]["kernel"])[0, 0]
        x = np.maximum(normalised(x, **_numpy(conv["norm"])), 0)
    x = pooled_in_a_loop(x, (2, 2)).reshape(6, -1)
    assert x.shape == (6, 12)
    for i in range(3):
        dense = _numpy(params["linears"][i])
        assert dense["kernel"].shape == (12, 12)
        x = normalised(
            x @ dense["kernel"] + dense["bias"], **_numpy(params["norms"][i])
        )
        x = np.maximum(x, 0)
    logits = _numpy(params["logits"])
    expected = x @ logits["kernel"] + logits["bias"]
    head.train()
    np.testing.assert_allclose(head(image), expected, rtol=1e-9, atol=1e-9)


def _numpy(values):
    return {name: np.asarray(value) for name, value in values.items()}


def test_the_head_computes_bfloat16_but_gives_wide_logits():
    x = jax.ShapeDtypeStruct((4, 8, 8, 3), jax.numpy.bfloat16)
    head = MlpSr(x, jax.ShapeDtypeStruct((4, 5), np.float32), nnx.Rngs(0))
    assert all(p.dtype == np.float32 for p in jax.tree.leaves(oracle.values([head])[0]))
    graphdef, state = nnx.split(head)
    logits = jax.eval_shape(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
    assert logits.dtype == np.float32


@pytest.mark.parametrize(
    ("x", "outputs"),
    [((4, 6), (4, 5)), ((4, 8, 8, 3), (4, 5, 2)), ((4, 8, 3), (4,))],
)
def test_a_head_for_other_shapes_is_refused(x, outputs):
    shapes = [jax.ShapeDtypeStruct(shape, np.float64) for shape in (x, outputs)]
    with pytest.raises(ValueError) as refused:
        MlpSr(*shapes, nnx.Rngs(0))
    message = str(refused.value)
    assert f"got {x} and {outputs}" in message and "local_head of your own" in message
    assert "\n" not in message
