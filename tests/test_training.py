import dataclasses
import itertools
import json
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_threads
import pytest

import fdg_jax as fdg
from configs import digits
from fdg_jax import checkpoint, optimizers, training

# --- the learning rate ------------------------------------------------------------


def test_learning_rate_drops_at_milestones_and_is_low_in_the_warmup():
    rate = optimizers.learning_rate(
        0.1, steps_per_epoch=10, milestones=(3, 5), warmup_epochs=1
    )
    expected = [0.01] * 10 + [0.1] * 20 + [0.01] * 20 + [0.001] * 20
    schedule = rate.schedule()
    assert [rate.at(count) for count in range(70)] == pytest.approx(expected)
    assert [float(schedule(count)) for count in range(70)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"milestones": (5, 3)}, r"increase.*\(5, 3\)"),
        ({"milestones": (3, 3)}, r"increase.*\(3, 3\)"),
        ({"milestones": (0, 3)}, r"increase.*\(0, 3\)"),
        ({"milestones": (2,), "warmup_epochs": 2}, "after the warm-up.*=2"),
        ({"milestones": (1.5,)}, r"whole epochs.*\(1.5,\)"),
        ({"initial": 0.0}, "learning_rate must be positive.*0.0"),
        ({"initial": float("nan")}, "learning_rate must be positive.*nan"),
        ({"decay": -1.0}, "learning_rate_decay must be positive.*-1.0"),
        ({"warmup_factor": 0.0}, "warmup_factor must be positive.*0.0"),
        ({"warmup_epochs": -1}, "warmup_epochs cannot be negative.*-1"),
    ],
)
def test_a_wrong_learning_rate_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        optimizers.learning_rate(**{"initial": 0.1, "steps_per_epoch": 10} | change)


# --- the optimizer ----------------------------------------------------------------


def _follow(optimizer, param, grads):
    """Returns a parameter after one update per gradient."""
    state = optimizer.init(param)
    for grad in grads:
        updates, state = optimizer.update(grad, state, param)
        param = optax.apply_updates(param, updates)
    return param


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=5), rng.normal(size=(7, 5))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_the_recursion_of_its_docstring(problem, momentum):
    w, grads = problem
    rate = optimizers.learning_rate(0.5, steps_per_epoch=2, milestones=(1, 3))
    sgd = optimizers.create(
        "sgd", rate.schedule(), momentum=momentum, weight_decay=0.01
    )
    trained = _follow(sgd, jnp.asarray(w), jnp.asarray(grads))
    m = np.zeros_like(w)
    for n, g in enumerate(grads):
        m = momentum * m + g + 0.01 * w
        w = w - 0.5 * 0.1 ** ((n >= 2) + (n >= 6)) * m
    np.testing.assert_allclose(trained, w, rtol=1e-12)


def test_adam_decouples_the_decay(problem):
    w, grads = problem
    adam = optimizers.create("adam", 0.1, weight_decay=0.01)
    trained = _follow(adam, jnp.asarray(w), jnp.asarray(grads))
    m, v = np.zeros_like(w), np.zeros_like(w)
    for n, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        direction = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
        w = w - 0.1 * (direction + 0.01 * w)
    np.testing.assert_allclose(trained, w, rtol=1e-10)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_parameters_keep_their_dtype(name, dtype):
    rate = optimizers.learning_rate(0.5, steps_per_epoch=2, milestones=(1,))
    optimizer = optimizers.create(name, rate.schedule(), weight_decay=0.1)
    trained = _follow(optimizer, jnp.ones(3, dtype), jnp.ones((3, 3), dtype))
    assert trained.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sdg"}, "one of sgd, adam.*'sdg'"),
        ({"momentum": 1.0}, r"\[0, 1\).*1.0"),
        ({"weight_decay": -0.1}, "weight_decay.*-0.1"),
    ],
)
def test_a_wrong_optimizer_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optimizers.create(**{"name": "sgd", "learning_rate": 0.1} | arguments)


# --- a run ------------------------------------------------------------------------


def _config(**changes):
    config = digits.get_config()
    config.update(
        {"num_epochs": 2, "learning_rate_milestones": (), "progress": False} | changes
    )
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs: its config, its workdir and what it returned."""
    config, workdir = _config(), tmp_path_factory.mktemp("run")
    return config, workdir, training.train_and_evaluate(config, workdir)


def _lines(workdir):
    return [json.loads(line) for line in open(workdir / "metrics.jsonl")]


def test_a_run_leaves_its_files(finished):
    config, workdir, summary = finished
    names = {path.name.split(".tfevents.")[0] for path in workdir.iterdir()}
    files = {"config.json", "metrics.jsonl", "summary.json", ".lock"}
    assert names == files | {"checkpoints", "events.out"}
    saved = json.loads((workdir / "config.json").read_text())
    assert saved == config.to_dict() | {"learning_rate_milestones": []}
    assert json.loads((workdir / "summary.json").read_text()) == summary


def test_the_metrics_of_a_run(finished):
    config, workdir, _ = finished
    steps_per_epoch = 1437 // config.batch_size
    lines = _lines(workdir)
    logged = [line for line in lines if "train_loss" in line]
    evaluated = [line for line in lines if "test_loss" in line]
    every = config.log_every_steps
    assert 2 * steps_per_epoch % every  # so the last lines are of a shorter window
    assert [line["step"] for line in logged] == [
        *range(every, 2 * steps_per_epoch + 1, every),
        2 * steps_per_epoch,
    ]
    assert [line["step"] for line in evaluated] == [
        steps_per_epoch,
        2 * steps_per_epoch,
    ]
    assert all(line["epoch"] == line["step"] / steps_per_epoch for line in lines)
    for line in logged:
        rate = {"images_per_second"} & line.keys()  # not while compiling
        assert line.keys() - rate == {
            *("step", "epoch", "train_loss", "train_accuracy", "learning_rate")
        }
    assert all(line["learning_rate"] == config.learning_rate for line in logged)
    assert "images_per_second" not in logged[0]
    assert logged[-1]["images_per_second"] > 0
    for line in evaluated:
        assert line.keys() == {"step", "epoch", "test_loss", "test_accuracy"}
    assert logged[-1]["train_loss"] < 0.7 * logged[0]["train_loss"]


def test_the_summary_of_a_run(finished):
    config, workdir, summary = finished
    accuracies = [
        line["test_accuracy"] for line in _lines(workdir) if "test_accuracy" in line
    ]
    assert summary["final_test_accuracy"] == accuracies[-1]
    assert summary["best_test_accuracy"] == max(accuracies)
    assert summary["steps"] == 2 * (1437 // config.batch_size)
    assert summary["seconds"] > 0
    assert summary["num_stages"] == 2
    assert summary["schedule"] == "reference"
    assert summary["staleness"] == [1, 0]
    assert summary["shrink"] == config.shrink
    assert summary["engine"] == "threads"
    assert re.fullmatch(r".+, [1-9]\d* cores", summary["host"])
    assert summary["device_kind"] == jax.devices()[0].device_kind
    versions = summary["versions"]
    assert versions.keys() == {"python", "jax", "jaxlib", "flax", "optax", "fdg_jax"}
    assert versions["jax"] == jax.__version__
    assert versions["fdg_jax"] == fdg.__version__


def test_the_checkpoint_gives_the_final_evaluation_again(finished):
    config, workdir, summary = finished
    network = fdg.models.create(config.network, in_channels=1, seed=config.seed + 1)
    checkpoint.restore_network(network, workdir / "checkpoints", summary["steps"])
    network.eval()
    dataset = fdg.data.load("digits")
    (batch,) = fdg.data.test_batches(dataset, len(dataset.test))
    outputs = network(batch["image"])
    accuracy = (outputs.argmax(-1) == batch["label"]).mean()
    loss = fdg.softmax_cross_entropy(outputs, batch["label"])
    last = _lines(workdir)[-1]
    assert float(accuracy) == pytest.approx(last["test_accuracy"], abs=1e-6)
    assert float(loss) == pytest.approx(last["test_loss"], rel=1e-3)


def test_no_thread_outlives_a_run(finished):
    assert not [t.name for t in threading.enumerate() if "stage" in t.name.lower()]


def test_a_run_again_gives_the_same_numbers(finished, tmp_path):
    def reproducible(workdir):
        return [
            {name: line[name] for name in line if name != "images_per_second"}
            for line in _lines(workdir)
        ]

    config, workdir, _ = finished
    training.train_and_evaluate(config, tmp_path)
    assert reproducible(tmp_path) == reproducible(workdir)


def test_evaluation_every_so_many_epochs_and_at_the_end(tmp_path):
    config = _config(num_epochs=3, eval_every_epochs=2, batch_size=512)
    training.train_and_evaluate(config, tmp_path)
    lines = _lines(tmp_path)
    assert [line["epoch"] for line in lines if "test_loss" in line] == [2.0, 3.0]


def test_a_run_says_what_it_does(tmp_path, capsys):
    config = _config(num_epochs=1, batch_size=512)
    summary = training.train_and_evaluate(config, tmp_path)
    out, err = capsys.readouterr()
    assert out.startswith("stage")
    evaluation, closing = out.splitlines()[-2:]
    accuracy = f"{summary['final_test_accuracy']:.2%}"
    assert evaluation.startswith("epoch 1") and accuracy in evaluation
    assert accuracy in closing and str(tmp_path) in closing
    assert err == ""


@pytest.mark.parametrize(
    "change",
    [
        {
            **{"engine": "fused", "schedule": "paper"},
            **{"num_stages": 3, "cuts": "2,3", "optimizer": "adam"},
            **{"dtype": "bfloat16", "param_dtype": "bfloat16"},
        },
        {"engine": "serial", "backward": "replay", "dropout_rate": 0.1},
    ],
)
def test_other_settings_train(tmp_path, change):
    config = _config(num_epochs=1, batch_size=512, learning_rate=0.01, **change)
    summary = training.train_and_evaluate(config, tmp_path)
    assert summary["steps"] == 2
    assert 0.0 <= summary["final_test_accuracy"] <= 1.0


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = _config(learning_rate=1e30)
    with pytest.raises(fdg.NonFiniteLossError):
        training.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_what_was_trained_before_a_loss_that_is_not_finite_can_be_loaded(
    tmp_path, capsys
):
    """Without any snapshot: five batches, evaluated after two and four."""

    def poisoned(batches):
        yield from itertools.islice(batches, 5)
        batch = next(batches)
        yield {**batch, "label": jnp.full_like(batch["label"], 99)}

    config = _config(batch_size=512, learning_rate=0.01, num_epochs=4)
    experiment = training.prepare(config, tmp_path)
    poisoned_batches = poisoned(experiment.train_batches)
    taken = dataclasses.replace(experiment, train_batches=poisoned_batches)
    with pytest.raises(fdg.NonFiniteLossError, match="batch 5"):
        training.run(taken)
    assert f"first 5 batches is in {tmp_path / 'halted'}" in capsys.readouterr().out

    expected = training.prepare(config, tmp_path / "expected")
    networks, accuracies = [], []
    with expected.pipeline as pipeline:
        for count in (2, 2, 1):
            list(pipeline.train(itertools.islice(expected.train_batches, count)))
            networks.append(checkpoint.network_arrays(pipeline.network))
            metrics = pipeline.evaluate_metrics(expected.test_batches)
            accuracies.append(metrics["accuracy"])
    networks[-1] = checkpoint.network_arrays(pipeline.network)
    best = networks[int(accuracies[1] > accuracies[0])]
    for which, arrays in {"newest": networks[-1], "best": best}.items():
        got = checkpoint.network_arrays(fdg.load(tmp_path, which)[0])
        for name, array in arrays.items():
            # Running statistics have seen the images of the batch that was not used.
            if which == "best" or name.rpartition("/")[-1] not in ("mean", "var"):
                np.testing.assert_array_equal(got[name], array)

    # With labels as they were it begins anew, for there is no snapshot to go on from.
    summary = training.train_and_evaluate(config, tmp_path)
    assert summary["steps"] == 8 and not (tmp_path / "halted").exists()


# --- the timeline -----------------------------------------------------------------


def _trained_batches(workdir):
    events = json.loads((workdir / "timeline.json").read_text())["traceEvents"]
    return {e["args"]["batch"] for e in events if e["name"] == "loss_step"}


def test_a_run_writes_its_timeline_and_prints_a_table(tmp_path, capsys):
    training.train_and_evaluate(
        _config(num_epochs=1, batch_size=512, timeline=True), tmp_path
    )
    assert _trained_batches(tmp_path) == {0, 1}
    header, *rows = capsys.readouterr().out.splitlines()[-3:]
    assert "busy" in header
    assert [row[:7] for row in rows] == ["stage 0", "stage 1"]


def test_an_interrupted_run_writes_its_timeline_too(tmp_path, monkeypatch):
    def interrupt(report, metrics, batch=training.Report.batch):
        batch(report, metrics)
        if report.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Report, "batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train_and_evaluate(_config(timeline=True), tmp_path)
    assert _trained_batches(tmp_path) >= {0, 1, 2, 3, 4}
    assert not own_threads.left()


# --- what is refused before anything is written -----------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "resnet21"}, "resnet21.*resnet20"),
        ({"dataset": "cifar"}, "cifar.*cifar10"),
        ({"init": "hee"}, "he_normal.*'hee'"),
        ({"schedule": "refrence"}, "'refrence'.*'reference'"),
        ({"schedule": "3,1,0"}, "schedule"),
        ({"cuts": "4,7"}, "cuts"),
        ({"cuts": "paper"}, "resnet8"),
        ({"engine": "thread"}, "'thread'.*'threads'"),
        ({"backward": "store"}, "stored.*'store'"),
        ({"optimizer": "sdg"}, "sgd, adam.*'sdg'"),
        ({"dtype": "float64"}, "dtype.*float32, bfloat16.*'float64'"),
        ({"param_dtype": "f32"}, "param_dtype.*float32, bfloat16.*'f32'"),
        ({"shrink": 0.0}, "shrink.*0.0"),
        ({"num_stages": 6}, "6"),
        ({"num_stages": 0}, "num_stages must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 2000}, "2000.*1437"),
        ({"log_every_steps": 0}, "log_every_steps must be at least 1; got 0"),
        ({"seed": -1}, "seed.*-1"),
        ({"learning_rate_milestones": (2, 1)}, r"increase.*\(2, 1\)"),
    ],
)
def test_a_wrong_config_is_refused_and_nothing_is_written(tmp_path, change, message):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message) as refusal:
        training.train_and_evaluate(_config(**change), workdir)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("config.json", "config.json, which cannot be read.*choose another"),
        ("metrics.jsonl", "holds metrics.jsonl but no config.json; choose another"),
    ],
)
def test_files_that_no_run_can_go_on_with_are_left_alone(tmp_path, held, message):
    (tmp_path / held).write_text("kept")
    with pytest.raises(ValueError, match=message):
        training.prepare(_config(), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_a_workdir_is_a_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for workdir in (file, file / "below"):
        with pytest.raises(ValueError, match="workdir must be a folder"):
            training.prepare(_config(), workdir)
