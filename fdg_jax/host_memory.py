"""Host memory for stages on CPU: what a step frees, the next step uses again.

XLA:CPU asks the C library for the memory of every step and frees it afterwards. By
default glibc hands large pieces back to the kernel at once, which clears each page when
it is touched again: a tenth to a fifth of the time of a training step.
"""

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep memory that is freed, up to 2 GiB at the end of its heap.

    Call it before JAX starts its threads. It holds for the whole process, whose
    resident memory then stays at its peak. Accelerators have allocators of their own.

    Returns:
        Whether the C library is glibc and did as it was told; others are left alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _M_ARENA_MAX: 1,  # one heap, for an arena of a thread cannot hold large pieces
        _M_MMAP_MAX: 0,  # large pieces come from the heap too
        _M_TRIM_THRESHOLD: 2**31 - 1,  # bytes
    }
    return all(mallopt(name, value) for name, value in settings.items())
