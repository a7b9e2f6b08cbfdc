"""PipeDream: one forward, one backward (1F1B), each with the weights of its forward.

Narayanan, Harlap, Phanishayee, Seshadri, Devanur, Ganger, Gibbons, Zaharia:
"PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019; preprint
arXiv 1806.03377.

With weight stashing a stage's backward uses the weights of its own forward, which
differ from stage to stage::

    s_k = K - 1 - k
    w_k <- w_k - lr * grad_k f(w_0^{t - (K-1)}, ..., w_{K-1}^{t}; x)

It is the schedule ``minimal`` with stored residuals, and so computes what ``ddg`` does:
the two papers arrive at the same program, one from pipelining and one from decoupling.
Vertical sync, which has all stages use the version of the first, is not offered: the
last stage would be stale too. BatchNorm's running averages have no versions.
"""

from fdg_jax.methods.method import Method

METHOD = Method("pipedream", schedule="minimal", backward="stored")
