"""A strict session: four CPU devices, float64 at hand, no implicit rank promotion."""

import faulthandler
import os
import tempfile

import hypothesis
import jax
import own_threads
import pytest

# Four devices let K = 4 stages run apart; float64 makes the oracles exact. Set before
# any test touches a device, and in the environment for tests that start processes.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests build the same stages anew; a cache that lives as long as the session, and
# that its processes share, spares compiling them again.
if "FDG_JAX_TESTS_CACHE" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="fdg_jax_tests_")
    os.environ["FDG_JAX_TESTS_CACHE"] = _compiled.name
jax.config.update("jax_compilation_cache_dir", os.environ["FDG_JAX_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# An example that compiles, or meets a busy machine, takes any time. Every run has the
# same ones, so that it is the change under test that fails; new ones are searched for
# with --hypothesis-profile=searching.
for name, derandomize in (("same", True), ("searching", False)):
    hypothesis.settings.register_profile(
        name,
        deadline=None,
        derandomize=derandomize,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("same")

STDERR = pytest.StashKey[int]()
GRACE_SECONDS = 60.0


def pytest_configure(config):
    """Keeps the real stderr, for while a test runs another one is in its place."""
    config.stash[STDERR] = os.dup(2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Ends a process whose test outlasts its limit, with a traceback of each thread.

    The limit itself is an exception in the main thread, which does not come while that
    thread is in a call of XLA's, nor help where what it unwinds waits again.
    """
    own_threads.begin()
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker else float(item.config.getini("timeout"))
    faulthandler.dump_traceback_later(
        limit + GRACE_SECONDS, exit=True, file=item.config.stash[STDERR]
    )
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def compiled_quickly():
    """For modules that compile many small programs, and run each a few times only.

    What JAX keeps in memory goes by the program, not by how it was compiled: without
    clearing it, other modules would get these programs, whose rounding differs.
    """
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
