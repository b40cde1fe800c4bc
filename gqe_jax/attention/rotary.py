"""Makes the tables of rotary position embeddings (RoPE, Su et al. 2021), stretched to longer contexts if asked."""

import math

import jax
import jax.numpy as jnp

from gqe_jax.config import RopeScaling


def rotary_tables(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling = RopeScaling()
) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin of position · frequency, for the rotate-half convention (dimension i turns with i + D/2).

    The kinds of scaling are those of the published models: "linear" (Chen et al. 2023), "dynamic" (NTK-aware, stretched
    with the row's last position in the call), "llama3" (Llama 3.1), "yarn" (Peng et al. 2023; cos and sin are
    multiplied by its attention factor). Beyond the original context "dynamic" turns new keys by other frequencies than
    the cached ones, here as in the published models: in this one case decoding differs from one full pass.

    Args:
      positions: int32 [B or 1, S], in tokens.
      head_dim: D, even.
      theta: base of the frequencies, theta^(-2i/D).
      scaling: how to stretch them.

    Returns:
      (cos, sin), each float32 [B or 1, S, D/2].
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = theta**-exponent
    amplitude = 1.0
    if scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling.kind == "dynamic":
        longest = jnp.max(positions, axis=-1, keepdims=True)[..., None]  # of each row: no row depends on another
        length = jnp.maximum(longest + 1, scaling.original_context)
        stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
        frequency = (theta * stretch ** (head_dim / (head_dim - 2))) ** -exponent
    elif scaling.kind == "llama3":
        rotations = scaling.original_context * frequency / (2 * math.pi)  # over the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((rotations - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    elif scaling.kind == "yarn":
        keep = 1.0 - _yarn_ramp(head_dim, theta, scaling)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
        amplitude = scaling.attention_factor
        if amplitude is None:
            amplitude = 0.1 * math.log(scaling.factor) + 1.0
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """Returns [D/2] weights: 0 where a pair turns more than beta_fast times in the original context, 1 below beta_slow.

    Between the two they rise linearly with the index of the pair.
    """

    def dimension(rotations: float) -> float:
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    return jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
