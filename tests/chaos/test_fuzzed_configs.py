"""Any value for any key, file or folder: a run begins, or one line says why not.

Values are drawn without regard to what a key takes, so some are right; those are
discarded. Whatever else comes out, an exception above all, is a failure.
"""

import contextlib
import io
import pathlib
import tempfile

import jax
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import train
from configs import default
from fdg_jax import compilation_cache, data, training
from fdg_jax.data import synthetic

KEYS = sorted(default.get_config())
CONFIGS = sorted(path.stem for path in train.CONFIGS.glob("[!_]*.py"))
# Networks that are slow to make, and cuts that are timed, are for other tests.
SMALL = ["--config.network=resnet8", "--config.cuts=2", "--config.batch_size=16"]
CACHE_SETTINGS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")

integers = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**64, 10**30, 10**400, -(10**400)]),
)
floats = st.one_of(
    st.floats(-2, 2), st.sampled_from([1e-320, 1e30, 1e300, 1e308]), st.floats()
)
words = st.one_of(
    st.text("abcxyz0189_-./,:;()[]'\" \t\nüß漢", max_size=12),
    st.sampled_from(["None", "True", "auto", "paper", "2,1,0", "3", "1_0", "0x10"]),
    st.sampled_from(["(" * 300, "9" * 5000, "x" * 5000, "~nobody/x", "a/" * 200]),
)
# Texts as a command line has them, and expressions as a config file has them.
texts = st.one_of(integers.map(str), floats.map(repr), words)
expressions = st.one_of(
    integers.map(repr),
    floats.map(lambda value: f"float({str(value)!r})"),
    words.map(repr),
    st.lists(integers, max_size=3).map(lambda values: repr(tuple(values))),
    st.sampled_from(
        [
            *("None", "True", "[]", "{}", "()", "b'3'", "object()", "{1, 2}", "1j"),
            *("('1', '2')", "(1.5,)", "((1, 2), 3)", "[[1]]", "(None,)", "print"),
            *("np.int64(3)", "np.float32(0.5)", "np.nan", "np.arange(3)"),
            "ml_collections.ConfigDict({'a': 1})",
            "ml_collections.FieldReference(3)",
        ]
    ),
)

flags = st.one_of(
    st.tuples(st.sampled_from(KEYS), texts).map("--config.{0[0]}={0[1]}".format),
    st.tuples(st.sampled_from(KEYS), texts).map("--config.{0[0]}.{0[1]}=1".format),
    st.sampled_from(KEYS).map("--config.{}".format),
    st.sampled_from(KEYS).map("--noconfig.{}".format),
    st.sampled_from(["config", "workdir", "flagfile", "undefok"]).flatmap(
        lambda name: texts.map(lambda text: f"--{name}={text}")
    ),
    words.map("--{}".format),
    words,
)
workdirs = st.one_of(
    st.sampled_from(["run", "a file", "a file/run", "other", "empty", "listed", "old"]),
    st.sampled_from(["", ".", "x" * 300, "a/" * 2000 + "b", "/dev/null", "ü"]),
)
statements = st.one_of(
    st.tuples(st.sampled_from(KEYS), expressions).map("config.{0[0]} = {0[1]}".format),
    st.tuples(st.sampled_from(KEYS), expressions).map(
        "config.update({{'{0[0]}': {0[1]}}})".format
    ),
    st.sampled_from(KEYS).map("del config.{}".format),
    expressions.map("config = {}".format),
    expressions.map("raise ValueError({})".format),
    words.filter(lambda text: "\n" not in text),
    st.sampled_from(
        [
            *("config = config.to_dict()", "config = config.to_json()", "1 / 0"),
            *("raise OSError(2, 'a', 'b')", "raise StopIteration", "raise KeyError"),
            *("raise MemoryError", "assert False", "get_config()"),
            "raise ExceptionGroup('two', [OSError('a'), ValueError('b')])",
            "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'a\\nb')",
        ]
    ),
)
contents = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"\xff\xfe", b"\x00", b"get_config = 3", b"def get_config("]),
)


class Valid(BaseException):
    """All of it was right, and training would begin."""


@pytest.fixture(autouse=True)
def nobody_trains(monkeypatch, tmp_path):
    def run(*arguments):
        raise Valid

    def load(name, data_dir=None):
        if name == "digits":
            return digits
        return synthetic.load(64, 10, num_classes=data.spec(name).num_classes)

    digits = data.load("digits")
    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training.data, "load", load)
    monkeypatch.setattr(train, "request_cpu_devices", lambda count: None)
    monkeypatch.setattr(compilation_cache, "user_folder", lambda: tmp_path / "cache")
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def _fill(folder):
    """What a workdir may be: a file, a folder, a run of another kind, a broken one."""
    (folder / "a file").write_text("mine")
    for name, text in (
        ("other", '{"network": "resnet20"}'),
        ("listed", "[1]"),
        ("old", "{}"),
        ("empty", None),
    ):
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "config.json").write_text(text)


def _held(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def _write_config(folder, base, lines, whole):
    path = folder / "mine.py"
    if whole is not None:
        path.write_bytes(whole)
        return path
    path.write_text(
        "import sys\nimport ml_collections\nimport numpy as np\n"
        f"from configs import {base}\n\n\ndef get_config():\n"
        f"    config = {base}.get_config()\n"
        + "".join(f"    {line}\n" for line in lines)
        + "    return config\n",
        encoding="utf-8",
    )
    return path


@st.composite
def command_lines(draw):
    """Draws what a config file and a command line are made of."""
    base = draw(st.sampled_from(CONFIGS))
    lines, whole, wrong = [], None, []
    kind = draw(st.sampled_from(["flag", "flag", "flags", "file", "file", "whole"]))
    if kind.startswith("flag"):
        wrong = draw(st.lists(flags, min_size=1, max_size=1 if kind == "flag" else 3))
    elif kind == "file":
        lines = draw(st.lists(statements, min_size=1, max_size=2))
    else:
        whole = draw(contents)
    workdir = draw(st.one_of(st.just("run"), workdirs))
    return base, lines, whole, wrong, workdir


def _is_refused(case):
    """Returns whether a case is wrong, once all is as it should be then."""
    base, lines, whole, wrong, workdir = case
    out, err = io.StringIO(), io.StringIO()
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.chdir(name),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        folder = pathlib.Path(name)
        _fill(folder)
        path = _write_config(folder, base, lines, whole)
        small = [f for f in SMALL if not any(f.split("=")[0] in w for w in wrong)]
        argv = [f"--config={path}", f"--workdir={workdir}", *small, *wrong]
        held = _held(folder)
        try:
            status = train.main(["train.py", *argv])
        except Valid:
            return False
        assert _held(folder) == held
    if status == 0:  # asked for help
        return False
    assert status == 2
    assert err.getvalue().startswith("train.py: ")
    assert err.getvalue().count("\n") == 1 and out.getvalue() == ""
    return True


rules = {
    "suppress_health_check": [
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
        HealthCheck.too_slow,
    ],
}


@pytest.mark.timeout(300)
@settings(max_examples=60, derandomize=True, **rules)
@given(command_lines())
def test_a_fuzzed_config_is_right_or_told_in_one_line(case):
    assume(_is_refused(case))


@pytest.mark.parametrize(
    "case",
    [
        ("digits", [], None, [f"--workdir={'x' * 300}"], "run"),
        ("digits", [], None, [f"--config={'x' * 300}"], "run"),
        ("digits", [], None, [f"--config.init_from={'x' * 300}"], "run"),
        ("digits", [], None, [f"--config.compilation_cache={'x' * 300}"], "run"),
        ("digits", [], None, [f"--config.snapshots_kept={10**400}"], "run"),
        ("digits", [], None, [f"--config.learning_rate_milestones={2**31}"], "run"),
        ("digits", [], None, [f"--config.skip_nonfinite={2**31}"], "run"),
        ("digits", [], None, [f"--{'x' * 5000}"], "run"),
        ("digits", [], None, ["--config.stall_timeout=1e300"], "run"),
        ("digits", [], None, ["--config.stop_seconds=1e300"], "run"),
        ("digits", [], None, ["--config.learning_rate_decay=1e300"], "run"),
    ],
    ids=lambda case: case[3][0][:32],
)
def test_what_was_once_an_exception_is_told_in_one_line(case):
    assert _is_refused(case), "it is taken for right, and would fail in training"


def test_a_config_file_that_holds_little_takes_every_flag(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'seed': 5})\n"
    )
    argv = ["train.py", f"--config={path}", "--config.num_stages=3", "--config.cuts=1"]
    config, _ = train.parse(argv)
    assert (config.seed, config.num_stages, config.cuts) == (5, 3, "1")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=500, print_blob=True, **rules)
@given(command_lines())
def test_five_hundred_fuzzed_configs_are_right_or_told_in_one_line(case):
    assume(_is_refused(case))
