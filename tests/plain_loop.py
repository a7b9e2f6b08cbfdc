"""Plain training of a whole network, as one writes it without a pipeline.

Flax NNX and Optax only: nothing of fdg_jax's is imported here, so that its results can
be held to these. All arrays are float64. ``CASES`` are the networks, and
``OPTIMIZERS`` what trains them.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

NUM_BATCHES = 10
F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


def initial(key, shape, dtype=jnp.float64):
    """Normal numbers over the root of what goes in, by NumPy: nothing is compiled."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 1
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), dtype)


KERNEL = {"kernel_init": initial, **F64}


# The loop


def sum_and_count(loss, batch):
    """A loss as (sum, count); the mean of a batch counts its examples."""
    if isinstance(loss, tuple):
        return loss
    examples = jax.tree.leaves(batch["image"])[0].shape[0]
    return loss * examples, examples


def call(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def _take_apart(network):
    """Graph, parameters and all other state of each block."""
    return [nnx.split(nnx.clone(block), nnx.Param, ...) for block in network]


def _put_together(split, params, rests):
    """The blocks with these parameters, a nested dict per position, and this state."""
    blocks = []
    for i, (graphdef, state, _) in enumerate(split):
        flat = [
            (
                path,
                variable.replace(functools.reduce(operator.getitem, path, params[i])),
            )
            for path, variable in nnx.to_flat_state(state)
        ]
        state = nnx.from_flat_state(flat)
        blocks.append(nnx.merge(graphdef, state, rests[i], copy=True))
    return blocks


def params_of(network):
    """What an optimizer of the whole network is given: {position: {name: ...}}."""
    states = [nnx.state(block, nnx.Param) for block in network]
    return {i: nnx.to_pure_dict(state) for i, state in enumerate(states)}


class Trained(NamedTuple):
    losses: list  # of each batch, before the update that it is used for
    outputs: list  # of each batch, in training mode
    network: list  # in evaluation mode


class Loop:
    """Trains copies of a network by the gradient of summed losses over their count."""

    def __init__(self, network, loss_fn):
        self.network = network
        self._split = _take_apart(network)

        def gradients(params, rests, batch):
            def total_loss(params):
                blocks = _put_together(self._split, params, rests)
                for block in blocks:
                    block.train()
                outputs = call(blocks, batch["image"])
                total, count = sum_and_count(loss_fn(outputs, batch["label"]), batch)
                rest = [nnx.state(block, nnx.Not(nnx.Param)) for block in blocks]
                return total, (count, outputs, rest)

            return jax.value_and_grad(total_loss, has_aux=True)(params)

        self._gradients = jax.jit(gradients)

    def train(self, batches, optimizer, accumulation=1):
        """Updates all parameters at once, after each ``accumulation`` batches."""

        @jax.jit
        def update(params, opt_state, grads, count):
            grads = jax.tree.map(lambda *g: sum(g) / count, *grads)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params = params_of(self.network)
        rests = [rest for _, _, rest in self._split]
        opt_state = optimizer.init(params)
        losses, all_outputs, gathered, counts = [], [], [], []
        for batch in batches:
            (total, (count, outputs, rests)), grads = self._gradients(
                params, rests, batch
            )
            losses.append(float(total / count))
            all_outputs.append(outputs)
            gathered.append(grads)
            counts.append(count)
            if len(gathered) == accumulation:
                params, opt_state = update(params, opt_state, gathered, sum(counts))
                gathered, counts = [], []
        blocks = _put_together(self._split, params, rests)
        for block in blocks:
            block.eval()
        return Trained(losses, all_outputs, blocks)


def evaluate(network, batch, function):
    """What a loss or metric is over one batch: the mean, or the sum over the count."""
    outputs = call(network, jax.tree.map(jnp.asarray, batch["image"]))
    total, count = sum_and_count(function(outputs, batch["label"]), batch)
    return float(total / count)


# Networks. No bias stands where its gradient would be zero but for rounding (before a
# normalization, say), since Adam and Lion make whole steps of rounding.


def batch_norm(width, rngs):
    norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs, **F64)
    # Flax starts the statistics in float32, whatever the other types are.
    norm.mean = nnx.BatchStat(jnp.zeros(width, jnp.float64))
    norm.var = nnx.BatchStat(jnp.ones(width, jnp.float64))
    return norm


class Embed(nnx.Module):
    """Tokens, 0 for padding, to (activations, mask): what a position may look at."""

    def __init__(self, vocabulary, length, width, *, rngs):
        self.token = nnx.Embed(
            vocabulary, width, embedding_init=initial, rngs=rngs, **F64
        )
        self.position = nnx.Param(
            0.1 * rngs.params.normal((length, width), jnp.float64)
        )

    def __call__(self, tokens):
        x = self.token(tokens) + self.position[None]
        mask = nnx.make_causal_mask(tokens) * nnx.make_attention_mask(
            jnp.ones_like(tokens), tokens > 0
        )
        return x, mask.astype(jnp.float64)  # only floating point crosses a cut


def attention(query, key, value, mask, **_):
    """Softmax attention in float64; JAX's own has the softmax in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Layer(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs, **F64)
        self.attention = nnx.MultiHeadAttention(
            2,
            width,
            use_bias=False,
            decode=False,
            attention_fn=attention,
            rngs=rngs,
            **KERNEL,
        )
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs, **F64)
        self.mlp = nnx.Sequential(
            nnx.Linear(width, 2 * width, rngs=rngs, **KERNEL),
            nnx.gelu,
            nnx.Linear(2 * width, width, rngs=rngs, **KERNEL),
        )
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, inputs):
        x, mask = inputs
        x = x + self.attention(self.norm_attention(x), mask=mask > 0)
        return x + self.dropout(self.mlp(self.norm_mlp(x))), mask


class LanguageHead(nnx.Module):
    def __init__(self, width, vocabulary, *, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs, **F64)
        self.linear = nnx.Linear(width, vocabulary, rngs=rngs, **KERNEL)

    def __call__(self, inputs):
        return self.linear(self.norm(inputs[0]))


def make_gpt():
    rngs = nnx.Rngs(0)
    layers = [Layer(8, rngs=rngs) for _ in range(2)]
    return [Embed(11, 6, 8, rngs=rngs), *layers, LanguageHead(8, 11, rngs=rngs)]


def make_token_batch(rng, size=4):
    tokens = rng.integers(1, 11, (size, 7))
    for row, length in zip(tokens, rng.integers(2, 8, size), strict=True):
        row[length:] = 0
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    label = np.where(following > 0, following, -100)
    return {"image": inputs.astype(np.int32), "label": label.astype(np.int32)}


def token_loss(outputs, label):
    """Cross-entropy of the labels that are not -100, as (sum, count)."""
    known = label != -100
    losses = optax.softmax_cross_entropy_with_integer_labels(
        outputs, jnp.where(known, label, 0)
    )
    return jnp.where(known, losses, 0.0).sum(), known.sum()


class ToTuple(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs, **KERNEL)

    def __call__(self, x):
        return jnp.tanh(self.linear(x)), None


class ToDict(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs, **KERNEL)

    def __call__(self, inputs):
        x, nothing = inputs
        assert nothing is None
        return {"x": jnp.tanh(self.linear(x)), "mask": None, "skip": x}


class DictToDict(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs, **KERNEL)
        self.gate = nnx.Param(jnp.full((1, width), 0.5, jnp.float64))

    def __call__(self, inputs):
        assert inputs["mask"] is None
        x = jnp.tanh(self.linear(inputs["x"])) + self.gate * inputs["skip"]
        return {**inputs, "x": x}


class FromDict(nnx.Module):
    def __init__(self, width, classes, *, rngs):
        self.linear = nnx.Linear(width, classes, rngs=rngs, **KERNEL)

    def __call__(self, inputs):
        return self.linear(inputs["x"] + inputs["skip"])


def make_structures():
    rngs = nnx.Rngs(1)
    makes = (ToTuple, ToDict, DictToDict, DictToDict)
    return [*(make(6, rngs=rngs) for make in makes), FromDict(6, 3, rngs=rngs)]


class Stem(nnx.Module):
    def __init__(self, width, *, rngs):
        self.conv = nnx.Conv(1, width, (3, 3), rngs=rngs, **KERNEL)

    def __call__(self, image):
        return nnx.gelu(self.conv(image)), []


class Down(nnx.Module):
    def __init__(self, width, *, rngs):
        self.conv = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs, **KERNEL)

    def __call__(self, inputs):
        x, skips = inputs
        return nnx.gelu(self.conv(x)), [*skips, x]


class Up(nnx.Module):
    def __init__(self, width, *, rngs):
        self.up = nnx.ConvTranspose(2 * width, width, (2, 2), 2, rngs=rngs, **KERNEL)
        self.conv = nnx.Conv(2 * width, width, (3, 3), rngs=rngs, **KERNEL)

    def __call__(self, inputs):
        x, (*skips, skip) = inputs
        x = jnp.concatenate([self.up(x), skip], axis=-1)
        return nnx.gelu(self.conv(x)), skips


class ImageHead(nnx.Module):
    def __init__(self, width, *, rngs):
        self.conv = nnx.Conv(width, 1, (1, 1), rngs=rngs, **KERNEL)

    def __call__(self, inputs):
        x, skips = inputs
        assert not skips
        return self.conv(x)


class Squash(nnx.Module):
    """No parameters: as the last stage it has nothing to train."""

    def __call__(self, x):
        return jnp.tanh(x)


def make_unet():
    rngs = nnx.Rngs(2)
    down = [Stem(2, rngs=rngs), Down(2, rngs=rngs), Down(4, rngs=rngs)]
    up = [Up(4, rngs=rngs), Up(2, rngs=rngs), ImageHead(2, rngs=rngs)]
    return [*down, *up, Squash()]


def make_image_batch(rng, size=4):
    image = rng.normal(size=(size, 8, 8, 1))
    return {"image": image, "label": np.roll(image, 1, axis=1)}


def squared_error(outputs, label):
    return jnp.square(outputs - label).mean()


class Recurrent(nnx.Module):
    def __init__(self, features, width, *, rngs):
        cell = nnx.LSTMCell(
            features, width, recurrent_kernel_init=initial, rngs=rngs, **KERNEL
        )
        self.rnn = nnx.RNN(cell, rngs=rngs)

    def __call__(self, x):
        return self.rnn(x)


class LastStep(nnx.Module):
    def __init__(self, width, classes, *, rngs):
        self.linear = nnx.Linear(width, classes, rngs=rngs, **KERNEL)

    def __call__(self, x):
        return self.linear(x[:, -1])


def make_lstm():
    rngs = nnx.Rngs(3)
    layers = [Recurrent(3, 5, rngs=rngs), Recurrent(5, 5, rngs=rngs)]
    return [*layers, LastStep(5, 3, rngs=rngs)]


def make_sequence_batch(rng, size=8):
    label = rng.integers(0, 3, size).astype(np.int32)
    return {"image": rng.normal(size=(size, 5, 3)), "label": label}


class ConvNorm(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.conv = nnx.Conv(
            inputs, outputs, (3, 3), use_bias=False, rngs=rngs, **KERNEL
        )
        self.norm = batch_norm(outputs, rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class PoolHead(nnx.Module):
    def __init__(self, width, classes, *, rngs):
        self.linear = nnx.Linear(width, classes, rngs=rngs, **KERNEL)

    def __call__(self, x):
        return self.linear(x.mean((1, 2)))


def make_convnet():
    rngs = nnx.Rngs(4)
    convs = [ConvNorm(1, 4, rngs=rngs), *(ConvNorm(4, 4, rngs=rngs) for _ in range(2))]
    return [*convs, PoolHead(4, 3, rngs=rngs)]


def make_picture_batch(rng, size=8):
    label = rng.integers(0, 3, size).astype(np.int32)
    return {"image": rng.normal(size=(size, 6, 6, 1)), "label": label}


class DictParam(nnx.Module):
    """All of its parameters in one ``nnx.Param``."""

    def __init__(self, width, *, rngs):
        kernel = initial(rngs.params(), (width, width))
        self.layer = nnx.Param(
            {"kernel": kernel, "bias": jnp.zeros(width, jnp.float64)}
        )

    def __call__(self, x):
        kernel, bias = self.layer["kernel"], self.layer["bias"]
        return jnp.tanh(x @ kernel + bias[None])


def make_dict_params():
    rngs = nnx.Rngs(5)
    blocks = [DictParam(6, rngs=rngs) for _ in range(3)]
    return [*blocks, nnx.Linear(6, 3, rngs=rngs, **KERNEL)]


class LinenMlp(linen.Module):
    width: int

    @linen.compact
    def __call__(self, x):
        y = linen.LayerNorm(**F64)(x)
        y = linen.tanh(linen.Dense(2 * self.width, **F64)(y))
        return x + linen.Dense(self.width, **F64)(y)


def make_linen():
    x = jnp.zeros((1, 6), jnp.float64)
    blocks = [
        nnx.bridge.ToNNX(LinenMlp(6), rngs=nnx.Rngs(i)).lazy_init(x) for i in range(3)
    ]
    return [*blocks, nnx.Linear(6, 3, rngs=nnx.Rngs(6), **KERNEL)]


class Rematerialised(nnx.Module):
    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, use_bias=False, rngs=rngs, **KERNEL)
        self.norm = batch_norm(width, rngs)

    def body(self, x):
        return x + jnp.tanh(self.norm(self.linear(x)))

    def __call__(self, x):
        return nnx.remat(type(self).body)(self, x)


def make_remat():
    rngs = nnx.Rngs(7)
    blocks = [Rematerialised(6, rngs=rngs) for _ in range(3)]
    return [*blocks, nnx.Linear(6, 3, rngs=rngs, **KERNEL)]


class Centred(nnx.Module):
    """Reads, in training too, the running mean that it changes."""

    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs, **KERNEL)
        self.mean = nnx.BatchStat(jnp.zeros((1, width), jnp.float64))
        self.use_running_average = False

    def __call__(self, x):
        x = self.linear(x)
        y = jnp.tanh(x - self.mean[...])
        if not self.use_running_average:
            mean = jax.lax.stop_gradient(x).mean(0, keepdims=True)
            self.mean[...] = 0.5 * self.mean[...] + 0.5 * mean
        return y


def make_centred():
    rngs = nnx.Rngs(8)
    blocks = [Centred(6, rngs=rngs) for _ in range(3)]
    return [*blocks, nnx.Linear(6, 3, rngs=rngs, **KERNEL)]


class Narrow(nnx.Module):
    """One of many in a row: arrays of one and of two axes, and statistics."""

    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, use_bias=False, rngs=rngs, **KERNEL)
        self.norm = batch_norm(width, rngs)

    def __call__(self, x):
        return x + 0.2 * jnp.tanh(self.norm(self.linear(x)))


def make_deep(num_equal):
    """``num_equal`` equal blocks in a row, and a head."""
    rngs = nnx.Rngs(9)
    blocks = [Narrow(6, rngs=rngs) for _ in range(num_equal)]
    return [*blocks, nnx.Linear(6, 3, rngs=rngs, **KERNEL)]


def make_vector_batch(rng, size=8):
    label = rng.integers(0, 3, size).astype(np.int32)
    return {"image": rng.normal(size=(size, 6)), "label": label}


def class_losses(outputs, label):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, label)


def mean_loss(outputs, label):
    return class_losses(outputs, label).mean()


class Read(nnx.Module):
    """The array of an image that may be a tuple or a dict, with None elsewhere."""

    def __init__(self, width, *, rngs):
        self.linear = nnx.Linear(width, width, rngs=rngs, **KERNEL)

    def __call__(self, image):
        x, mask = image, None
        if isinstance(image, tuple):
            x, mask = image
        elif isinstance(image, dict):
            x, mask = image["x"], image["mask"]
        assert mask in (None, [None, (None, None)])
        return jnp.tanh(self.linear(x))


def make_reader():
    rngs = nnx.Rngs(10)
    return [
        Read(6, rngs=rngs),
        *(nnx.Linear(6, n, rngs=rngs, **KERNEL) for n in (6, 3)),
    ]


def structured_loss(outputs, label):
    """Of classes, maybe in a dict with weights, or of the outputs by themselves."""
    if label is None:
        return jnp.square(outputs - 1.0).mean()
    if not isinstance(label, dict):
        return mean_loss(outputs, label)
    if label["weight"] is None:
        return mean_loss(outputs, label["class"])
    weight = label["weight"]
    return (weight * class_losses(outputs, label["class"])).sum(), weight.sum()


class Case(NamedTuple):
    make: Callable  # the network, the same at every call
    make_batch: Callable  # make_batch(rng, size)
    loss_fn: Callable
    cuts: dict  # by the number of stages

    def batches(self, sizes=None, seed=0):
        rng = np.random.default_rng(seed)
        if sizes is None:
            return [self.make_batch(rng) for _ in range(NUM_BATCHES)]
        return [self.make_batch(rng, size) for size in sizes]


CASES = {
    "gpt": Case(make_gpt, make_token_batch, token_loss, {2: (2,), 3: (1, 3)}),
    "structures": Case(
        make_structures, make_vector_batch, mean_loss, {2: (2,), 3: (1, 4)}
    ),
    "unet": Case(make_unet, make_image_batch, squared_error, {2: (3,), 3: (2, 6)}),
    "lstm": Case(make_lstm, make_sequence_batch, mean_loss, {2: (1,), 3: (1, 2)}),
    "convnet": Case(make_convnet, make_picture_batch, mean_loss, {2: (2,), 3: (1, 2)}),
    "dict_params": Case(
        make_dict_params, make_vector_batch, mean_loss, {2: (2,), 3: (1, 2)}
    ),
    "linen": Case(make_linen, make_vector_batch, mean_loss, {2: (1,), 3: (1, 3)}),
    "remat": Case(make_remat, make_vector_batch, mean_loss, {2: (2,), 3: (1, 2)}),
    "centred": Case(make_centred, make_vector_batch, mean_loss, {2: (2,), 3: (1, 2)}),
}


# Optimizers. Masks and labels are functions, since a stage has only its own parameters.


def by_ndim(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _names(path):
    return [str(key) for key in path[1:]]


def by_path(params):
    """Decays the odd blocks, but for whatever is called bias or scale."""

    def decays(path, _):
        names = " ".join(_names(path))
        return path[0].key % 2 == 1 and "bias" not in names and "scale" not in names

    return jax.tree.map_with_path(decays, params)


def labels(params):
    """Block 0 stays, kernels of the odd blocks get one rate, all else another."""

    def label(path, _):
        if path[0].key == 0:
            return "frozen"
        kernel = "kernel" in " ".join(_names(path))
        return "fast" if path[0].key % 2 == 1 and kernel else "slow"

    return jax.tree.map_with_path(label, params)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw_ndim": optax.adamw(1e-2, weight_decay=0.5, mask=by_ndim),
    "adamw_path": optax.adamw(1e-2, weight_decay=0.5, mask=by_path),
    "muon": optax.contrib.muon(1e-2),
    # Factored from two numbers on, where others would factor from 128.
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lion": optax.lion(1e-3),
    "multi_transform": optax.multi_transform(
        {
            "frozen": optax.set_to_zero(),
            "fast": optax.sgd(0.1, momentum=0.9),
            "slow": optax.adam(1e-3),
        },
        labels,
    ),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "lars": optax.lars(0.1),
    "lamb": optax.lamb(1e-2, weight_decay=0.1),
}
