"""DDG: delayed gradients, each one iteration later per stage.

Huo, Gu, Yang, Huang: "Decoupled Parallel Backpropagation with Convergence Guarantee",
ICML 2018, arXiv 1804.10574.

At iteration t stage k applies the gradient of the batch of K - 1 - k iterations ago,
taken at the weights of then::

    s_k = K - 1 - k
    w_k <- w_k - lr * grad_k f(w^{t - s_k}; x_{t - s_k})

What was chosen: the authors' program keeps PyTorch's graph while its optimizer writes
the weights in place, and so mixes old activations with new weights; here the backward
uses the weights of the forward (``stored``), as in the equation. That program has
Nesterov's momentum; here the optimizer is the config's.
"""

from fdg_jax.methods.method import Method

METHOD = Method("ddg", schedule="minimal", backward="stored")
