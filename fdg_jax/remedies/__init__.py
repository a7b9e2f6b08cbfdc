"""Remedies for staleness, as Optax transforms that know a stage's staleness.

Each file is one paper. A remedy changes how a stage uses a gradient that is s_k updates
late, and so goes with any schedule; FDG's own remedy is ``fdg_jax.shrink``.
"""

from fdg_jax.remedies.delay_compensation import (
    CompensateDelayState,
    compensate_delay,
    compensate_delay_adaptively,
)
from fdg_jax.remedies.nesterov_lookahead import nesterov_lookahead, stage_momentum
from fdg_jax.remedies.pipemare import RescheduleState, reschedule_learning_rate
from fdg_jax.remedies.registry import create, names
from fdg_jax.remedies.spike_compensation import (
    SpikeCompensationState,
    scale_by_spike_compensation,
    spike_compensated_sgd,
)
from fdg_jax.remedies.staleness_aware import scale_by_staleness
from fdg_jax.remedies.weight_prediction import (
    PredictWeightsState,
    actual_params,
    predict_weights,
)

__all__ = [
    "CompensateDelayState",
    "PredictWeightsState",
    "RescheduleState",
    "SpikeCompensationState",
    "actual_params",
    "compensate_delay",
    "compensate_delay_adaptively",
    "create",
    "names",
    "nesterov_lookahead",
    "predict_weights",
    "reschedule_learning_rate",
    "scale_by_spike_compensation",
    "scale_by_staleness",
    "spike_compensated_sgd",
    "stage_momentum",
]
