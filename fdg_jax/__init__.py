"""FDG for JAX and Flax: decoupled training with delayed gradients.

A network is cut into K stages, each on its own device; all of them run forward,
backward and update at the same time on different batches, and gradients, which reach a
stage late, are shrunk on their way (arXiv 1906.09108).
"""

from fdg_jax import data, methods, models, remedies, schedule
from fdg_jax.losses import accuracy, softmax_cross_entropy
from fdg_jax.pipeline import NonFiniteLossError, Pipeline
from fdg_jax.schedule import Schedule
from fdg_jax.shrink import shrink_gradients
from fdg_jax.stage_optimizer import StageInfo
from fdg_jax.stall import StalledError
from fdg_jax.timeline import Timeline


def load(workdir, which="newest"):
    """Loads what a run has trained; see ``fdg_jax.trained.load``."""
    from fdg_jax import trained  # Orbax takes long to import

    return trained.load(workdir, which)


__version__ = "0.2.0"

__all__ = [
    "NonFiniteLossError",
    "Pipeline",
    "Schedule",
    "StageInfo",
    "StalledError",
    "Timeline",
    "accuracy",
    "data",
    "load",
    "methods",
    "models",
    "remedies",
    "schedule",
    "shrink_gradients",
    "softmax_cross_entropy",
]
