"""Configs made wrong in any way: exit status 2, one line, nothing left behind."""

import math
import pathlib
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train
from configs import default
from fdg_jax import training

KEYS = sorted(default.get_config())
CONFIGS = sorted(
    p.stem for p in (train.CONFIGS).glob("[!_]*.py") if "default" not in p.stem
)


class Valid(BaseException):
    """The command line turned out to be right."""


@pytest.fixture(autouse=True)
def nobody_trains(monkeypatch):
    def run(*arguments):
        raise Valid

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(train, "request_cpu_devices", lambda count: None)


def wrong_numbers(*, integer, low, low_is_valid):
    values = [-1, -(10**9)] if low_is_valid else [0, -1, -(10**9)]
    if not integer:
        values = [*map(float, values), -math.inf, math.nan]
    return st.sampled_from(values)


POSITIVE_INTEGERS = ["num_stages", "num_epochs", "batch_size", "eval_batch_size"]
POSITIVE_INTEGERS += ["log_every_steps", "eval_every_epochs", "snapshots_kept"]
POSITIVE = ["learning_rate", "learning_rate_decay", "stop_seconds", "stall_timeout"]
NOT_NEGATIVE = ["weight_decay", "dropout_rate", "momentum", "snapshot_every_minutes"]
NAMES = ["network", "init", "dtype", "param_dtype", "dataset", "schedule", "cuts"]
NAMES += ["backward", "engine", "optimizer", "mode"]

words = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-.", min_size=1, max_size=12)

# Each gives a flag that is wrong whatever the other flags say.
wrong_flags = st.one_of(
    # A number out of its range.
    st.tuples(
        st.sampled_from(POSITIVE_INTEGERS),
        wrong_numbers(integer=True, low=0, low_is_valid=False),
    ),
    st.tuples(
        st.sampled_from(POSITIVE),
        wrong_numbers(integer=False, low=0, low_is_valid=False),
    ),
    st.tuples(
        st.sampled_from(NOT_NEGATIVE),
        wrong_numbers(integer=False, low=0, low_is_valid=True),
    ),
    st.tuples(st.just("shrink"), st.sampled_from([0.0, -0.5, 1.5, math.nan, math.inf])),
    st.tuples(st.just("momentum"), st.sampled_from([1.0, 2.0, math.nan])),
    st.tuples(st.just("seed"), st.sampled_from([-1, 2**32, 10**30])),
    st.tuples(st.just("batch_size"), st.integers(1438, 10**7)),
    st.tuples(st.just("num_stages"), st.integers(6, 9)),  # of the 5 blocks of resnet8
    # Something that is no number where one is wanted.
    st.tuples(
        st.sampled_from([*POSITIVE_INTEGERS, "seed", "warmup_epochs"]),
        st.sampled_from(["", "one", "1.5", "nan", "[]", "0x", "None", "1e400"]),
    ),
    st.tuples(
        st.sampled_from([*POSITIVE, *NOT_NEGATIVE, "shrink"]),
        st.sampled_from(["", "one", "1,5", "[]", "None", "--"]),
    ),
    st.tuples(
        st.sampled_from(["progress", "timeline", "restart"]),
        st.sampled_from(["maybe", "2", "yes?"]),
    ),
    # A word that nobody knows.
    st.tuples(st.sampled_from(NAMES), words.map(lambda word: f"x{word}")),
    st.tuples(st.sampled_from(NAMES), st.just("")),
    # Positions and schedules that do not fit.
    st.tuples(
        st.just("cuts"),
        st.sampled_from(["0", "5", "9", "2,1", "1,1", "1,2,3,4,5", "-1", "1.5", "1;2"]),
    ),
    st.tuples(
        st.just("schedule"),
        st.sampled_from(["0,1", "1,2", "1", "3,2,1,0", "1,-1", "0.5,0", "1,1", "bq"]),
    ),
    st.tuples(
        st.just("learning_rate_milestones"),
        st.sampled_from(["(3, 2)", "(0, 1)", "(-1,)", "(1.5,)", "(2, 2)"]),
    ),
    st.tuples(st.just("warmup_epochs"), st.sampled_from([-1, -7])),
).map(lambda pair: f"--config.{pair[0]}={pair[1]}")

wrong_keys = st.one_of(
    words.filter(lambda word: word not in KEYS).map(lambda w: f"--config.{w}=1"),
    st.sampled_from(KEYS).map(lambda key: f"--config.{key}x=1"),
    st.sampled_from(KEYS).map(lambda key: f"--confg.{key}=1"),
    st.sampled_from(KEYS).map(lambda key: f"--{key}=1"),
    words.map(lambda word: f"--config=configs/{word}zz.py"),
    words.map(lambda word: f"{word}zz"),
)

# Statements of a config file after ``config = default.get_config()``.
wrong_lines = st.one_of(
    words.map(lambda word: f"config.x{word.replace('-', '').replace('.', '')} = 1"),
    st.sampled_from(KEYS).map(lambda key: f"config.{key} = object()"),
    st.sampled_from(
        [
            "config.num_stages = 'two'",
            "config.seed = 0.5",
            "config = None",
            "raise OSError",
            "config.network = 3",
            "config.lock().new = 1",
            "1 / 0",
            "import no_such_module",
            "config.cuts = (2, 1)",
            "config = 3",
            "def",
            "config.batch_size = None",
        ]
    ),
)
valid_flags = st.lists(
    st.sampled_from(
        [
            "--config.progress=false",
            "--config.num_epochs=3",
            "--config.seed=7",
            "--config.log_every_steps=4",
            "--config.snapshots_kept=1",
        ]
    ),
    max_size=2,
)


def _refused(argv, folder, capsys):
    """Runs a command line and holds what comes of it against the rule."""
    status = train.main(["train.py", *argv])
    out, err = capsys.readouterr()
    assert status == 2, (argv, status)
    assert err.startswith("train.py: ") and err.count("\n") == 1, (argv, err)
    assert "Traceback" not in err and out == "", (argv, out, err)
    assert list(folder.iterdir()) == [], argv


def _check(case, capsys):
    kind, wrong, others = case
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        workdir = f"--workdir={folder / 'run'}"
        if kind == "file":
            with tempfile.TemporaryDirectory() as elsewhere:
                path = pathlib.Path(elsewhere) / "mine.py"
                path.write_text(
                    "from configs import digits\n\n\ndef get_config():\n    "
                    f"config = digits.get_config()\n    {wrong}\n    return config\n"
                )
                _refused([f"--config={path}", workdir, *others], folder, capsys)
        else:
            _refused([*others, workdir, wrong], folder, capsys)


cases = st.one_of(
    st.tuples(st.just("flag"), wrong_flags, valid_flags),
    st.tuples(st.just("flag"), wrong_flags, valid_flags),
    st.tuples(st.just("flag"), wrong_keys, valid_flags),
    st.tuples(st.just("file"), wrong_lines, valid_flags),
)
rules = {
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
}


@pytest.mark.timeout(300)
@settings(max_examples=60, **rules)
@given(cases)
def test_a_wrong_config_is_one_line_and_leaves_nothing(capsys, case):
    _check(case, capsys)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=500, **rules)
@given(cases)
def test_five_hundred_wrong_configs_are_one_line_and_leave_nothing(capsys, case):
    _check(case, capsys)
