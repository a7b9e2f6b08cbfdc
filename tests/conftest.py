"""A strict session: several CPU devices, float64 at hand, no implicit rank promotion."""

import os

import jax

# Four devices let K = 4 stages run apart; float64 makes the oracles exact. Set before
# any test touches a device, and in the environment for tests that start processes.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
