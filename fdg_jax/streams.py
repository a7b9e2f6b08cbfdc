"""Standard streams that a process outlives: what cannot be said is not said.

A run takes hours. Meanwhile whoever reads its output may leave (``| head``), its
terminal may be closed, and the disk that a log is on may fill up. None of these is a
reason to end it.
"""

import io
import os
import pathlib
import select
import signal
import sys
from typing import TextIO


def outlive_terminal() -> None:
    """Has this process go on whatever becomes of its terminal and standard streams.

    For the start of a program, in its main thread. What is printed and cannot be
    written is dropped, SIGHUP is ignored as by nohup(1), and output is written line by
    line. A stream that somebody has put in the place of Python's own is left alone.
    """
    _open_closed_descriptors()
    if sys.stdin is None:
        sys.stdin = sys.__stdin__ = open(os.devnull)
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _like(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _like(sys.stderr, 2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def open_log(path: pathlib.Path) -> TextIO:
    """Opens a file that lines are added to; those that do not fit on disk are dropped.

    Args:
        path: of the file, made when missing.

    Raises:
        OSError: it cannot be opened.
    """
    return _text(_Output(path, "a"), "utf-8", "backslashreplace")


def _open_closed_descriptors() -> None:
    """Opens those of the descriptors 0 to 2 that are closed, on nothing.

    Otherwise files of the run get their numbers, and in them what C libraries say.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest one free
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _like(stream: TextIO | None, descriptor: int) -> TextIO:
    """A stream like Python's own, which is None if the descriptor was closed."""
    if stream is None:
        return _text(_Output(os.devnull, "w"), "utf-8", "backslashreplace")
    # A name that the encoding lacks, such as that of a folder, can still be told.
    strict = stream.errors == "strict"
    errors = "backslashreplace" if strict else stream.errors
    return _text(_Output(descriptor, "w", closefd=False), stream.encoding, errors)


def _text(output: "_Output", encoding: str, errors: str) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(output), encoding, errors, line_buffering=True
    )


class _Output(io.FileIO):
    """A file or descriptor to which writing never fails."""

    def write(self, data: bytes) -> int:
        try:
            # None: it is full at the moment, and whoever shares it made it not block.
            while (written := super().write(data)) is None:
                select.select([], [self], [])
        except OSError:
            return len(data)
        return written
