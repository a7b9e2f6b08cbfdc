"""Devices for the stages where there is no accelerator: JAX divides the CPU."""

import os

import jax


def request_cpu_devices(num_devices: int) -> None:
    """Asks JAX for CPU devices, where the user has not said how many there are.

    It has no effect where JAX finds an accelerator. JAX must not have started.

    Args:
        num_devices: how many; at least one is asked for.
    """
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not asked and jax.config.jax_num_cpu_devices < 0:
        jax.config.update("jax_num_cpu_devices", max(1, num_devices))
