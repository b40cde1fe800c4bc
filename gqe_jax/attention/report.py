"""What a layer tells the training step beside its output."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


class Buffer(nnx.Variable):
    """State of a layer that a training step updates without a gradient (`AttentionConfig.updated_buffers`)."""


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """An auxiliary loss and named metrics, which the training step adds and logs whatever kind of layer they are from.

    Attributes:
      auxiliary_loss: float32 scalar, weighted already: a training step adds it to the loss as it is.
      metrics: name → float32 array, means over the real tokens of the whole batch.
    """

    auxiliary_loss: jax.Array = dataclasses.field(default_factory=_zero)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def reduced(self) -> "LayerReport":
        """Without whatever else a kind reports, such as arrays with one entry per token."""
        return LayerReport(auxiliary_loss=self.auxiliary_loss, metrics=self.metrics)
