"""Every method as its paper writes it: a history of parameters, nothing queued.

Each simulation stands on its own below its equation, in float64. They share a network
cut into blocks, SGD with momentum and weight decay, and the first line of all papers:
f is the loss of the whole network, grad_k its gradient by the parameters of stage k.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import oracle

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, SEED = 0.1, 0.9, 5e-4, 0


class Image(nnx.Module):
    """The head of a network of images: the mean over pixels, and a linear layer."""

    def __init__(self, width, rngs):
        types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        self.linear = nnx.Linear(width, 3, rngs=rngs, **types)

    def __call__(self, x):
        return self.linear(x.mean((1, 2)))


def make_image_network(num_blocks=5, width=6):
    """The oracle's network with a head for images [batch, height, width, channels]."""
    *blocks, _ = oracle.make_network(num_blocks, width)
    return [*blocks, Image(width, nnx.Rngs(7))]


def make_image_batches(num_batches, shape=(8, 9, 6, 6)):
    """Random images whose height and width divide by nothing that a head wants."""
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.normal(size=shape),
            "label": rng.integers(0, 3, shape[0]).astype(np.int32),
        }
        for _ in range(num_batches)
    ]


class Simulation:
    """What all simulations start from.

    Attributes:
        params: per block its parameters at the start.
        stats: per block its BatchNorm statistics, kept up to date by the simulation.
        stage_of: the stage k of each block.
        losses: of the batches so far.
    """

    def __init__(self, network, cuts):
        self.params, self.stats = oracle.values(network)
        self.cuts, self.num_stages = cuts, len(cuts) + 1
        self.stage_of = np.searchsorted(cuts, np.arange(len(network)), side="right")
        self.losses = []

    def blocks(self, stage):
        """The positions of a stage's blocks."""
        return [i for i, k in enumerate(self.stage_of) if k == stage]

    def result(self, params):
        """(losses, (parameters, statistics)), as tests compare them."""
        return self.losses, (params, self.stats)


def sgd(history, gradient):
    """g <- g + wd w;  v <- m v + g;  w <- w - lr v, onto the end of a history.

    A history is a list of (w, v), the newest last.
    """
    w, v = history[-1]
    v = jax.tree.map(
        lambda v, g, w: MOMENTUM * v + (g + WEIGHT_DECAY * w), v, gradient, w
    )
    history.append((jax.tree.map(lambda w, v: w - LEARNING_RATE * v, w, v), v))


def begin(params):
    """A history of its first parameters, with no momentum."""
    return [(params, jax.tree.map(np.zeros_like, params))]


def mean(trees):
    """The mean of pytrees."""
    return jax.tree.map(lambda *a: sum(a) / len(a), *trees)


@functools.cache
def _block_functions(num_blocks, images, rate):
    *_, middle, head = oracle.make_network(rate=rate)
    head = make_image_network()[-1] if images else head
    kinds = [oracle._Functions(module, SEED) for module in (middle, head)]
    return [kinds[0]] * (num_blocks - 1) + [kinds[1]]


@functools.cache
def gradient_of_network(num_blocks=5, rate=0.25, share=False):
    """((f, new statistics), grad f) at (w, statistics, x, label, n, d), uncut.

    With ``share`` the random layers draw for device d.
    """
    functions = _block_functions(num_blocks, False, rate)

    def f(params, stats, x, label, n, d):
        key = jax.random.fold_in(jax.random.key(SEED), n)
        key = jax.random.fold_in(key, d) if share else key
        new_stats = []
        for i in range(num_blocks):
            key_i = jax.random.fold_in(key, i)
            x, new = functions[i].apply(params[i], stats[i], x, key_i)
            new_stats.append(new)
        return oracle.cross_entropy(x, label), new_stats

    return jax.jit(jax.value_and_grad(f, has_aux=True))


def _step(simulation, w, n, batch):
    """Batch n through the uncut network with weights w: gradients; keeps the rest."""
    (loss, simulation.stats), gradient = gradient_of_network()(
        w, simulation.stats, batch["image"], batch["label"], np.uint32(n), np.uint32(0)
    )
    simulation.losses.append(float(loss))
    return gradient


def bp(network, batches, cuts, accumulation=1):
    """w <- w - lr * 1/M * sum over M batches of grad f(w; x): the uncut network."""
    simulation = Simulation(network, cuts)
    w, due = begin(simulation.params), []
    for n, batch in enumerate(batches):
        due.append(_step(simulation, w[-1][0], n, batch))
        if len(due) == accumulation:
            sgd(w, mean(due))
            due = []
    return simulation.result(w[-1][0])


def dp(network, batches, cuts, devices, rate=0.25):
    """w <- w - lr * mean over d of grad f(w; share d); statistics are their mean."""
    simulation = Simulation(network, ())
    f, w = gradient_of_network(rate=rate, share=True), begin(simulation.params)
    for n, batch in enumerate(batches):
        images, labels = (np.split(batch[name], devices) for name in ("image", "label"))
        values, gradients = zip(
            *(
                f(w[-1][0], simulation.stats, x, y, np.uint32(n), np.uint32(d))
                for d, (x, y) in enumerate(zip(images, labels, strict=True))
            ),
            strict=True,
        )
        sgd(w, mean(gradients))
        losses, stats = zip(*values, strict=True)
        simulation.losses.append(float(np.mean(losses)))
        simulation.stats = mean(stats)
    return simulation.result(w[-1][0])


def gpipe(network, batches, cuts, micro_batches):
    """w <- w - lr * 1/M * sum_m grad f(w; x_{n,m}): back-propagation, M at a time."""
    return bp(network, batches, cuts, accumulation=micro_batches)


def ddg(network, batches, cuts):
    """w_k^{t+1} = w_k^t - lr * grad_k f(w^{t - s}; x_{t - s}), s = K - 1 - k.

    Iteration t forwards batch t through all modules with w^t.
    """
    simulation = Simulation(network, cuts)
    last = simulation.num_stages - 1
    w = [begin(p) for p in simulation.params]
    at_iteration, gradients = [], []
    for t in range(len(batches) + last):
        at_iteration.append([history[-1][0] for history in w])
        if t < len(batches):
            gradients.append(_step(simulation, at_iteration[t], t, batches[t]))
        for i, k in enumerate(simulation.stage_of):
            if 0 <= t - (last - k) < len(batches):
                sgd(w[i], gradients[t - (last - k)][i])
    return simulation.result([history[-1][0] for history in w])


def pipedream(network, batches, cuts):
    """w^{t+1} = w^t - lr * grad f(w_0^{t - (K-1)}, w_1^{t - (K-2)}, ..., w_{K-1}^t).

    Version t is that after t updates; versions below 0 are version 0.
    """
    simulation = Simulation(network, cuts)
    last = simulation.num_stages - 1
    w = [begin(p) for p in simulation.params]
    for t, batch in enumerate(batches):
        stashed = [
            history[max(0, t - (last - k))][0]
            for history, k in zip(w, simulation.stage_of, strict=True)
        ]
        for history, gradient in zip(
            w, _step(simulation, stashed, t, batch), strict=True
        ):
            sgd(history, gradient)
    return simulation.result([history[-1][0] for history in w])


def total(trees):
    """The sum of pytrees."""
    return jax.tree.map(lambda *a: sum(a), *trees)


def adl(
    network, batches, cuts, accumulation, mode="reference", shrink=1.0, combine=mean
):
    """w_k^{u+1} = w_k^u - lr * 1/M * sum over n = uM ... uM + M - 1 of grad_k(n).

    With ``combine=total`` there is no 1/M, as in the authors' program.

    grad_k(n) is taken at the weights of batch n's forward, which stage k did when it
    had added up n - s_k gradients: version floor((n - s_k) / M).
    """
    simulation = Simulation(network, cuts)
    distance = simulation.num_stages - 1 - simulation.stage_of
    late = {"reference": np.maximum(2 * distance - 1, 0), "paper": 2 * distance}[mode]
    w = [begin(p) for p in simulation.params]
    due = []
    for n, batch in enumerate(batches):
        versions = np.maximum(n - late, 0) // accumulation
        then = [history[v][0] for history, v in zip(w, versions, strict=True)]
        due.append(_step(simulation, then, n, batch))
        if len(due) == accumulation:
            for i, gradient in enumerate(combine(due)):
                factor = shrink ** distance[i]
                sgd(w[i], jax.tree.map(lambda g, factor=factor: factor * g, gradient))
            due = []
    return simulation.result([history[-1][0] for history in w])


class _Stages:
    """Forward and vjp of each stage, for the methods that are written that way."""

    def __init__(self, simulation, batches):
        self._simulation, self._batches = simulation, batches
        self._functions = _block_functions(len(simulation.stage_of), False, 0.25)

    def forward(self, k, w, n, x):
        """h_k of batch n; the statistics follow."""
        for i in self._simulation.blocks(k):
            x, self._simulation.stats[i] = self._call(i, w, n, x)
        return x

    def loss(self, n, h):
        """The loss of batch n, noted, and its gradient by the network's output."""
        label = self._batches[n]["label"]
        loss, g = oracle._loss_gradient(h, label)
        self._simulation.losses.append(float(loss))
        return g

    def vjp(self, k, w, n, x, g):
        """(gradients of the stage's blocks, cotangent of its input) at weights w."""
        inputs = {}
        for i in self._simulation.blocks(k):
            inputs[i] = x
            x, _ = self._call(i, w, n, x)
        gradients = {}
        for i in reversed(self._simulation.blocks(k)):
            stats = self._simulation.stats[i]
            gradients[i], g = self._functions[i].pull(
                w[i], stats, inputs[i], np.uint32(i), np.uint32(n), g
            )
        return gradients, g

    def _call(self, i, w, n, x):
        stats = self._simulation.stats[i]
        return self._functions[i].forward(w[i], stats, x, np.uint32(i), np.uint32(n))


def fr(network, batches, cuts):
    """w_k^{t+1} = w_k^t - lr * (d h_k(w_k^t; h_{k-1}(t - s)) / d w_k)' delta_k^t.

    At iteration t batch t goes through all modules with w^t, and each module replays
    its input of s = K - 1 - k iterations ago; delta_k^t is the cotangent that module
    k + 1 made at iteration t - 1, in module K - 1 the loss's own.
    """
    simulation = Simulation(network, cuts)
    stages, last = _Stages(simulation, batches), simulation.num_stages - 1
    w = [begin(p) for p in simulation.params]
    h, delta = {}, {}
    for t in range(len(batches) + last):
        today = [history[-1][0] for history in w]
        if t < len(batches):
            h[-1, t] = batches[t]["image"]
            for k in range(last + 1):
                h[k, t] = stages.forward(k, today, t, h[k - 1, t])
            delta[last, t] = stages.loss(t, h[last, t])
        for k in range(last + 1):
            m = t - (last - k)
            if 0 <= m < len(batches):
                gradients, delta[k - 1, t + 1] = stages.vjp(
                    k, today, m, h[k - 1, m], delta[k, t]
                )
                for i, gradient in gradients.items():
                    sgd(w[i], gradient)
    return simulation.result([history[-1][0] for history in w])


def fdg(network, batches, cuts, mode="reference", shrink=1.0):
    """w_k <- w_k - lr * grad_k of batch t - 2(K-1) + k, whose cotangent was shrunk.

    At iteration t module k forwards batch t - k and pulls back, through the weights of
    its forward, beta times the cotangent that module k + 1 made at iteration t - 1.
    "paper" does so in this order; the authors' program, "reference", updates first. The
    last module has to forward a batch before it can pull its loss back.
    """
    simulation = Simulation(network, cuts)
    stages, last = _Stages(simulation, batches), simulation.num_stages - 1
    w = [begin(p) for p in simulation.params]
    h, at_forward, delta = {}, {}, {}

    def forward(k, n):
        if 0 <= n < len(batches):
            x = batches[n]["image"] if k == 0 else h[k - 1, n]
            at_forward[k, n] = [history[-1][0] for history in w]
            h[k, n] = stages.forward(k, at_forward[k, n], n, x)
            if k == last:
                delta[last, n] = stages.loss(n, h[last, n])

    def backward(k, m):
        if 0 <= m < len(batches):
            x = batches[m]["image"] if k == 0 else h[k - 1, m]
            gradients, g = stages.vjp(k, at_forward[k, m], m, x, delta[k, m])
            delta[k - 1, m] = shrink * g
            for i, gradient in gradients.items():
                sgd(w[i], gradient)

    for t in range(len(batches) + 2 * last):
        # At one iteration modules work on different batches, so their order is free,
        # but each module's forward and backward have one.
        for k in range(last + 1):
            if mode == "reference" and k < last:
                backward(k, t - 2 * last + k)
                forward(k, t - k)
            else:
                forward(k, t - k)
                backward(k, t - 2 * last + k)
    return simulation.result([history[-1][0] for history in w])


def dgl(network, batches, cuts, heads, head_values):
    """min over (w_k, a_k) of f(a_k(h_k)), h_k = f_k(w_k; stop_gradient(h_{k-1})).

    The whole network in one go: one gradient of the sum of all stages' losses.

    Args:
        heads: modules, one per stage but the last.
        head_values: their parameters, and their statistics, at the start.

    Returns:
        (losses, (parameters, statistics), (those of the heads)).
    """
    simulation = Simulation(network, cuts)
    functions = _block_functions(len(network), True, 0.25)
    head_functions = [oracle._Functions(head, SEED) for head in heads]
    last = simulation.num_stages - 1

    def total(values, stats, batch, n):
        (params, head_params), (stats, head_stats) = values, stats
        key, h, losses = jax.random.fold_in(jax.random.key(SEED), n), batch["image"], []
        stats, head_stats = list(stats), list(head_stats)
        for k in range(last + 1):
            h = jax.lax.stop_gradient(h)
            for i in simulation.blocks(k):
                key_i = jax.random.fold_in(key, i)
                h, stats[i] = functions[i].apply(params[i], stats[i], h, key_i)
            outputs = h
            if k < last:
                outputs, head_stats[k] = head_functions[k].apply(
                    head_params[k], head_stats[k], h, key
                )
            losses.append(oracle.cross_entropy(outputs, batch["label"]))
        return sum(losses), (losses[-1], (stats, head_stats))

    gradient_of = jax.jit(jax.grad(total, has_aux=True))
    w = begin((simulation.params, head_values[0]))
    stats = (simulation.stats, head_values[1])
    for n, batch in enumerate(batches):
        gradient, (loss, stats) = gradient_of(w[-1][0], stats, batch, np.uint32(n))
        simulation.losses.append(float(loss))
        sgd(w, gradient)
    (params, head_params), (simulation.stats, head_stats) = w[-1][0], stats
    return *simulation.result(params), (head_params, head_stats)
