"""Devices for the stages: JAX divides the CPU where it finds no accelerator."""

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


def check_platforms() -> None:
    """Starts JAX, on the platforms that the user names or else on what it finds.

    Raises:
        ValueError: it cannot start there.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for "cuda", wordless
        reason = f" ({' '.join(str(error).split())})" if str(error) else ""
        raise ValueError(
            f"JAX_PLATFORMS must name platforms that JAX finds on this machine; got "
            f"{jax.config.jax_platforms!r}, which it cannot start{reason}; set it to "
            f"cpu, or unset it: JAX then takes an accelerator if there is one"
        ) from error
