"""Back-propagation, cut into K stages that wait for each other.

Every stage applies the gradient of batch n before it takes batch n + 1::

    s_k = 0        w_k <- w_k - lr * grad_k f(w; x_n)

It computes what the uncut network would, one stage at a time; with one stage it is
plain back-propagation. Which weights the backward uses makes no difference.
"""

from fdg_jax.methods.method import Method

METHOD = Method("bp", schedule="bp", leaves_open=("backward", "accumulation"))
