"""GPipe: micro-batches fill the pipeline, which drains before each update.

Huang, Cheng, Bapna, Firat, Chen, Chen, Lee, Ngiam, Le, Wu, Chen: "GPipe: Efficient
Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS 2019, arXiv
1811.06965.

A batch is cut into M micro-batches. Every stage runs the forwards of all M, then their
backwards, and then applies the mean of the gradients::

    w_k <- w_k - lr * 1/M * sum over m < M of grad_k f(w; x_{n,m})

No gradient is stale: all M belong to the weights that they update. Of each M + K - 1
turns, stages idle in K - 1.

As a stage program: a micro-batch is a batch, M of them make an update, a stage's stash
may grow to M (``s_k = M - 1`` batches, none of which is an update), and every M batches
the stages drain. BatchNorm normalises each micro-batch by its own statistics, as in the
paper; the running averages follow each micro-batch, not each batch, and the result is
back-propagation's but for BatchNorm. The paper computes activations anew in the
backward to save memory; backward="recompute" does, and gives the same numbers.
"""

from fdg_jax.methods.method import Method
from fdg_jax.schedule import Schedule


def _schedule(num_stages: int, accumulation: int) -> Schedule:
    staleness = (accumulation - 1,) * (num_stages - 1) + (0,)
    return Schedule("gpipe", staleness, drain_every=accumulation)


METHOD = Method(
    "gpipe",
    schedule=_schedule,
    accumulation=4,
    leaves_open=("accumulation", "backward"),
)
