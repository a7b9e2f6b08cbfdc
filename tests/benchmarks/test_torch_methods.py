"""The PyTorch peer: the same networks, and the authors' scheme with its staleness."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import fdg_jax as fdg
from benchmarks import task as tasks
from fdg_jax import optimizers, partition
from fdg_jax.models import layers
from fdg_jax.models.network import count_parameters

torch = pytest.importorskip("torch", reason="wants PyTorch (requirements-bench.txt)")

from benchmarks import torch_bp, torch_fdg, torch_networks  # noqa: E402

NAMES = (
    *("resnet20", "resnet56", "resnet110", "resnet18", "resnet50", "resnet101"),
    *("wrn16_4", "wrn28_10"),
)


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_the_librarys_blocks(name):
    ours = nnx.eval_shape(lambda: fdg.models.create(name, num_classes=10))
    with torch.device("meta"):
        theirs = torch_networks.create(name, 10)
    assert len(theirs) == len(ours)
    for mine, other in zip(ours, theirs, strict=True):
        assert sum(p.numel() for p in other.parameters()) == count_parameters(mine)


@pytest.mark.parametrize("name", ["resnet21", "resnet2", "wrn28", "wrn11_2", "vgg"])
def test_unknown_networks_are_refused(name):
    with pytest.raises(ValueError, match=name):
        torch_networks.create(name, 10)


def create_both(name):
    """The library's network in float64, and PyTorch's with the same values."""
    ours = fdg.models.create(name, dtype=jnp.float64, param_dtype=jnp.float64)
    theirs = [block.double() for block in torch_networks.create(name, 10)]
    for mine, other in zip(ours, theirs, strict=True):
        _copy(mine, other)
    return ours, theirs


def _copy(mine, other):
    """Copies a block's parameters, layer by layer of each kind, in their order."""
    modules = [
        module
        for _, module in sorted(
            nnx.iter_modules(mine), key=lambda found: tuple(map(str, found[0]))
        )
    ]
    for kind, peer, weight in (
        (layers.Conv, torch.nn.Conv2d, lambda m: m.kernel[...].transpose(3, 2, 0, 1)),
        (nnx.BatchNorm, torch.nn.BatchNorm2d, lambda m: m.scale[...]),
        (nnx.Linear, torch.nn.Linear, lambda m: m.kernel[...].T),
    ):
        sources = [m for m in modules if isinstance(m, kind)]
        targets = [m for m in other.modules() if isinstance(m, peer)]
        for source, target in zip(sources, targets, strict=True):
            target.weight.data = torch.tensor(np.asarray(weight(source)))
            if source.bias is not None:
                target.bias.data = torch.tensor(np.asarray(source.bias[...]))


def make_batches(count, size=4):
    random = np.random.default_rng(1)
    return [
        {
            "image": random.normal(size=(size, 16, 16, 3)),
            "label": random.integers(0, 10, size).astype(np.int32),
        }
        for _ in range(count)
    ]


def to_torch(batch):
    image = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    label = torch.tensor(batch["label"]).long()
    return image.contiguous(memory_format=torch.channels_last), label


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn10_2"])
def test_networks_compute_what_the_librarys_do(name):
    ours, theirs = create_both(name)
    (batch,) = make_batches(1, size=2)
    expected = np.asarray(ours(jnp.asarray(batch["image"])))
    with torch.no_grad():
        got = torch.nn.Sequential(*theirs)(to_torch(batch)[0]).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "cuts"), [("resnet8", (1, 3)), ("wrn10_2", (2,))])
def test_the_scheme_is_fdg_with_the_reference_schedule(name, cuts):
    ours, theirs = create_both(name)
    batches, num_stages = make_batches(9), len(cuts) + 1
    pipeline = fdg.Pipeline(
        ours,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optimizers.create(
            "sgd",
            tasks.LEARNING_RATE,
            momentum=tasks.MOMENTUM,
            weight_decay=tasks.WEIGHT_DECAY,
        ),
        num_stages=num_stages,
        cuts=cuts,
        schedule="reference",
        shrink=tasks.SHRINK,
        engine="serial",
    )
    expected = [metrics["loss"] for metrics in pipeline.train(batches)]
    pipeline.abort()
    devices = [torch.device("cpu")] * num_stages
    scheme = torch_fdg.AuthorsScheme(theirs, cuts, devices)
    losses = [scheme.iterate(*to_torch(batch)) for batch in batches]
    assert losses[: num_stages - 1] == [None] * (num_stages - 1)
    got = [loss.item() for loss in losses[num_stages - 1 :]]
    np.testing.assert_allclose(got, expected[: len(got)], rtol=1e-8)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_the_staleness_counted_is_the_references(num_stages):
    _, blocks = create_both("resnet8")
    cuts = tuple(range(1, num_stages))
    scheme = torch_fdg.AuthorsScheme(blocks, cuts, [torch.device("cpu")] * num_stages)
    for batch in make_batches(4 * num_stages, size=2):
        scheme.iterate(*to_torch(batch))
        counted = [stage.staleness for stage in scheme.stages]
    expected = fdg.schedule.resolve("reference", num_stages).staleness
    assert tuple(counted) == expected


def test_a_failing_stage_ends_the_iteration_with_its_error():
    _, blocks = create_both("resnet8")
    scheme = torch_fdg.AuthorsScheme(blocks, (2,), [torch.device("cpu")] * 2)
    image, label = to_torch(make_batches(1)[0])
    scheme.iterate(image, label)
    scheme.iterate(image, label)
    with pytest.raises(RuntimeError, match="channels"):
        scheme.iterate(image[:, :2], label)


def test_back_propagation_is_the_scheme_with_one_stage(monkeypatch):
    task = tasks.Task("resnet8", 1, 4, None, (0,))
    cpu = torch.device("cpu")
    image, label = torch_bp.put_batch(task, cpu)
    batch = image.double(), label
    monkeypatch.setattr(torch_bp, "put_batch", lambda *_: batch)
    method = torch_bp.TorchBackPropagation(task)
    method.model.double()  # float32 drifts apart as training goes on
    blocks = torch_networks.create("resnet8", tasks.NUM_CLASSES)
    whole = torch.nn.Sequential(*blocks).double()
    whole.load_state_dict(method.model.state_dict())
    scheme = torch_fdg.AuthorsScheme(blocks, (), [cpu])
    for _ in range(3):
        method.run(1)
        scheme.iterate(*batch)
    (stage,) = scheme.stages
    for name, parameter in method.model.named_parameters():
        torch.testing.assert_close(stage.params[name], parameter, rtol=1e-9, atol=1e-12)


def test_the_warm_up_keeps_the_fastest_setting():
    method = torch_bp.TorchBackPropagation(tasks.Task("resnet8", 1, 2, None, (0,)))
    method.warm_up()
    report = method.report()
    tried = report["ms_per_batch_in_warm_up"]
    assert report["chosen"] == min(tried, key=tried.get)
    names = [setting.name for setting in torch_bp.settings(torch.device("cpu"))]
    assert list(tried) == names


def test_the_warm_up_keeps_cuts_that_no_neighbour_beats():
    task = tasks.Task("resnet8", 2, 2, None, (1, 0))
    method = torch_fdg.TorchFdg(task)
    method.warm_up()
    report = method.report()
    tried = report["ms_per_batch_in_warm_up"]
    (cut,) = report["cuts"]
    neighbours = [n for n in (cut - 1, cut + 1) if 1 <= n <= 4]
    assert all(tried[f"[{cut}]"] <= tried[f"[{n}]"] for n in neighbours)


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=9), st.data())
def test_balanced_cuts_are_the_librarys(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))

    def slowest(cuts):
        bounds = [0, *cuts, len(costs)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

    got = torch_fdg.balanced_cuts(costs, num_stages)
    total = np.cumsum([0.0, *costs])
    stages = np.subtract.outer(total, total).T  # at [i, j]: of blocks i to j - 1
    expected = partition.balanced_cuts(stages, num_stages)
    assert len(got) == num_stages - 1
    assert slowest(got) == pytest.approx(slowest(expected))
