"""A file that one process at a time may hold, and its children with it.

The lock (flock(2)) belongs to the open file: it lasts until the last process that has
inherited it is gone, however it went. Some network file systems have no such locks
(Lustre mounted without ``flock``, NFS without its lock service), nor has Windows.
"""

import errno
import io
import time
import warnings
from collections.abc import Callable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = frozenset(
    {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
)


def acquire(
    file: io.IOBase,
    seconds: float,
    warn: Callable[[str], object] = warnings.warn,
) -> bool:
    """Locks an open file.

    Args:
        file: to lock; closing it, here and in all children, gives it back.
        seconds: how long to wait for another process to give it back.
        warn: is called with a line if files cannot be locked there.

    Returns:
        Whether it is locked now, or cannot be, by nobody.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(
                f"{file.name} cannot be locked ({error.strerror}), so nothing keeps a "
                f"second process from this folder; see to it that there is one only"
            )
            return True
