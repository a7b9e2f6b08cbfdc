"""What glibc does with freed memory, seen by the page faults of a child process."""

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import numpy as np
from fdg_jax import host_memory
if sys.argv[1] == "keep" and not host_memory.keep_freed_memory():
    sys.exit(77)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(sum(faults() for _ in range(5)))
"""


def _faults(word):
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, word], capture_output=True, text=True
    )
    if result.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_memory_that_was_freed_is_not_fetched_from_the_kernel_again():
    # 5 arrays of 128 MiB, in pages of 4 KiB or, at the largest, 2 MiB.
    assert _faults("leave") >= 5 * 64
    assert _faults("keep") < 5 * 16
