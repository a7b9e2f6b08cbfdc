"""FR: Features Replay, which keeps only inputs and replays them with today's weights.

Huo, Gu, Huang: "Training Neural Networks Using Features Replay", NeurIPS 2018, arXiv
1807.04511.

At iteration t stage k takes its input of K - 1 - k iterations ago, runs it through its
weights of today, and pulls back the cotangent that the stage below has sent for it::

    s_k = K - 1 - k
    w_k <- w_k - lr * vjp of h_k at (w_k^t, x_k^{t - s_k}) applied to g_{k+1}

As a stage program: the schedule ``minimal`` with backward="replay". In the paper the
forward is locked, stage after stage in one iteration; here stages overlap, which
changes no number. What was chosen: BatchNorm's running averages follow the first
forward alone, where the authors' program updates them in the replay too; and all stages
have the same learning rate, where that program doubles the first stage's.
"""

from fdg_jax.methods.method import Method

METHOD = Method("fr", schedule="minimal", backward="replay")
