"""Runs the cells of a study, in processes of their own; those of a setting share one.

What is finished, or has diverged, is not run again; anything else goes on from its last
snapshot. A process ends soon after the study's, however that went: its standard input
ends then. Until it has, it holds the locks of its cells, so a study that is started
again does not write beside it.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor

import fdg_jax
from fdg_jax import folders, lock, resume
from fdg_jax.study import results
from fdg_jax.study.cell import DIVERGED as DIVERGED_STATUS
from fdg_jax.study.cell import LOG_FILE, TOGETHER
from fdg_jax.study.grid import Cell
from fdg_jax.study.progress import Progress
from fdg_jax.study.results import DIVERGED, FAILED, FINISHED

LOCK_FILE = ".lock"
"""In the folder of a study."""

_ENDED = (FINISHED, DIVERGED)
_POLL_SECONDS = 0.2
_SHOW_EVERY = 5  # polls
_PLATFORMS_SECONDS = 300.0  # for JAX to start
_EXTRA_SECONDS = 30.0  # beyond its stop_seconds, for a process to leave the lock


def check_workdir(cells: Sequence[Cell], workdir: pathlib.Path) -> None:
    """Refuses a folder that cannot be written, or with runs of another study.

    Args:
        cells: from ``expand``.
        workdir: the study's; it need not exist.

    Raises:
        ValueError: it is no folder, or one of the cells was begun with another config.
    """
    if not folders.can_be_written(workdir):
        raise ValueError(
            f"a study's workdir must be a folder that can be written; got {workdir}, "
            f"and {folders.nearest(workdir)} cannot"
        )
    for cell in cells:
        if resume.has_run(workdir / cell.name):
            resume.check_config(cell.config, workdir / cell.name)
    longest = max(len(cell.name.encode()) for cell in cells)
    resume.check_files(workdir, name_length=longest)


def check_platforms() -> None:
    """Refuses platforms that no run could start on, where the user names any.

    A process of its own tries, for the runs must have the accelerators.

    Raises:
        ValueError: JAX cannot start there, or not in time.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms in ("", "cpu"):
        return
    program = "from fdg_jax import cpu_devices; cpu_devices.check_platforms()"
    try:
        tried = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PLATFORMS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"JAX must be able to start; with JAX_PLATFORMS={platforms} it had not "
            f"after {_PLATFORMS_SECONDS:g} seconds; see whether another process holds "
            f"the accelerators, or set JAX_PLATFORMS=cpu"
        ) from None
    if tried.returncode:
        last = tried.stderr.strip().split("\n")[-1]
        raise ValueError(last.removeprefix("ValueError: "))


def unfinished(cells: Sequence[Cell], workdir: pathlib.Path) -> list[Cell]:
    """Returns the cells that ``run`` would run.

    Raises:
        ValueError: a file of a run is damaged.
    """
    return [c for c in cells if results.read(c, workdir).state not in _ENDED]


def run(
    cells: Sequence[Cell],
    workdir: pathlib.Path,
    update: Callable[[], object],
    jobs: int = 1,
) -> int | None:
    """Runs what has not ended yet.

    Args:
        cells: of the study.
        workdir: the study's, made when missing.
        update: is called after the cells of each setting, by one thread at a time; no
            more once a signal has come.
        jobs: processes at a time.

    Returns:
        None, or the number of the signal that stopped the study.

    Raises:
        ValueError: another process runs a study in this folder.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    left = unfinished(cells, workdir)
    settings = {cell.setting: [] for cell in left}
    for cell in left:
        settings[cell.setting].append(cell)
    with (
        open(workdir / LOCK_FILE, "ab") as file,
        contextlib.closing(Progress(len(cells), len(cells) - len(left))) as progress,
        _signals() as signals,
        ThreadPoolExecutor(jobs) as pool,
    ):
        if not lock.acquire(file, seconds=0.0, warn=progress.say):
            raise ValueError(
                f"one process at a time runs a study in a folder; another one is at "
                f"work in {workdir}; wait for it, or choose another workdir"
            )
        updating = threading.Lock()

        def run_setting(group):
            _run_setting(group, workdir, signals, progress)
            if not signals:
                with updating:
                    update()

        waiting = {pool.submit(run_setting, group) for group in settings.values()}
        try:
            while waiting:
                # This thread must wake now and then, for only it hears signals.
                done, waiting = futures.wait(waiting, _POLL_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
        except BaseException:
            signals.append(signal.SIGTERM)  # the pool waits for what is running
            raise
        return signals[0] if signals else None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of SIGINT and SIGTERM that have come, instead of their effect."""
    numbers = []
    before = {
        number: signal.signal(number, lambda number, frame: numbers.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_setting(
    group: Sequence[Cell],
    workdir: pathlib.Path,
    signals: list[int],
    progress: Progress,
) -> None:
    """Runs the cells of a setting to their end, or to the first signal.

    After one that fails another process runs the rest.
    """
    left = list(group)
    while left and not signals:
        status = _run_process(left, workdir, signals, progress)
        # What ended is told by what is on disk; the first one that did not has failed.
        left = [c for c in left if results.read(c, workdir).state != FINISHED]
        if left and not signals:
            _fail(left.pop(0), workdir, status, progress)


def _run_process(
    group: Sequence[Cell],
    workdir: pathlib.Path,
    signals: list[int],
    progress: Progress,
) -> int:
    """Runs cells in one process that holds the locks of all; returns its status."""
    with contextlib.ExitStack() as stack:
        logs = []
        for cell in group:
            folder = workdir / cell.name
            folder.mkdir(exist_ok=True)
            logs.append(stack.enter_context(open(folder / LOG_FILE, "ab")))
            seconds = cell.config.stop_seconds + _EXTRA_SECONDS
            # If locks are lacking, the study has said so.
            if not lock.acquire(logs[-1], seconds, warn=lambda line: None):
                raise ValueError(
                    f"another process still runs {cell.name}; wait until it has ended"
                )
            (folder / results.FAILURE_FILE).unlink(missing_ok=True)
        process = _start(group, workdir, logs)
        return _wait(group, workdir, process, signals, progress)


def _fail(cell: Cell, workdir: pathlib.Path, status: int, progress: Progress) -> None:
    folder = workdir / cell.name
    state = DIVERGED if status == DIVERGED_STATUS else FAILED
    failure = {"state": state, "reason": _reason(status, folder / LOG_FILE)}
    resume.write_json(folder / results.FAILURE_FILE, failure)
    progress.end(cell.name, f"{state}: {failure['reason']}")


def _command(folders: Sequence[pathlib.Path], together: bool) -> list[str]:
    flags = [TOGETHER] if together else []
    # -P: nothing in the current folder is taken for a module.
    command = [sys.executable, "-P", "-m", "fdg_jax.study.cell"]
    return [*command, *flags, *map(str, folders)]


def _environment() -> dict[str, str]:
    """The environment of a process that imports this very fdg_jax."""
    here = str(pathlib.Path(fdg_jax.__file__).parents[1])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def _start(
    group: Sequence[Cell], workdir: pathlib.Path, logs: Sequence[io.IOBase]
) -> subprocess.Popen:
    """Starts a process, and tells it the configs."""
    process = subprocess.Popen(
        _command([workdir / cell.name for cell in group], group[0].together),
        stdin=subprocess.PIPE,
        stdout=logs[0],
        stderr=subprocess.STDOUT,
        env=_environment(),
        pass_fds=[log.fileno() for log in logs],  # it holds the locks
        start_new_session=True,  # only the study gets Ctrl-C, and passes it on
    )
    try:
        for cell in group:
            process.stdin.write(json.dumps(cell.config.to_dict()).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:  # it has died; its status tells
        with contextlib.suppress(BrokenPipeError):  # as closing tries to write again
            process.stdin.close()
    return process


def _wait(
    group: Sequence[Cell],
    workdir: pathlib.Path,
    process: subprocess.Popen,
    signals: list[int],
    progress: Progress,
) -> int:
    """Waits for a process, passes signals on and shows progress; returns its status."""
    forwarded, polls, left = 0, 0, list(group)
    progress.begin(left[0].name)

    def follow():
        """Shows where the cells are; the last one to have begun may still run."""
        while left and results.read(left[0], workdir).state == FINISHED:
            final = results.read(left[0], workdir).final_error
            progress.end(left.pop(0).name, f"final test error {final:.2f} %")
            if left:
                progress.begin(left[0].name)
        if left:
            where = _position(left[0], workdir / left[0].name)
            progress.show(left[0].name, *where)

    with process:  # closes its standard input in any case, at which it leaves
        while process.poll() is None:
            for number in signals[forwarded:]:
                process.send_signal(number)
                forwarded += 1
            if polls % _SHOW_EVERY == 0:
                follow()
            polls += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
    follow()
    return process.returncode


def _position(cell: Cell, folder: pathlib.Path) -> tuple[float, str]:
    """How far a run is, as a fraction and in words."""
    lines = results.metrics(folder)
    if not lines:
        return 0.0, "starting"
    epoch, num_epochs = lines[-1]["epoch"], cell.config.num_epochs
    words = f"epoch {epoch:.3g}/{num_epochs}"
    accuracies = [x["test_accuracy"] for x in lines if "test_accuracy" in x]
    if accuracies:
        words += f", test accuracy {accuracies[-1]:.2%}"
    return epoch / num_epochs, words


def _reason(status: int, log: pathlib.Path) -> str:
    """Why a process failed: its last line, or the signal that ended it."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = log.read_text("utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else f"exit status {status}, without a word"
