"""Output that cannot be written, and a terminal that goes away, end no run."""

import os
import pathlib
import subprocess
import sys
import termios
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = [
    *(sys.executable, ROOT / "train.py", "--workdir=w"),
    *("--config.num_epochs=1", "--config.learning_rate_milestones=()"),
    *("--config.num_train=256", "--config.snapshot_every_steps=2"),
]
STUDY = """
from fdg_jax.study import Study
def get_study():
    changes = dict(num_epochs=1, learning_rate_milestones=(), num_train=256)
    changes["snapshot_every_steps"] = 2
    return Study(name="s", base="digits", overrides=changes, grids=[{}])
"""
RUN_STUDY = [sys.executable, "-m", "fdg_jax.study", "--study=s.py", "--workdir=w"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return str(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def start(tmp_path, monkeypatch, caches):
    """Starts a command in an empty folder, with the streams that a test gives it."""
    (tmp_path / "s.py").write_text(STUDY)
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", caches)
    processes = []

    def start(command, **streams):
        processes.append(subprocess.Popen(command, cwd=tmp_path, **streams))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def _is_trained(workdir):
    files = sorted(path.name for path in workdir.iterdir())
    return {"summary.json", "checkpoints", "snapshots", "metrics.jsonl"} <= set(files)


def _unread():
    """A pipe to write into whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_reader_that_has_gone(tmp_path, start):
    writer = _unread()
    process = start(TRAIN, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0 and _is_trained(tmp_path / "w")
    assert err == b""  # nor does Python complain when it ends


@pytest.mark.parametrize(
    "closed", ["<&- >&- 2>&-", pytest.param("2>&-", marks=pytest.mark.slow)]
)
def test_streams_that_are_closed_at_the_start(tmp_path, start, closed):
    process = start(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *TRAIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and _is_trained(tmp_path / "w")
    assert (b"final test accuracy" in out, err) == (closed == "2>&-", b"")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(TRAIN, id="train"),
        pytest.param(RUN_STUDY, id="study", marks=pytest.mark.slow),
    ],
)
def test_a_terminal_that_goes_away(tmp_path, start, command):
    """The kernel sends SIGHUP then, and whatever is written fails with EIO."""
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    login = "import os, sys; os.login_tty(0); os.execv(sys.argv[1], sys.argv[1:])"
    process = start([sys.executable, "-c", login, *command], stdin=slave)
    os.close(slave)
    said = b""
    while b"batch" not in said and b"cell" not in said:  # the bar is there
        said += os.read(master, 1000)
    os.close(master)
    assert process.wait(timeout=200) == 0, said
    (run,) = [tmp_path / "w"] if command is TRAIN else (tmp_path / "w").glob("*-seed0")
    assert _is_trained(run)


def test_a_study_that_nobody_reads(tmp_path, start):
    writer = _unread()
    process = start(["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *RUN_STUDY], stdout=writer)
    os.close(writer)
    assert process.wait(timeout=250) == 0
    (run,) = (tmp_path / "w").glob("*-seed0")
    assert _is_trained(run)
    # What the cell prints goes into its log, and what the study prints into no file.
    assert "final test accuracy" in (run / "log.txt").read_text()
    assert (tmp_path / "w" / "results.csv").read_text().startswith("study,")


def _program(body):
    start = "import os, sys\nfrom fdg_jax import streams\nstreams.outlive_terminal()\n"
    return [sys.executable, "-c", start + textwrap.dedent(body)]


def _said(body, **streams):
    """Runs a program that outlives its terminal; returns its status and output."""
    done = subprocess.run(
        _program(body),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        timeout=100,
        **{"stdout": subprocess.PIPE} | streams,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
def test_a_full_disk_takes_no_line_and_the_next_one_is_tried():
    with open("/dev/full", "w") as full:
        status, _, err = _said(
            """
            for _ in range(3000):
                print("x" * 100)
            with streams.open_log("/dev/full") as log:
                print("line", file=log)
            sys.stderr.write("still here")
            """,
            stdout=full,
        )
    assert (status, err) == (0, b"still here")


def test_a_name_that_the_encoding_lacks_is_told(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    status, out, err = _said("print('caf\\u00e9', chr(0xdcff))")
    assert (status, out, err) == (0, b"caf\\xe9 \\udcff\n", b"")


def test_a_pipe_that_does_not_block_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE)
    os.close(reader)
    assert _said("print('x' * 999_999)", stdout=writer)[::2] == (0, b"")
    os.close(writer)
    assert process.communicate(timeout=60)[0].strip() == b"1000000"


def test_descriptors_that_are_closed_take_no_file():
    """Nor a pipe, such as the one that signals are read from."""
    command = _program("""
        descriptors = [os.open("train.py", os.O_RDONLY), *os.pipe()]
        assert min(descriptors) > 2, descriptors
        assert {os.readlink(f"/proc/self/fd/{n}") for n in range(3)} == {os.devnull}
        print("nobody hears", flush=True)
        assert sys.stdin.read() == "" and os.get_inheritable(1)
    """)
    closed = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", closed, "sh", *command], cwd=ROOT, timeout=100)
    assert done.returncode == 0
