"""Clipping, batches that are left out, and loss scaling, held against plain NumPy."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fdg_jax as fdg
import oracle
from configs import digits
from fdg_jax import optimizers, resume, training
from fdg_jax import snapshot as snapshots

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BATCHES = oracle.make_batches(12)


def make_pipeline(network=None, **options):
    options = {
        "loss_fn": fdg.softmax_cross_entropy,
        "optimizer": optax.sgd(0.1, momentum=0.9),
        "num_stages": 3,
        "cuts": (1, 3),
        "engine": "serial",
        **options,
    }
    return fdg.Pipeline(network or oracle.make_network(), **options)


def train(batches=BATCHES, **options):
    with make_pipeline(**options) as pipeline:
        losses = [metrics["loss"] for metrics in pipeline.train(batches)]
    return losses, jax.tree.leaves(oracle.values(pipeline.network)), pipeline


def assert_same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


# --- clipping ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_gradient_is_clipped_before_the_decay(name):
    draw = np.random.default_rng(0)
    w, grads = draw.normal(size=5), 3 * draw.normal(size=(6, 5))
    clipped = [g * min(1.0, 2.0 / np.linalg.norm(g)) for g in grads]
    assert any(np.linalg.norm(g) > 2 for g in grads)

    def follow(grads, **options):
        optimizer = optimizers.create(name, 0.1, weight_decay=0.05, **options)
        params, state = jnp.asarray(w), optimizer.init(jnp.asarray(w))
        for g in grads:
            updates, state = optimizer.update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
        return params

    np.testing.assert_allclose(
        follow(grads, clip_norm=2.0), follow(clipped), rtol=1e-12
    )


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_a_wrong_norm_is_refused(wrong):
    with pytest.raises(ValueError, match="clip_norm must be 0"):
        optimizers.create("sgd", 0.1, clip_norm=wrong)


def test_each_stage_clips_its_own_shrunk_gradient():
    """One batch at zero momentum: each stage moves by lr * clip(beta**power * g)."""
    beta, norm, rate = 0.5, 1e-3, 0.1
    optimizer = optimizers.create("sgd", rate, momentum=0.0, clip_norm=norm)
    with make_pipeline(optimizer=optimizer, shrink=beta) as pipeline:
        pipeline.build(BATCHES[0])
        before = pipeline.snapshot().result()
        before = jax.device_get([taken.state.params for taken in before.stages])
        list(pipeline.train(BATCHES[:1]))
    after = pipeline.snapshot().result()
    plain = optimizers.create("sgd", 1.0, momentum=0.0)
    with make_pipeline(optimizer=plain) as unclipped:
        list(unclipped.train(BATCHES[:1]))
    gradient = unclipped.snapshot().result()
    for k in range(3):
        moved = optax.tree.sub(before[k], after.stages[k].state.params)
        g = optax.tree.sub(before[k], gradient.stages[k].state.params)
        shrunk = optax.tree.scale(beta ** (2 - k), g)
        length = optax.tree.norm(shrunk)
        assert length > norm
        expected = optax.tree.scale(rate * norm / length, shrunk)
        assert_same(
            jax.tree.leaves(moved), jax.tree.leaves(expected), rtol=1e-6, atol=1e-12
        )


# --- batches that are left out ----------------------------------------------------


def poisoned(*numbers, value=np.nan):
    batches = [dict(batch) for batch in BATCHES]
    for n in numbers:
        batches[n]["image"] = np.full_like(batches[n]["image"], value)
    return batches


@pytest.mark.parametrize("schedule", ["bp", "reference"])
def test_a_poisoned_batch_changes_nothing_but_the_counts(schedule):
    """As if the batch had not been, where there is no staleness; else no NaN."""
    options = {"schedule": schedule, "skip_nonfinite": 2}
    network = oracle.make_network(rate=0.0)  # dropout depends on a batch's number
    losses, values, pipeline = train(poisoned(4), network=network, **options)
    assert math.isnan(losses[4]) and np.isfinite(losses[:4] + losses[5:]).all()
    assert all(np.isfinite(value).all() for value in values)
    assert pipeline.skipped_updates == [1, 1, 1]
    if schedule == "bp":
        rest = BATCHES[:4] + BATCHES[5:]
        expected, others, untouched = train(rest, network=network, **options)
        assert losses[:4] + losses[5:] == expected
        assert_same(values, others)
        assert untouched.skipped_updates == [0, 0, 0]


@pytest.mark.parametrize("engine", ["threads", "fused"])
def test_all_engines_leave_the_same_batches_out(engine):
    options = {"skip_nonfinite": 3, "schedule": (3, 1, 0)}
    expected = train(poisoned(2, 3, 7), **options)
    got = train(poisoned(2, 3, 7), engine=engine, **options)
    assert got[2].skipped_updates == expected[2].skipped_updates == [3, 3, 3]
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if engine == "fused" else {}
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-9)
    assert_same(got[1], expected[1], **tolerance)


def test_a_batch_with_a_wrong_label_is_left_out_whole():
    """Its loss is NaN and its gradient is not; momentum and decay would move on."""
    wrong = [dict(batch) for batch in BATCHES]
    wrong[4]["label"] = np.full_like(wrong[4]["label"], 99)
    network = oracle.make_network(rate=0.0)
    options = {"schedule": "bp", "skip_nonfinite": 1, "network": network}
    losses, _, pipeline = train(wrong, **options)
    expected, _, _ = train(BATCHES[:4] + BATCHES[5:], **options)
    assert math.isnan(losses[4]) and pipeline.skipped_updates == [1, 1, 1]
    # The statistics have seen the images, which were finite.
    np.testing.assert_allclose(losses[:4] + losses[5:], expected, rtol=1e-12)


class Overflow(nnx.Module):
    """A block whose gradient alone is not finite."""

    def __init__(self):
        self.scale = nnx.Param(jnp.zeros((), jnp.float32))

    def __call__(self, x):
        return x + jnp.sqrt(self.scale[...]) * x


def test_a_gradient_that_is_never_finite_is_never_applied():
    def linear(seed, width):
        return nnx.Linear(6, width, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))

    blocks = [linear(0, 6), Overflow(), linear(1, 3)]
    options = {"cuts": (1, 2), "skip_nonfinite": 2, "optimizer": optax.sgd(0.1)}
    batches = [
        {"image": b["image"].astype(np.float32), "label": b["label"]} for b in BATCHES
    ]
    message = "gradient of batch 2 is not finite in stage 1"
    with pytest.raises(fdg.NonFiniteLossError, match=message):
        with make_pipeline(blocks, **options) as pipeline:
            for metrics in pipeline.train(batches):
                assert math.isfinite(metrics["loss"])
    assert pipeline.skipped_updates[:2] == [2, 2]
    assert pipeline.batches_applied[:2] == [2, 2]
    before, after = (
        [jax.tree.leaves(nnx.state(block, nnx.Param)) for block in network]
        for network in (blocks, pipeline.network)
    )
    assert_same(before[0] + before[1], after[0] + after[1])
    assert all(np.isfinite(a).all() for a in after[2])


def test_too_many_in_a_row_end_the_run():
    assert len(train(poisoned(2, 3, 5, 6), skip_nonfinite=2)[0]) == 12
    with pytest.raises(fdg.NonFiniteLossError) as raised:
        train(poisoned(2, 4, 5, 6), skip_nonfinite=2)
    assert raised.value.batch == 6
    with pytest.raises(fdg.NonFiniteLossError) as raised:
        train(poisoned(2))
    assert raised.value.batch == 2


@pytest.mark.parametrize("engine", ["serial", "threads"])
@pytest.mark.parametrize("cut", [5, 6, 7])
def test_a_run_that_goes_on_ends_at_the_same_batch(cut, engine):
    """The count is that of the snapshot's batch, whatever was read until it came."""
    options = {"skip_nonfinite": 2, "engine": engine}
    batches = poisoned(2, 5, 6, 7)
    record, arrays = {}, {}
    with pytest.raises(fdg.NonFiniteLossError) as whole:
        with make_pipeline(**options) as pipeline:
            list(pipeline.train(batches[:cut]))
            asked = pipeline.snapshot()
            list(pipeline.train(batches[cut:7]))
            snapshot = asked.result()
            record["batch"], record["lengths"] = snapshot.batch, snapshot.lengths()
            record["nonfinite"] = snapshot.nonfinite
            arrays.update(jax.device_get(snapshots.to_arrays(snapshot)))
            list(pipeline.train(batches[7:]))
    other = make_pipeline(**options)
    resume.restore_pipeline(other, record, arrays, batches[0])
    with pytest.raises(fdg.NonFiniteLossError) as parts, other:
        list(other.train(batches[cut:]))
    assert whole.value.batch == parts.value.batch == 7


def test_a_snapshot_keeps_the_counts():
    options = {"skip_nonfinite": 2, "engine": "threads"}
    pipeline, batches = make_pipeline(**options), poisoned(1)
    list(pipeline.train(batches[:6]))
    snapshot = pipeline.snapshot().result()
    arrays = jax.device_get(snapshots.to_arrays(snapshot))
    pipeline.close()
    other = make_pipeline(**options)
    like = other.abstract_snapshot(batches[0], 6, snapshot.lengths())
    other.restore(snapshots.from_arrays(arrays, like))
    with other:
        list(other.train(batches[6:]))
    assert other.skipped_updates == [1, 1, 1]
    values = jax.tree.leaves(oracle.values(other.network))
    assert_same(values, train(batches, **options)[1])


def test_a_run_reports_what_it_left_out(tmp_path, monkeypatch, capsys):
    config = digits.get_config()
    config.update(
        num_epochs=3,
        learning_rate_milestones=(),
        skip_nonfinite=1,
        clip_norm=1.0,
        progress=False,
    )
    experiment = training.prepare(config, tmp_path)

    class Poisoned:
        """Training batches, of which one is not finite."""

        def __init__(self, batches):
            self._batches, self._drawn = batches, 0

        def __getattr__(self, name):
            return getattr(self._batches, name)

        def __iter__(self):
            return self

        def __next__(self):
            batch, self._drawn = next(self._batches), self._drawn + 1
            if self._drawn == 5:
                batch["image"] = jnp.full_like(batch["image"], jnp.nan)
            return batch

    object.__setattr__(experiment, "train_batches", Poisoned(experiment.train_batches))
    summary = training.run(experiment)
    assert summary["skipped_updates"] == [1, 1]
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [x["skipped_updates"] for x in lines if "test_loss" in x] == [2] * 3
    assert "skipped updates 1, 1" in capsys.readouterr().out
    assert summary["final_test_accuracy"] > 0.5


# --- loss scaling -----------------------------------------------------------------


@pytest.mark.parametrize("backward", ["stored", "replay"])
def test_a_scale_changes_rounding_alone(backward):
    plain = train(backward=backward, shrink=0.5)
    scaled = train(backward=backward, shrink=0.5, loss_scale=2.0**12)
    np.testing.assert_allclose(scaled[0], plain[0], rtol=1e-12)
    assert_same(scaled[1], plain[1], rtol=1e-11, atol=1e-14)


class Faint(nnx.Module):
    """A block that makes cotangents too small for float16."""

    def __init__(self, factor):
        self.scale = nnx.Param(jnp.ones((), jnp.float32))
        self._factor = factor

    def __call__(self, x):
        y = x.astype(jnp.float16) * self.scale[...].astype(jnp.float16)
        return (y * self._factor).astype(jnp.float16)


def test_float16_needs_the_scale_where_cotangents_are_small():
    def blocks():
        def linear(width_in, width_out, seed):
            return nnx.Linear(
                width_in,
                width_out,
                dtype=jnp.float16,
                param_dtype=jnp.float32,
                rngs=nnx.Rngs(seed),
            )

        return [linear(6, 5, 0), Faint(jnp.float16(1e-6)), linear(5, 3, 1)]

    batch = {
        "image": np.random.default_rng(0).normal(size=(64, 6)).astype(np.float16),
        "label": np.arange(64, dtype=np.int32) % 3,
    }

    def moved(loss_scale):
        options = {"cuts": (1, 2), "loss_scale": loss_scale, "schedule": "bp"}
        options["optimizer"] = optax.sgd(1.0)
        with make_pipeline(blocks(), **options) as pipeline:
            list(pipeline.train([batch] * 2))
        before, after = (
            nnx.state(network[0], nnx.Param) for network in (blocks(), pipeline.network)
        )
        return jax.tree.leaves(
            jax.tree.map(lambda a, b: abs(a - b).max(), before, after)
        )

    assert max(moved(1.0)) < 1e-7 < max(moved(2.0**12))


@pytest.mark.slow
def test_float16_trains_with_the_scale_that_a_config_takes_by_itself(tmp_path):
    config = digits.get_config()
    config.update(
        num_epochs=3, learning_rate_milestones=(), dtype="float16", progress=False
    )
    summary = training.train_and_evaluate(config, tmp_path)
    assert summary["final_test_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss_scale": 0.0}, "loss_scale must be a positive, finite number; got 0.0"),
        ({"loss_scale": math.inf}, "got inf"),
        ({"skip_nonfinite": -1}, "skip_nonfinite must be 0 .none. or more"),
    ],
)
def test_wrong_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(**option)
