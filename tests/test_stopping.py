import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from fdg_jax.stopping import Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_handlers_come_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with Stopping(seconds=60) as stopping:
        assert stopping.signal is None
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while stopping.signal is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stopping.signal == number
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert not [t for t in threading.enumerate() if t.name == "fdg-stopping"]
    # What was there before is there again: -1 is none.
    assert signal.set_wakeup_fd(-1) == -1


def _process(body):
    script = f"""
        import hashlib, os, signal, sys, threading, time
        from fdg_jax.stopping import Stopping
        {body}
    """
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def test_a_second_signal_leaves_at_once():
    status, out, err, _ = _process("""
        with Stopping(seconds=60) as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            while stopping.signal is None:
                time.sleep(0.01)
            print("first", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(50)
    """)
    assert (status, out) == (130, "first\n")
    assert err == "a second signal: leaving at once\n"


BUSY = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)'


def test_the_time_is_kept_whatever_the_main_thread_does():
    """In a call that takes minutes and looks at no signal, as a compilation may."""
    status, _, err, seconds = _process(f"""
        with Stopping(seconds=0.5) as stopping:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            {BUSY}
    """)
    assert status == 143 and seconds < 40
    assert err == "0.5 seconds have passed: leaving at once\n"


def test_time_in_which_the_process_was_suspended_does_not_count():
    status, out, err, _ = _process("""
        import subprocess
        with Stopping(seconds=3) as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            while stopping.signal is None:
                time.sleep(0.01)
            suspend = f"kill -STOP {os.getpid()}; sleep 5; kill -CONT {os.getpid()}"
            subprocess.run(["sh", "-c", suspend])
            time.sleep(0.5)
            print("still here", flush=True)
    """)
    assert (status, out, err) == (0, "still here\n", "")


def test_a_second_signal_is_heard_whatever_the_main_thread_does():
    status, _, err, seconds = _process(f"""
        with Stopping(seconds=60) as stopping:
            for wait in (0.5, 1.0):
                threading.Timer(wait, os.kill, (os.getpid(), signal.SIGTERM)).start()
            {BUSY}
    """)
    assert status == 143 and seconds < 40
    assert err == "a second signal: leaving at once\n"


def test_a_second_signal_is_heard_though_nobody_reads_what_is_said():
    status, *_ = _process("""
        import fcntl
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, bytes(4096))
        except BlockingIOError:
            os.set_blocking(writer, True)
        os.dup2(writer, 2)
        with Stopping(seconds=60) as stopping:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
            time.sleep(50)
    """)
    assert status == 143


def test_nobody_who_leaves_in_time_is_killed():
    status, out, err, _ = _process("""
        with Stopping(seconds=0.3) as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            while stopping.signal is None:
                time.sleep(0.01)
        time.sleep(1)
        print(stopping.signal)
    """)
    assert (status, out, err) == (0, "15\n", "")
