"""FDG: fully decoupled learning with delayed gradients, shrunk on their way.

Zhuang, Wang, Liu, Lin: "Fully Decoupled Neural Network Learning Using Delayed
Gradients", TNNLS 33(10), arXiv 1906.09108.

With beta the factor of the cotangent at each cut::

    s_k = 2 (K - 1 - k) - 1    ("reference", the authors' program), or
    s_k = 2 (K - 1 - k)        ("paper", the equations)
    w_k <- w_k - lr * beta^(K - 1 - k) * grad_k f(w^{t - s_k}; x_{t - s_k})

It leaves everything open, so that any other schedule, choice of weights, shrinking or
accumulation is one of its settings.
"""

from fdg_jax.methods.method import Method

METHOD = Method("fdg", leaves_open=("schedule", "backward", "accumulation", "shrink"))
