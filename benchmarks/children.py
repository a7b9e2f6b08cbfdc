"""A process per method, so that none disturbs another.

JAX fixes its number of devices when it starts, two frameworks' thread pools get in each
other's way, and peak memory belongs to a process. The parent lets one of them work at a
time; the others wait for their pipe. OpenMP's threads are left to spin, as they do for
a few milliseconds, before they sleep: without that PyTorch was a tenth slower.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from typing import Any, NamedTuple

from benchmarks import methods
from benchmarks.task import Method, Task, Unavailable

MIN_BATCHES = 4


class Reply(NamedTuple):
    """What a child answers.

    Attributes:
        value: the result; None after a failure.
        error: "", or what went wrong.
        kind: "unavailable", "refused" (a ``ValueError``) or "failed".
    """

    value: Any
    error: str = ""
    kind: str = ""


class ChildFailed(Exception):
    """A method raised, or its process died; the message is its traceback."""


class Child:
    """A method at work in a process of its own."""

    def __init__(self, name: str, task: Task):
        """Starts the process; it says nothing before ``warm_up``."""
        self.name = name
        # A GPU is shared by all children: none may take its memory beforehand.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, name, task), name=name, daemon=True
        )
        self._process.start()
        self._busy = False
        other.close()

    def warm_up(self) -> dict:
        """Builds the method.

        Returns:
            "warm_up_seconds", from the import of JAX or PyTorch on; "compile_seconds",
            or None; and "num_batches" for a round.

        Raises:
            Unavailable: it cannot run here.
            ValueError: it cannot do the task.
            ChildFailed: anything else.
        """
        return self._ask("warm_up")

    def run_round(self, num_batches: int) -> dict:
        """Runs some batches; returns "seconds", "images_per_second" and its probe."""
        return self._ask("run_round", num_batches)

    def report(self) -> dict:
        """Returns what the method says of itself, and its process's memory."""
        return self._ask("report")

    def close(self) -> None:
        """Ends the process; at once where it is still at work."""
        if not self._busy:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.send(("close",))
            self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()

    def _ask(self, *request) -> Any:
        self._busy = True
        try:
            self._pipe.send(request)
            reply = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join()
            raise ChildFailed(
                f"the process of {self.name} ended with exit code "
                f"{self._process.exitcode}"
            ) from None
        self._busy = False
        if not reply.kind:
            return reply.value
        kinds = {"unavailable": Unavailable, "refused": ValueError}
        raise kinds.get(reply.kind, ChildFailed)(reply.error)


def _serve(pipe, name: str, task: Task) -> None:
    """Body of a child: does what it is asked until it is told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    worker = _Worker(name, task)
    while True:
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(Reply(getattr(worker, command)(*arguments)))
        except Unavailable as error:
            pipe.send(Reply(None, str(error), "unavailable"))
        except ValueError as error:
            pipe.send(Reply(None, str(error), "refused"))
        except Exception:
            pipe.send(Reply(None, traceback.format_exc(), "failed"))
        if command == "close":
            return


class _Worker:
    """The child's side of every request."""

    def __init__(self, name: str, task: Task):
        self._name, self._task = name, task
        self._method: Method | None = None
        self._memory = {}
        self._counts_from_warm_up = False

    def warm_up(self) -> dict:
        start = time.perf_counter()
        self._method = methods.create(self._name, self._task)
        compile_seconds = self._method.warm_up()
        self._method.synchronize()
        seconds = time.perf_counter() - start
        num_batches = self._calibrate()
        self._memory["warm_up_peak_mib"] = peak_mib()
        self._counts_from_warm_up = reset_peak()
        return {
            "warm_up_seconds": seconds,
            "compile_seconds": compile_seconds,
            "num_batches": num_batches,
        }

    def _calibrate(self) -> int:
        """Returns how many batches fill a round."""
        num_batches, seconds = 1, 0.0
        while True:
            seconds = self._timed(num_batches)
            if seconds > self._task.round_seconds / 3:
                break
            num_batches *= 2
        per_batch = seconds / num_batches
        return max(MIN_BATCHES, math.ceil(self._task.round_seconds / per_batch))

    def run_round(self, num_batches: int) -> dict:
        seconds = self._timed(num_batches)
        if "peak_mib" not in self._memory:
            # Probes may need memory of their own, so the first round is what counts.
            known = self._counts_from_warm_up
            self._memory["peak_mib"] = peak_mib() if known else None
            self._memory["peak_device_mib"] = self._method.peak_device_mib()
        rate = num_batches * self._task.batch_size / seconds
        return {
            "num_batches": num_batches,
            "seconds": seconds,
            "images_per_second": rate,
            **self._method.probe(),
        }

    def _timed(self, num_batches: int) -> float:
        start = time.perf_counter()
        self._method.run(num_batches)
        self._method.synchronize()
        return time.perf_counter() - start

    def report(self) -> dict:
        return self._method.report() | self._memory

    def close(self) -> None:
        if self._method is not None:
            self._method.close()


def peak_mib() -> float | None:
    """Returns the most memory that this process has held, in MiB; None if unknown."""
    if not sys.platform.startswith("linux"):
        return None
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def reset_peak() -> bool:
    """Starts ``peak_mib`` anew from what the process holds now.

    Returns:
        Whether that was possible; where not, ``peak_mib`` still counts from the start.
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True
