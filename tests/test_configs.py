import dataclasses
import functools
import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import train
from configs import default
from fdg_jax import blocks, from_config, models, optimizers, partition, training
from fdg_jax.data import synthetic

CONFIGS = sorted(path.stem for path in train.CONFIGS.glob("[!_]*.py"))
IMAGE_SHAPE = {"cifar10": (32, 32, 3), "cifar100": (32, 32, 3), "digits": (8, 8, 1)}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10}


def _module(name):
    return importlib.import_module(f"configs.{name}")


@functools.cache
def _abstract_network(name, in_channels, num_classes):
    return nnx.eval_shape(
        lambda: models.create(name, in_channels=in_channels, num_classes=num_classes)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_line_takes_every_config(name):
    config, workdir = train.parse(["train.py", f"--config={train.CONFIGS}/{name}.py"])
    assert config.to_dict() == _module(name).get_config().to_dict()
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}-[0-9a-f]{{8}}", workdir.name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_cuts_and_schedules_its_network(name):
    config = _module(name).get_config()
    shape, num_classes = IMAGE_SHAPE[config.dataset], NUM_CLASSES[config.dataset]
    network = _abstract_network(config.network, shape[-1], num_classes)
    cuts = partition.resolve_cuts(
        config.cuts,
        num_stages=config.num_stages,
        num_blocks=len(network),
        network_name=network.name,
    )
    assert len(cuts) == config.num_stages - 1
    resolved = from_config.method_arguments(config)["schedule"]
    assert resolved.staleness == (1, 0)
    shapes = blocks.trace_shapes(
        *blocks.split_network(network),
        jax.ShapeDtypeStruct((config.batch_size, *shape), jnp.float32),
    )
    assert shapes[-1].shape == (config.batch_size, num_classes)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_learning_rate_for_all_its_epochs(name):
    config = _module(name).get_config()
    rate = optimizers.learning_rate(
        config.learning_rate,
        steps_per_epoch=10,
        milestones=config.learning_rate_milestones,
        decay=config.learning_rate_decay,
        warmup_epochs=config.warmup_epochs,
    )
    assert config.learning_rate_milestones[-1] < config.num_epochs
    assert rate.at(10 * config.num_epochs - 1) == rate.values[-1]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "default"])
def test_every_experiment_has_a_lab_note_that_agrees_with_it(name):
    module = _module(name)
    note, config = module.__doc__, module.get_config()
    assert "python train.py" in note
    if config.dataset == "digits":
        return
    assert f"--config=configs/{name}.py" in note
    (cut,) = partition.PAPER_CUTS[config.network][config.num_stages]
    assert f"cut at block {cut}, beta = {config.shrink}," in note
    resolved = from_config.method_arguments(config)["schedule"]
    assert f'schedule "{resolved.name}"' in note
    # The table holds the error of this very beta, and of no shrinking, at K = 2.
    for beta in (config.shrink, 1.0):
        (error,) = re.findall(rf"K = 2  FDG, beta = {beta} +([\d.]+)", note)
        assert 3.0 < float(error) < 30.0


def test_the_paper_trains_like_the_default():
    config = default.get_config()
    rate = optimizers.learning_rate(
        config.learning_rate,
        steps_per_epoch=1,
        milestones=config.learning_rate_milestones,
        decay=config.learning_rate_decay,
    )
    drops = {0: 0.1, 149: 0.1, 150: 0.01, 225: 1e-3, 275: 1e-4, 299: 1e-4}
    assert all(math.isclose(rate.at(epoch), value) for epoch, value in drops.items())


def test_every_key_is_explained():
    source = pathlib.Path(default.__file__).read_text()
    keys = re.findall(r"^    config\.(\w+) = ", source, re.MULTILINE)
    assert sorted(keys) == sorted(default.get_config())


@pytest.mark.parametrize(
    "name",
    ["cifar10_resnet20", pytest.param("cifar100_wrn28_10", marks=pytest.mark.slow)],
)
def test_two_steps_of_a_config_with_a_smaller_network(tmp_path, monkeypatch, name):
    def two_batches(name, data_dir):
        num_classes = NUM_CLASSES[name]
        return synthetic.load(2 * config.batch_size, 10, num_classes=num_classes)

    config = _module(name).get_config()
    spec = dataclasses.replace(
        training.data.spec(config.dataset), num_train=2 * config.batch_size
    )
    monkeypatch.setattr(training.data, "load", two_batches)
    monkeypatch.setattr(training.data, "spec", lambda name: spec)
    config.network = {"resnet20": "resnet8", "wrn28_10": "wrn10_1"}[config.network]
    config.cuts = "3"
    config.num_epochs = 1
    summary = training.train_and_evaluate(config, tmp_path)
    assert summary["steps"] == 2
    assert summary["shrink"] == config.shrink
