"""Defines what an attention layer gives the training step beside its output."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


class Buffer(nnx.Variable):
    """A buffer is state of a layer that a training step updates without a gradient.

    `AttentionConfig.updated_buffers` gives its new values.
    """


def _zero() -> jax.Array:
    return jnp.zeros((), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """Holds an auxiliary loss and named metrics, which the training step adds and logs whatever the kind of layer.

    Attributes:
      auxiliary_loss: float32 scalar, already weighted: a training step adds it to the loss as it is.
      metrics: name → float32 array; means over the real tokens (not padding) of the whole batch.
    """

    auxiliary_loss: jax.Array = dataclasses.field(default_factory=_zero)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def reduced(self) -> "LayerReport":
        """Returns the loss and the metrics alone, without a kind's other fields, such as arrays per token."""
        return LayerReport(auxiliary_loss=self.auxiliary_loss, metrics=self.metrics)
