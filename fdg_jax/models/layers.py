"""What every network is built of: convolution, BatchNorm, dropout and the head."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from fdg_jax.models.convolution import convolve
from fdg_jax.models.normalization import BatchNorm


def _torch_bias(key, shape, dtype, fan_in):
    bound = 1 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _zero_bias(key, shape, dtype, fan_in):
    del key, fan_in
    return jnp.zeros(shape, dtype)


# Name -> how weights (key, shape, dtype) and biases (key, shape, dtype, fan_in) are
# drawn. A uniform distribution of variance 1/(3 fan_in) lies within 1/sqrt(fan_in).
_variance_scaling = jax.nn.initializers.variance_scaling
INITIALIZERS = {
    "torch": (_variance_scaling(1 / 3, "fan_in", "uniform"), _torch_bias),
    "he_normal": (_variance_scaling(2.0, "fan_in", "normal"), _zero_bias),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What all layers of a network have in common.

    Attributes:
      dropout_rate: the probability that dropout zeroes an element, in [0, 1).
      init: "torch", weights and biases uniform within +-1/sqrt(fan_in), PyTorch's
        default; or "he_normal", weights normal with variance 2/fan_in (He et al.,
        arXiv 1502.01852) and biases zero.
      dtype: the floating-point type that layers compute in.
      param_dtype: the floating-point type of the parameters.

    Raises:
      ValueError: if a value is outside what is said above, or a type is 64 bits wide
        while JAX has 64-bit types switched off.
    """

    dropout_rate: float = 0.0
    init: str = "torch"
    dtype: jax.typing.DTypeLike = jnp.float32
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        """Checks every value and turns both types into `numpy.dtype`s."""
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"dropout_rate must be in [0, 1), got {self.dropout_rate}; "
                "0 means no dropout."
            )
        if self.init not in INITIALIZERS:
            raise ValueError(
                f"init must be one of {', '.join(map(repr, INITIALIZERS))}, "
                f"got {self.init!r}."
            )
        for field in ("dtype", "param_dtype"):
            object.__setattr__(self, field, _float_dtype(field, getattr(self, field)))


def _float_dtype(field, value):
    dtype = jnp.dtype(value)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{field} must be a floating-point type such as 'float32', 'bfloat16' or "
            f"'float64', got {dtype.name!r}."
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{field} {dtype.name!r} needs JAX's 64-bit types, which are off; set "
            "jax.config.update('jax_enable_x64', True) or use 'float32'."
        )
    return dtype


class Conv(nnx.Module):
    """A square convolution of NHWC images, the only one the networks use."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        use_bias: bool = False,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          in_channels: channels of the input.
          out_channels: channels of the output.
          kernel_size: height and width of the kernel, in pixels.
          stride: step of the kernel, in pixels.
          use_bias: whether to add a bias to each output channel.
          options: the network's dtypes and initialisation.
          rngs: where the parameters are drawn from.
        """
        draw_weight, draw_bias = INITIALIZERS[options.init]
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(draw_weight(rngs.params(), shape, options.param_dtype))
        self.bias = nnx.data(None)
        if use_bias:
            fan_in = math.prod(shape[:-1])
            self.bias = nnx.Param(
                draw_bias(rngs.params(), (out_channels,), options.param_dtype, fan_in)
            )
        self.stride = stride
        self.dtype = options.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the convolution of `x`, [batch, height, width, in_channels]."""
        kernel = self.kernel[...].astype(self.dtype)
        y = convolve(x.astype(self.dtype), kernel, self.stride)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)


def _cast_input_only(arrays, *, dtype):
    x, *statistics_and_parameters = arrays
    return x.astype(dtype), *statistics_and_parameters


def batch_norm(channels: int, options: Options, *, rngs: nnx.Rngs) -> BatchNorm:
    """Returns a BatchNorm whose constants are those of PyTorch's default.

    Epsilon is 1e-5 and the running averages keep 0.9 of their old value at each batch
    (Flax's default is 0.99). As in Flax, the running variance averages the biased
    variance of each batch; PyTorch's averages the unbiased one.

    The statistics are kept, and applied, in float32 or wider whatever the compute type.

    Args:
      channels: features along the last axis.
      options: the network's dtypes.
      rngs: where Flax draws the keys of the (constant) initial parameters from.
    """
    norm = BatchNorm(
        channels,
        momentum=0.9,
        epsilon=1e-5,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        promote_dtype=_cast_input_only,
        rngs=rngs,
    )
    # Flax starts the averages in float32, and its first update would widen them where
    # layers compute in float64: a change of type between two steps of one program.
    wide = functools.reduce(
        jnp.promote_types, (jnp.float32, options.dtype, options.param_dtype)
    )
    norm.mean = nnx.BatchStat(jnp.zeros((channels,), wide))
    norm.var = nnx.BatchStat(jnp.ones((channels,), wide))
    return norm


class ConvNorm(nnx.Module):
    """A convolution without bias, then BatchNorm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Builds both layers; arguments as for `Conv`."""
        self.conv = Conv(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            options=options,
            rngs=rngs,
        )
        self.norm = batch_norm(out_channels, options, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `x`, [batch, height, width, in_channels], and normalises."""
        return self.norm(self.conv(x))


def dropout(options: Options, *, broadcast_dims: tuple[int, ...] = (), rngs: nnx.Rngs):
    """Returns a dropout layer, or the identity without random state at rate 0.

    Args:
      options: the network's dropout rate.
      broadcast_dims: axes along which the mask is shared.
      rngs: where the layer's own random stream is forked from.
    """
    if options.dropout_rate == 0:
        return nnx.identity
    return nnx.Dropout(options.dropout_rate, broadcast_dims=broadcast_dims, rngs=rngs)


def linear(
    in_features: int, out_features: int, *, options: Options, rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a linear layer with a bias.

    Args:
      in_features: length of the input's last axis.
      out_features: length of the output's.
      options: the network's dtypes and initialisation.
      rngs: where the parameters are drawn from.
    """
    draw_weight, draw_bias = INITIALIZERS[options.init]
    return nnx.Linear(
        in_features,
        out_features,
        kernel_init=draw_weight,
        bias_init=functools.partial(draw_bias, fan_in=in_features),
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        rngs=rngs,
    )


class Head(nnx.Module):
    """The last block: global average pooling, then a linear layer."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        options: Options,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          in_channels: channels of the last residual block's output.
          num_classes: number of logits.
          options: the network's dtypes and initialisation.
          rngs: where the parameters are drawn from.
        """
        self.linear = linear(in_channels, num_classes, options=options, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `x`, [batch, height, width, channels], to logits, [batch, num_classes].

        The logits are float32 or wider, so that the loss is not computed in bfloat16.
        """
        logits = self.linear(x.mean(axis=(1, 2)))
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
