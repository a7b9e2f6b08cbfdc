"""Any network, batch and optimizer: the same numbers as a plain loop (``plain_loop``).

With schedule "bp" and nothing shrunk a pipeline is back-propagation, so its losses,
parameters and statistics are those of Flax NNX and Optax on the whole network. Started
as a program, this file prints what they differ by, per network and optimizer::

    python tests/test_plain_loop.py [--slow]
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_loop
import pytest
from plain_loop import CASES, OPTIMIZERS, Case, Loop

import fdg_jax as fdg
import oracle

pytestmark = pytest.mark.usefixtures("compiled_quickly")

TOLERANCE = 1e-9
ENGINES = ("serial", "threads", "fused")
BACKWARDS = ("stored", "recompute", "replay")


def train(case, batches, optimizer, *, num_stages=1, engine="serial", **options):
    """Trains a pipeline; returns the metrics of the batches, and the network."""
    pipeline = fdg.Pipeline(
        case.make(),
        **{"loss_fn": case.loss_fn, "schedule": "bp", **options},
        optimizer=optimizer,
        num_stages=num_stages,
        cuts=case.cuts.get(num_stages, ()),
        engine=engine,
    )
    with pipeline:
        metrics = list(pipeline.train(batches))
    return metrics, pipeline.network


def difference(metrics, network, expected):
    """Largest relative difference of the losses and of the arrays of all blocks."""
    losses = [m["loss"] for m in metrics]
    return oracle.relative_error(
        (losses, oracle.values(network)),
        (expected.losses, oracle.values(expected.network)),
    )


# Every network with every optimizer


@functools.cache
def loop_of(name):
    return Loop(CASES[name].make(), CASES[name].loss_fn)


@functools.cache
def expected_of(name, optimizer):
    return loop_of(name).train(CASES[name].batches(), OPTIMIZERS[optimizer])


def settings_of(name, optimizer):
    """Three settings, with each engine, number of stages and way of the backward once.

    All 27 occur with each network, and with each optimizer.
    """
    i, j = list(CASES).index(name), list(OPTIMIZERS).index(optimizer)
    return [
        {
            "num_stages": 1 + (i + j + r) % 3,
            "engine": ENGINES[r],
            "backward": BACKWARDS[(i // 3 + j // 3 + 2 * r) % 3],
        }
        for r in range(3)
    ]


QUICK = {
    "gpt": ("adamw_path", "muon", None),
    "structures": (None, "multi_transform", "lion"),
    "unet": (None, "schedule_free", None),
    "lstm": ("muon", None, "adamw_path"),
    "convnet": ("sgd", None, "lamb"),
    "dict_params": (None, "muon", "multi_transform"),
    "linen": ("adamw_ndim", "adafactor", None),
    "remat": ("schedule_free", None, "lars"),
    "centred": (None, "lion", "adamw_ndim"),
}


def is_quick(name, optimizer, index):
    """Whether it is one of the few that are not slow, at most two per network."""
    return QUICK[name][index] == optimizer


RUNS = [
    (name, optimizer, index)
    for name, optimizer in itertools.product(CASES, OPTIMIZERS)
    for index in range(3)
]


def label_of(name, optimizer, index):
    setting = settings_of(name, optimizer)[index]
    return "-".join([name, optimizer, *map(str, setting.values())])


@pytest.mark.parametrize(
    "name, optimizer, index",
    [
        pytest.param(
            *run, id=label_of(*run), marks=[] if is_quick(*run) else pytest.mark.slow
        )
        for run in RUNS
    ],
)
def test_a_network_trains_as_in_a_plain_loop(name, optimizer, index):
    assert run_difference(name, optimizer, index) < TOLERANCE


def run_difference(name, optimizer, index):
    setting = settings_of(name, optimizer)[index]
    case = CASES[name]
    trained = train(case, case.batches(), OPTIMIZERS[optimizer], **setting)
    return difference(*trained, expected_of(name, optimizer))


# Many equal blocks in a row


@functools.cache
def deep(num_equal):
    # Cuts so that one of the stages has all of the equal blocks, or all but one.
    return Case(
        functools.partial(plain_loop.make_deep, num_equal),
        plain_loop.make_vector_batch,
        plain_loop.mean_loss,
        {2: (num_equal,), 3: (1, num_equal)},
    )


@functools.cache
def deep_loop(num_equal):
    return Loop(deep(num_equal).make(), deep(num_equal).loss_fn)


DEEP = [
    (31, "adamw_ndim", {"num_stages": 1, "engine": "serial"}),
    (32, "muon", {"num_stages": 1, "engine": "serial"}),
    (33, "adamw_path", {"num_stages": 2, "engine": "threads", "backward": "replay"}),
]
DEEP_SLOW = [
    (32, "adafactor", {"num_stages": 2, "engine": "serial", "backward": "recompute"}),
    (33, "adafactor", {"num_stages": 3, "engine": "threads"}),
    (32, "lamb", {"num_stages": 1, "engine": "fused"}),
    (32, "adamw_ndim", {"num_stages": 2, "engine": "threads", "backward": "replay"}),
    (31, "lamb", {"num_stages": 2, "engine": "threads", "backward": "recompute"}),
    (31, "muon", {"num_stages": 3, "engine": "threads"}),
    (31, "adafactor", {"num_stages": 2, "engine": "serial", "backward": "replay"}),
    (31, "adamw_path", {"num_stages": 2, "engine": "fused"}),
    (32, "adamw_path", {"num_stages": 3, "engine": "threads"}),
    (32, "adamw_ndim", {"num_stages": 3, "engine": "fused", "backward": "recompute"}),
    (33, "adamw_ndim", {"num_stages": 1, "engine": "serial"}),
    (33, "muon", {"num_stages": 2, "engine": "fused", "backward": "replay"}),
    (33, "lamb", {"num_stages": 3, "engine": "threads", "backward": "recompute"}),
]


@pytest.mark.parametrize(
    "num_equal, optimizer, setting",
    [
        *(pytest.param(*run, id=f"{run[0]}-{run[1]}") for run in DEEP),
        *(
            pytest.param(*run, id=f"{run[0]}-{run[1]}-slow", marks=pytest.mark.slow)
            for run in DEEP_SLOW
        ),
    ],
)
def test_equal_blocks_in_a_row_train_as_in_a_plain_loop(num_equal, optimizer, setting):
    case = deep(num_equal)
    optimizer = OPTIMIZERS[optimizer]
    trained = train(case, case.batches(), optimizer, **setting)
    expected = deep_loop(num_equal).train(case.batches(), optimizer)
    assert difference(*trained, expected) < TOLERANCE


# What an optimizer sees


def recording(seen):
    """An optimizer that notes the path and shape of each array that it is given."""

    def note(params):
        for path, array in jax.tree.leaves_with_path(params):
            seen[path] = array.shape

    def init(params):
        note(params)
        return optax.EmptyState()

    def update(grads, state, params):
        note(grads)
        note(params)
        return jax.tree.map(lambda g: -0.1 * g, grads), state

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    "name, num_stages, engine",
    [*itertools.product(["dict_params"], [1, 3], ENGINES), ("deep", 2, "serial")],
)
def test_an_optimizer_sees_single_blocks_by_their_position(name, num_stages, engine):
    case = deep(33) if name == "deep" else CASES[name]
    expected = {}
    recording(expected).init(plain_loop.params_of(case.make()))
    seen = {}
    train(
        case, case.batches()[:1], recording(seen), num_stages=num_stages, engine=engine
    )
    assert seen == expected


@pytest.mark.parametrize("optimizer", ["clip", "adamw_mask"])
def test_an_optimizer_of_one_stage_may_want_the_whole_network(optimizer):
    """A norm over all gradients, and a mask that is no function but a tree."""
    case = CASES["convnet"]
    mask = plain_loop.by_path(plain_loop.params_of(case.make()))
    optimizer = {
        "clip": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        "adamw_mask": optax.adamw(1e-2, weight_decay=0.5, mask=mask),
    }[optimizer]
    expected = loop_of("convnet").train(case.batches(), optimizer)
    trained = train(case, case.batches(), optimizer)
    assert difference(*trained, expected) < TOLERANCE


def test_an_optimizer_may_be_a_function_of_the_stage():
    case = CASES["structures"]
    trained = train(
        case, case.batches(), lambda stage: OPTIMIZERS["adamw_path"], num_stages=3
    )
    assert difference(*trained, expected_of("structures", "adamw_path")) < TOLERANCE


# What a batch may be


IMAGES = {
    "array": lambda x: x,
    "tuple": lambda x: (x, None),
    "dict": lambda x: {"x": x, "mask": None},
    "nested": lambda x: {"x": x, "mask": [None, (None, None)]},
}
LABELS = {
    "array": lambda label, weight: label,
    "dict": lambda label, weight: {"class": label, "weight": None},
    "weights": lambda label, weight: {"class": label, "weight": weight},
    "none": lambda label, weight: None,
}


def make_structured_batch(image, label, rng, size=8):
    classes = rng.integers(0, 3, size).astype(np.int32)
    return {
        "image": IMAGES[image](rng.normal(size=(size, 6))),
        "label": LABELS[label](classes, rng.uniform(0.1, 2.0, size)),
    }


def structured_case(image, label):
    return Case(
        plain_loop.make_reader,
        functools.partial(make_structured_batch, image, label),
        plain_loop.structured_loss,
        {2: (1,), 3: (1, 2)},
    )


def structured_runs():
    """Each image with each label: one engine each, and the others slowly."""
    for i, j in itertools.product(range(len(IMAGES)), range(len(LABELS))):
        for k, engine in enumerate(ENGINES):
            run = (list(IMAGES)[i], list(LABELS)[j], engine, 1 + (2 * i + k) % 3)
            marks = [] if (i + j + k) % 3 == 0 else pytest.mark.slow
            yield pytest.param(*run, marks=marks)


@pytest.mark.parametrize("image, label, engine, num_stages", list(structured_runs()))
def test_a_batch_trains_as_in_a_plain_loop(image, label, engine, num_stages):
    case = structured_case(image, label)
    optimizer = OPTIMIZERS["sgd"]
    trained = train(
        case, case.batches(), optimizer, num_stages=num_stages, engine=engine
    )
    expected = Loop(case.make(), case.loss_fn).train(case.batches(), optimizer)
    assert difference(*trained, expected) < TOLERANCE


# Several batches to an update


ACCUMULATED = {
    # Sums and counts, of tokens and of weights; means over batches of several sizes.
    "tokens": (CASES["gpt"], [4] * 10, 2),
    "weights_and_sizes": (structured_case("dict", "weights"), [4, 1, 3] * 3, 3),
    "weights": (structured_case("dict", "weights"), [8] * 10, 2),
    "sizes": (structured_case("tuple", "array"), [8, 4] * 5, 2),
    "sizes_and_statistics": (deep(3), [8, 3, 3] * 3, 3),
    "same_sizes": (deep(3), [8] * 10, 2),
}


def accumulated_runs():
    """One engine each, and the others slowly; fused takes batches of one size only."""
    for i, (name, (_, sizes, _)) in enumerate(ACCUMULATED.items()):
        engines = ENGINES if len(set(sizes)) == 1 else ENGINES[:2]
        for k, engine in enumerate(engines):
            run = (name, 2 + (i + k) // 2 % 2, engine, BACKWARDS[(i + k) % 3])
            marks = [] if k == i % len(engines) else pytest.mark.slow
            yield pytest.param(*run, marks=marks)


@pytest.mark.parametrize("name, num_stages, engine, backward", list(accumulated_runs()))
def test_accumulation_sums_what_a_plain_loop_sums(name, num_stages, engine, backward):
    case, sizes, accumulation = ACCUMULATED[name]
    optimizer = OPTIMIZERS["adamw_path"]
    batches = case.batches(sizes)
    trained = train(
        case,
        batches,
        optimizer,
        num_stages=num_stages,
        engine=engine,
        backward=backward,
        accumulation=accumulation,
    )
    loop = Loop(case.make(), case.loss_fn)
    expected = loop.train(batches, optimizer, accumulation)
    assert difference(*trained, expected) < TOLERANCE


# Metrics and evaluation


def token_hits(outputs, label):
    """Share of the known tokens that are guessed, as (sum, count)."""
    known = label != -100
    return ((outputs.argmax(-1) == label) & known).sum(), known.sum()


def mean_confidence(outputs, label):
    return jax.nn.softmax(outputs).max(-1).mean()


def concatenate(batches):
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


METRICS = {"hits": token_hits, "confidence": mean_confidence}
RAGGED = {
    "tokens": (CASES["gpt"], METRICS),
    "statistics": (deep(3), {"confidence": mean_confidence}),
    "weights": (structured_case("tuple", "weights"), {}),
}


def evaluated(name, sizes, evaluation, num_stages=2, engine="serial"):
    """Metrics of a trained pipeline over batches, and what the plain loop has."""
    case, metrics = RAGGED[name]
    optimizer = OPTIMIZERS["sgd"]
    batches = case.batches(sizes)
    pipeline = fdg.Pipeline(
        case.make(),
        loss_fn=case.loss_fn,
        optimizer=optimizer,
        num_stages=num_stages,
        cuts=case.cuts.get(num_stages, ()),
        schedule="bp",
        engine=engine,
        **({"metrics": metrics} if metrics else {}),
    )
    with pipeline:
        list(pipeline.train(batches))
        got = pipeline.evaluate_metrics(evaluation)
    loop = Loop(case.make(), case.loss_fn).train(batches, optimizer)
    whole = concatenate(evaluation)
    expected = {
        key: plain_loop.evaluate(loop.network, whole, function)
        for key, function in {"loss": case.loss_fn, **metrics}.items()
    }
    return got, expected


@pytest.mark.parametrize(
    "name, engine",
    [
        ("tokens", "serial"),
        *(
            pytest.param("tokens", engine, marks=pytest.mark.slow)
            for engine in ("threads", "fused")
        ),
        *itertools.product(["statistics", "weights"], ENGINES),
    ],
)
def test_evaluation_of_ragged_batches_is_that_of_the_whole_set(name, engine):
    evaluation = RAGGED[name][0].batches([5, 2, 5, 2], seed=1)
    num_stages = 1 + ENGINES.index(engine)
    got, expected = evaluated(name, [5, 5], evaluation, num_stages, engine)
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=TOLERANCE)


def test_evaluation_takes_a_batch_of_which_nothing_counts():
    evaluation = RAGGED["weights"][0].batches([8, 8, 8], seed=1)
    evaluation[1]["label"]["weight"][:] = 0.0
    got, expected = evaluated("weights", [8], evaluation)
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    "engine", ["serial", "threads", pytest.param("fused", marks=pytest.mark.slow)]
)
def test_the_users_metrics_come_with_each_batch(engine):
    case, batches = CASES["gpt"], CASES["gpt"].batches()
    got, _ = train(
        case,
        batches,
        OPTIMIZERS["sgd"],
        num_stages=2,
        engine=engine,
        metrics=METRICS,
    )
    expected = expected_of("gpt", "sgd")
    for number, (batch, outputs) in enumerate(
        zip(batches, expected.outputs, strict=True)
    ):
        hits, count = token_hits(outputs, jnp.asarray(batch["label"]))
        assert got[number] == pytest.approx(
            {
                "batch": number,
                "loss": expected.losses[number],
                "hits": float(hits / count),
                "confidence": float(mean_confidence(outputs, None)),
            },
            rel=TOLERANCE,
        )


def test_accuracy_comes_by_itself_with_the_librarys_loss_only():
    case, optimizer = structured_case("array", "array"), OPTIMIZERS["sgd"]
    batches = case.batches()
    own, _ = train(case, batches, optimizer)
    assert own[3].keys() == {"batch", "loss"}
    library, _ = train(case, batches, optimizer, loss_fn=fdg.softmax_cross_entropy)
    trained = Loop(case.make(), case.loss_fn).train(batches, optimizer)
    accuracy = float((trained.outputs[3].argmax(-1) == batches[3]["label"]).mean())
    expected = {"batch": 3, "loss": trained.losses[3], "accuracy": accuracy}
    assert library[3] == pytest.approx(expected, rel=TOLERANCE)


def test_evaluation_says_before_which_batch_it_was():
    case = structured_case("array", "array")
    pipeline = fdg.Pipeline(
        case.make(),
        loss_fn=case.loss_fn,
        optimizer=OPTIMIZERS["sgd"],
        num_stages=2,
        cuts=case.cuts[2],
        engine="serial",
    )
    with pipeline:
        list(pipeline.train(case.batches()[:3]))
        assert pipeline.evaluate_metrics(case.batches()[:2])["batch"] == 3


@pytest.mark.parametrize("trained", [False, True])
def test_a_pipelines_network_is_in_evaluation_mode(trained):
    case, batches = CASES["convnet"], CASES["convnet"].batches()
    batches = batches if trained else []
    _, network = train(case, batches, OPTIMIZERS["sgd"], num_stages=2)
    expected = loop_of("convnet").train(batches, OPTIMIZERS["sgd"])
    [batch] = case.batches([8], seed=1)
    got = plain_loop.call(network, batch["image"])
    outputs = plain_loop.call(expected.network, batch["image"])
    np.testing.assert_allclose(got, outputs, rtol=TOLERANCE)


# The table


def print_table(slow):
    """Prints, as Markdown, the largest difference per network and optimizer."""
    print(
        "Largest relative difference from a plain loop, " + f"{TOLERANCE:g} allowed:\n"
    )
    print("| network | " + " | ".join(OPTIMIZERS) + " |")
    print("|---" * (len(OPTIMIZERS) + 1) + "|")
    for name in CASES:
        print(f"| {name} ", end="")
        for optimizer in OPTIMIZERS:
            runs = [
                run_difference(name, optimizer, index)
                for index in range(3)
                if slow or is_quick(name, optimizer, index)
            ]
            print(f"| {max(runs):.1e} " if runs else "| ", end="", flush=True)
        print("|")


if __name__ == "__main__":
    import conftest  # noqa: F401  (four devices, float64)

    print_table(slow="--slow" in sys.argv[1:])
