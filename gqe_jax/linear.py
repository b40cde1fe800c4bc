"""Defines the linear layer and the norm that all modules use."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gqe_jax.remat import PRODUCT


class Linear(nnx.Module):
    """Computes y = x · W + b over the last axes of x; W keeps axes of different meaning apart, such as [d, G, M, D].

    Args:
      in_features: sizes of the last axes of x, which are summed over.
      out_features: sizes of the axes that take their place.
      axes: logical axes of the kernel (`gqe_jax.parallel.rules`), those of in_features first.
      use_bias: whether there is a b.
      dtype: dtype of the computation; None: the wider of x's and the parameters'.
      param_dtype: dtype of `kernel` [*in_features, *out_features] and `bias` [*out_features].
      kernel_init: initializer, called with the kernel's shape flattened to two axes. b starts at 0.
      precision: precision of the matmul.
      exact: whether the kernel keeps its own dtype wherever it is gathered, cast or exported.
      rngs: draws the kernel, from the stream "params".
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axes: Sequence[str | None],
        use_bias: bool,
        dtype: jax.typing.DTypeLike | None,
        param_dtype: jax.typing.DTypeLike,
        kernel_init: nnx.Initializer,
        precision: jax.lax.PrecisionLike = None,
        exact: bool = False,
        rngs: nnx.Rngs,
    ):
        in_shape = (in_features,) if isinstance(in_features, int) else tuple(in_features)
        out_shape = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        self.num_in_axes = len(in_shape)
        self.dtype = dtype
        self.precision = precision
        kernel = kernel_init(rngs.params(), (math.prod(in_shape), math.prod(out_shape)), param_dtype)
        self.kernel = nnx.Param(kernel.reshape(in_shape + out_shape))
        self.bias = nnx.Param(jnp.zeros(out_shape, param_dtype)) if use_bias else None
        of_bias = tuple(None if axis == "embed" else axis for axis in axes[self.num_in_axes :])
        self.placement = (("kernel", tuple(axes)), ("bias", of_bias))
        self.exact = exact

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., *in_features] to y [..., *out_features]."""
        return self.add_bias(checkpoint_name(self.product(x), PRODUCT))

    def product(self, x: jax.Array) -> jax.Array:
        """Computes x · W without b. On a device that holds a part of the in_features it is one summand of the whole."""
        kernel = self.kernel[...]
        in_shape, out_shape = kernel.shape[: self.num_in_axes], kernel.shape[self.num_in_axes :]
        dtype = self.dtype or jnp.promote_types(x.dtype, kernel.dtype)
        tokens = x.shape[: x.ndim - self.num_in_axes]
        # Batch and sequence become one axis: kept apart, XLA's CPU backend transposes both operands of the kernel's
        # gradient in memory, and training takes almost twice as long.
        rows = x.reshape(-1, math.prod(in_shape)).astype(dtype)
        kernel = kernel.reshape(rows.shape[1], -1).astype(dtype)
        return jnp.dot(rows, kernel, precision=self.precision).reshape(*tokens, *out_shape)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """Returns y + b, or y where there is no b."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def make_norm(num_features: int, **options: Any) -> nnx.RMSNorm:
    """Makes an RMS norm whose scale every device of a mesh holds whole; `options` are `nnx.RMSNorm`'s."""
    norm = nnx.RMSNorm(num_features, **options)
    norm.placement = (("scale", (None,)),)
    return norm
