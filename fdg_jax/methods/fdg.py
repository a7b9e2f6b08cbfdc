"""FDG: fully decoupled learning with delayed gradients, shrunk on their way.

Zhuang, Wang, Liu, Lin: "Fully Decoupled Neural Network Learning Using Delayed
Gradients", TNNLS 33(10), arXiv 1906.09108.

At iteration t stage k forwards batch t - k and pulls back, through the weights of its
own forward, beta times the cotangent that stage k + 1 made at iteration t - 1. With
beta the factor at each cut, and c_{K-1} the gradient of the loss::

    m          = t - 2 (K - 1) + k
    (d, c)     = vjp of stage k at its weights and input in the forward of batch m,
                 applied to c_k(m)
    w_k       <- w_k - lr * d
    c_{k-1}(m) = beta * c

So d carries beta^(K - 1 - k), and the last stage's is not late; that of others by::

    s_k = 2 (K - 1 - k)        batches in this order ("paper", the equations), or
    s_k = 2 (K - 1 - k) - 1    with the update before the forward of the same iteration
                               ("reference", the authors' program)

Each stage has forwarded batch m with a version of its weights of its own, so no single
version of the network has.

It leaves everything open, so that any other schedule, choice of weights, shrinking or
accumulation is one of its settings.
"""

from fdg_jax.methods.method import Method

METHOD = Method("fdg", leaves_open=("schedule", "backward", "accumulation", "shrink"))
