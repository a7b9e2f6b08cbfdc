"""A file that one process at a time may hold, and its children with it.

The lock (flock(2)) belongs to the open file: it lasts until the last process that has
inherited it is gone, however it went.
"""

import fcntl
import io
import time


def acquire(file: io.IOBase, seconds: float) -> bool:
    """Locks an open file.

    Args:
        file: to lock; closing it, here and in all children, gives it back.
        seconds: how long to wait for another process to give it back.

    Returns:
        Whether it is locked now.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
