"""Data parallelism: K devices hold the whole network and share out each batch.

With shares ``x_{n,d}`` of the images of batch n::

    s = 0          w <- w - lr * mean over d of grad f(w; x_{n,d})

It is no decoupled method but what these have to be compared with: the other use of K
devices. There is one stage, on K devices; see ``fdg_jax.data_parallel`` for BatchNorm.
"""

from fdg_jax.methods.method import Method

METHOD = Method(
    "dp", schedule="bp", is_data_parallel=True, leaves_open=("accumulation",)
)
