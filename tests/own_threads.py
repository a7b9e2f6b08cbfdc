"""Which threads of the library a test has started and left behind."""

import threading

_before = set()


def begin():
    """Notes what other tests have left, which is no concern of the next one."""
    _before.clear()
    _before.update(threading.enumerate())


def left():
    """Names of the library's threads that were not there when the test began."""
    threads = [t for t in threading.enumerate() if t not in _before]
    return [t.name for t in threads if t.name.startswith("fdg-")]
