"""Networks as sequences of blocks."""

from fdg_jax.models.network import Network, count_parameters
from fdg_jax.models.registry import create, names

__all__ = ["Network", "count_parameters", "create", "names"]
