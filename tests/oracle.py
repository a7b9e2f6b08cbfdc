"""The oracle: the README's ten lines as plain float64 recursions, on their own.

With v_k(n) = max(0, n - s_k) updates applied before the forward of batch n::

    forward   a_k(n)   = f_k(P_k[v_k(n)], a_{k-1}(n))
    backward  (d, g_{k-1}(m)) = vjp of f_k at (P_k[w], a_{k-1}(m)) applied to g_k(m)
    update    P_k[m+1] = optimizer(P_k[m], beta ** (K-1-k) * d)

where w = v_k(m), the forward's weights, or m, today's, for backward="replay", which
also computes what lies inside the stage anew, from a_{k-1}(m) with those weights. The
whole history of parameters is kept, so nothing here queues, stashes or donates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class BatchNormBlock(nnx.Module):
    """Linear, BatchNorm, tanh, dropout: every kind of state that a block can have."""

    def __init__(self, width, *, rngs, rate=0.25, dtype=jnp.float64):
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        # A bias here would have no gradient: BatchNorm subtracts it again.
        self.linear = nnx.Linear(width, width, use_bias=False, **options)
        self.norm = nnx.BatchNorm(width, momentum=0.9, **options)
        # Flax starts the statistics in float32, whatever the other types are.
        self.norm.mean = nnx.BatchStat(jnp.zeros(width, dtype))
        self.norm.var = nnx.BatchStat(jnp.ones(width, dtype))
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(jnp.tanh(self.norm(self.linear(x))))


def make_network(num_blocks=5, width=6, seed=0, rate=0.25, dtype=jnp.float64):
    """Blocks with state of every kind, and a linear head of 3 classes."""
    blocks = [
        BatchNormBlock(
            width, rngs=nnx.Rngs(params=seed + i, dropout=i), rate=rate, dtype=dtype
        )
        for i in range(num_blocks - 1)
    ]
    options = {"dtype": dtype, "param_dtype": dtype}
    head = nnx.Linear(width, 3, rngs=nnx.Rngs(params=seed + num_blocks), **options)
    return [*blocks, head]


def make_batches(num_batches, batch_size=8, width=6, seed=0, dtype=np.float64):
    """Random batches in the form that a pipeline takes."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=(batch_size, width)).astype(dtype),
            "label": rng.integers(0, 3, batch_size).astype(np.int32),
        }
        for _ in range(num_batches)
    ]


def cross_entropy(outputs, label):
    """Mean cross-entropy, written out."""
    shifted = outputs - jax.scipy.special.logsumexp(outputs, axis=-1, keepdims=True)
    return -jnp.take_along_axis(shifted, label[:, None], axis=-1).mean()


def parts(module):
    """(graphdef, parameters, random state, statistics) of a block."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


class _Functions:
    """Forward and vjp of a kind of block, compiled once for all simulations."""

    def __init__(self, module, seed):
        graphdef, _, random_state, _ = parts(module)

        def apply(params, stats, x, key):
            states = nnx.to_flat_state(random_state)
            fresh = []
            for j, (path, variable) in enumerate(states):
                if variable.type is nnx.RngKey:
                    value = jax.random.fold_in(key, j)
                else:
                    value = jnp.zeros((), jnp.uint32)
                fresh.append((path, variable.replace(value)))
            params, stats = nnx.State(params), nnx.State(stats)
            block = nnx.merge(graphdef, params, nnx.from_flat_state(fresh), stats)
            block.train()
            return block(x), nnx.to_pure_dict(parts(block)[3])

        def forward(params, stats, x, index, batch):
            # The contract: a random layer's key depends on seed, block and batch only.
            key = jax.random.fold_in(jax.random.key(seed), batch)
            return apply(params, stats, x, jax.random.fold_in(key, index))

        def pull(params, stats, x, index, batch, cotangent):
            def of_params_and_input(params, x):
                return forward(params, stats, x, index, batch)

            _, vjp, _ = jax.vjp(of_params_and_input, params, x, has_aux=True)
            return vjp(cotangent)

        self.apply, self.forward, self.pull = apply, jax.jit(forward), jax.jit(pull)


@functools.cache
def _functions(num_blocks, seed):
    *_, middle, head = make_network()
    return [_Functions(middle, seed)] * (num_blocks - 1) + [_Functions(head, seed)]


_loss_gradient = jax.jit(jax.value_and_grad(cross_entropy))


def simulate(
    network,
    batches,
    *,
    cuts,
    staleness,
    shrink=1.0,
    backward="stored",
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    seed=0,
    num_snapshot=None,
):
    """Trains a network of ``make_network`` as the equations above say.

    Returns:
        (losses, parameters and statistics per block). The parameters are those after
        all updates, or with ``num_snapshot`` those with which batch ``num_snapshot``
        would be forwarded.
    """
    functions = _functions(len(network), seed)
    num_stages, num_batches = len(staleness), len(batches)
    bounds = [0, *cuts, len(network)]
    stage_of = np.searchsorted(cuts, np.arange(len(network)), side="right")
    split = [parts(module) for module in network]
    history = [[nnx.to_pure_dict(p)] for _, p, _, _ in split]
    trace = [jax.tree.map(np.zeros_like, h[0]) for h in history]
    stats = [[nnx.to_pure_dict(s)] for _, _, _, s in split]
    inputs, cotangent, losses = {}, {}, []

    def forward(k, n):
        version = max(0, n - staleness[k])
        for i in range(bounds[k], bounds[k + 1]):
            x = batches[n]["image"] if i == 0 else inputs[i, n]
            inputs[i, n] = x
            y, new = functions[i].forward(
                history[i][version], stats[i][n], x, jnp.uint32(i), jnp.uint32(n)
            )
            inputs[i + 1, n] = y
            stats[i].append(new)

    def backward_and_update(k, m):
        version = max(0, m - staleness[k])
        if backward == "replay":
            version = m
            for i in range(bounds[k], bounds[k + 1] - 1):
                inputs[i + 1, m], _ = functions[i].forward(
                    history[i][m],
                    stats[i][m],
                    inputs[i, m],
                    jnp.uint32(i),
                    jnp.uint32(m),
                )
        g = cotangent[k, m]
        for i in reversed(range(bounds[k], bounds[k + 1])):
            gradient, g = functions[i].pull(
                history[i][version],
                stats[i][m],
                inputs[i, m],
                jnp.uint32(i),
                jnp.uint32(m),
                g,
            )
            scale = shrink ** (num_stages - 1 - stage_of[i])
            decayed = jax.tree.map(
                lambda d, p, scale=scale: scale * d + weight_decay * p,
                gradient,
                history[i][m],
            )
            trace[i] = jax.tree.map(lambda v, d: momentum * v + d, trace[i], decayed)
            history[i].append(
                jax.tree.map(
                    lambda p, v: p - learning_rate * v, history[i][m], trace[i]
                )
            )
        cotangent[k - 1, m] = g

    for n in range(num_batches + staleness[0]):
        if n < num_batches:
            for k in range(num_stages):
                forward(k, n)
            outputs = inputs[len(network), n]
            loss, g = _loss_gradient(outputs, batches[n]["label"])
            losses.append(float(loss))
            cotangent[num_stages - 1, n] = g
        for k in reversed(range(num_stages)):
            if 0 <= n - staleness[k] < num_batches:
                backward_and_update(k, n - staleness[k])

    updates = [
        num_batches if num_snapshot is None else max(0, num_snapshot - staleness[k])
        for k in stage_of
    ]
    params = [history[i][updates[i]] for i in range(len(network))]
    return losses, params, [s[-1] for s in stats]


def values(network):
    """Parameters and statistics per block of a network, as nested dicts."""
    split = [parts(module) for module in network]
    return (
        [nnx.to_pure_dict(p) for _, p, _, _ in split],
        [nnx.to_pure_dict(s) for _, _, _, s in split],
    )


def relative_error(got, expected):
    """Largest |got - expected| / |expected| over the arrays of a pytree, by norm."""
    errors = jax.tree.map(
        lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)),
        got,
        expected,
    )
    return max(jax.tree.leaves(errors))
