import functools
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fdg_jax as fdg
import oracle
from configs import digits
from fdg_jax import data, from_config, optimizers, remedies
from fdg_jax.stage import StageInfo

pytestmark = pytest.mark.usefixtures("compiled_quickly")

IDENTITY = [name for name in remedies.names() if name != "nesterov_lookahead"]
NETWORK = oracle.make_network(num_blocks=2)
ADAM = [name for name in IDENTITY if name != "spike_compensation"]


def follow(optimizer, gradients, params):
    state, history = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        history.append(np.asarray(params))
    return history


@settings(max_examples=25)
@given(
    st.sampled_from(
        [*((name, "sgd") for name in IDENTITY), *((name, "adam") for name in ADAM)]
    ),
    st.lists(
        st.lists(st.floats(-9, 9), min_size=2, max_size=2), min_size=1, max_size=4
    ),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 1.0]),
)
def test_without_staleness_a_remedy_is_the_plain_optimizer(
    named, gradients, momentum, weight_decay, clip_norm
):
    name, optimizer = named
    options = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "clip_norm": clip_norm,
    }
    remedy = remedies.create(name, optimizer, 0.1, num_updates=3, **options)
    params = jnp.asarray([1.0, -0.5])
    got = follow(remedy(StageInfo(1, 2, 0)), gradients, params)
    plain = optimizers.create(optimizer, 0.1, **options)
    np.testing.assert_array_equal(got, follow(plain, gradients, params))


def test_the_strength_of_delay_compensation_is_its_authors_unless_given():
    gradient = np.asarray([2.0])
    start, late = jnp.zeros(1), jnp.ones(1)

    def compensation(name, **options):
        create = functools.partial(remedies.create, name, "sgd", 1.0, momentum=0.0)
        optimizer = create(**options)(StageInfo(0, 2, 1))
        update, _ = optimizer.update(gradient, optimizer.init(start), late)
        return -float(update[0]) - 2.0

    assert compensation("dc_asgd") == pytest.approx(0.04 * 4)
    assert compensation("dc_asgd", strength=0.5) == pytest.approx(0.5 * 4)
    mean_square = 0.05 * 4
    root = (mean_square + 1e-7) ** 0.5
    assert compensation("dc_asgd_adaptive") == pytest.approx(2.0 / root * 4)
    assert compensation("dc_asgd_adaptive", strength=0.0) == pytest.approx(0.0)


def create(name="none", optimizer="sgd", **options):
    return remedies.create(name, optimizer, 0.1, **{"num_updates": 9} | options)


def make_pipeline(name="none", *, optimizer=None, **arguments):
    return fdg.Pipeline(
        NETWORK,
        loss_fn=fdg.softmax_cross_entropy,
        optimizer=optimizer or create(name),
        cuts=(1,),
        engine="serial",
        **{"num_stages": 2} | arguments,
    )


def test_an_unknown_name_is_refused_with_the_valid_ones_and_the_nearest():
    rule = (
        "remedy must be one of none, staleness_aware, weight_prediction, "
        "spike_compensation, nesterov_lookahead, pipemare, dc_asgd, dc_asgd_adaptive; "
        "got 'pipmare'; did you mean 'pipemare'?"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        create("pipmare")


@pytest.mark.parametrize("name", ["spike_compensation", "nesterov_lookahead"])
def test_what_replaces_momentum_is_refused_without_it(name):
    with pytest.raises(
        ValueError, match=f"{name}.*got optimizer 'adam'; use 'sgd', or"
    ):
        create(name, "adam")


@pytest.mark.parametrize("name", ["weight_prediction", "dc_asgd", "dc_asgd_adaptive"])
def test_what_wants_the_forwards_weights_is_refused_with_replay(name):
    with pytest.raises(
        ValueError, match=f"'{name}'.*got backward 'replay'.*use 'stored'"
    ):
        make_pipeline(name, backward="replay")
    make_pipeline(name, backward="recompute")


@pytest.mark.parametrize("name", [n for n in remedies.names() if n != "none"])
@pytest.mark.parametrize("method", ["gpipe", "adl"])
def test_remedies_are_refused_with_accumulation(name, method):
    arguments = fdg.methods.get(method).arguments(2)
    with pytest.raises(ValueError, match=f"'{name}' with accumulation 4; use"):
        make_pipeline(name, **arguments)
    make_pipeline("none", **arguments)
    arguments = fdg.methods.get(method).arguments(2, accumulation=1)
    make_pipeline(name, **arguments)


def test_an_optimizer_is_told_of_its_stage_before_there_is_a_batch():
    told = []

    def optimizer(stage):
        told.append(stage)
        return optax.sgd(0.1)

    make_pipeline(optimizer=optimizer, accumulation=2, backward="replay")
    assert told == [
        fdg.StageInfo(0, 2, staleness=1, accumulation=2, backward="replay"),
        fdg.StageInfo(1, 2, staleness=0, accumulation=2, backward="replay"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "dc_asgd", "strength": -1.0}, "got -1.0"),
        ({"name": "pipemare", "num_updates": 0}, "got 0"),
        ({"name": "pipemare", "num_updates": None}, "got None; give it a number"),
        ({"name": "pipemare", "momentum": 1.0}, "got 1.0"),
        ({"name": "weight_prediction", "optimizer": "sdg"}, "got 'sdg'"),
    ],
)
def test_wrong_numbers_are_refused_before_there_is_a_stage(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("remedy", "dcasgd", "got 'dcasgd'; did you mean 'dc_asgd'?"),
        ("remedy_epochs", 0, "remedy_epochs must be at least 1; got 0"),
    ],
)
def test_a_config_is_refused_with_the_key_and_its_value(key, value, message):
    config = digits.get_config()
    config[key] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        from_config.check_numbers(config)
        rate = from_config.learning_rate(config, 10)
        from_config.create_pipeline(config, rate, cuts="1", network=NETWORK)


def test_a_config_gives_a_remedy_its_numbers(monkeypatch):
    given = {}

    def record(name, optimizer, learning_rate, **options):
        given.update(options, name=name, optimizer=optimizer)
        return lambda stage: optax.sgd(0.1)

    monkeypatch.setattr(remedies, "create", record)
    config = digits.get_config()
    config.update(remedy="pipemare", remedy_epochs=3, remedy_strength=0.5)
    config.update(batch_size=100)
    rate = from_config.learning_rate(config, 10)
    from_config.create_pipeline(config, rate, cuts="1", network=NETWORK)
    assert given["name"] == "pipemare"
    assert given["num_updates"] == 3 * (data.spec("digits").num_train // 100)
    assert given["strength"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remedy": "dc_asgd", "backward": "replay"}, "got backward 'replay'"),
        ({"remedy": "pipemare", "method": "gpipe"}, "accumulation 4"),
    ],
)
def test_a_config_whose_values_do_not_go_together_is_refused(changes, message):
    config = digits.get_config()
    config.update(changes)
    rate = from_config.learning_rate(config, 10)
    with pytest.raises(ValueError, match=message):
        from_config.create_pipeline(config, rate, cuts="1", network=NETWORK)
