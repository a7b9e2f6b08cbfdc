"""ADL: delayed gradients, M of which are accumulated into one update.

Zhuang, Lin, Toh: "Accumulated Decoupled Learning: Mitigating Gradient Staleness in
Inter-Layer Model Parallelization", arXiv 2012.03747; ICML 2021 under the title
"Accumulated Decoupled Learning with Gradient Staleness Mitigation for Convolutional
Neural Networks".

A stage's weights change every M batches, so that a gradient s_k batches late is late by
fewer updates::

    w_k <- w_k - lr * 1/M * sum of M gradients, each s_k batches late
    updates between:  floor(n / M) - floor(max(0, n - s_k) / M)  for batch n

which is s_k / M on average. What was chosen: the mean of the M gradients, where the
authors' program adds them up (with plain SGD that is a learning rate M times as large,
and a weight decay M times weaker); the schedule ``reference``, their default, with
``paper`` as their other mode; and M batches that together have the images of one batch
of the other methods. Gradients of an incomplete update at the end of training are not
applied.
"""

from fdg_jax.methods.method import Method

METHOD = Method(
    "adl",
    schedule="reference",
    accumulation=4,
    leaves_open=("schedule", "accumulation", "shrink", "backward"),
)
