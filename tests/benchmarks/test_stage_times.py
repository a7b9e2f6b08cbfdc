"""Keeping a process on some cores, as stage times do."""

import sys
import threading

import pytest

from benchmarks.stage_times import only_on
from benchmarks.task import cores


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wants Linux's /proc")
def test_all_threads_are_kept_on_some_cores_and_let_go_again():
    allowed = cores()
    seen, ask, answer = [], threading.Semaphore(0), threading.Semaphore(0)

    def other():
        for _ in range(2):
            ask.acquire()
            seen.append(cores())
            answer.release()

    thread = threading.Thread(target=other)
    thread.start()
    with only_on(allowed[:1]):
        assert cores() == allowed[:1]
        ask.release()
        answer.acquire()
    assert cores() == allowed
    ask.release()
    thread.join()
    assert seen == [allowed[:1], allowed]
