"""The latent rival of gqe_250m: multi-head latent attention, 224 + 32 cached numbers for each token and layer.

  gqe train --config mla_250m --run runs/mla --config.data.path=DIR     prepared rows of 2048 tokens
  gqe train --config mla_250m:latent=448,rope_dim=64 --run ...          a larger latent, more of the rotary embedding
  gqe train --config mla_250m:laptop --run runs/mla_laptop              minutes on a CPU, no data needed
"""

from gqe_jax.configs._paper import paper_config


def get_config(argument=None):
    """Arguments: laptop, head_dim (64 or 128), latent and rope_dim (224 and 32; laptop: a quarter of them)."""

    def attention(arguments, heads, groups):
        shrink = 4 if arguments.laptop else 1
        sizes = {"latent_dim": arguments.latent // shrink, "rope_dim": arguments.rope_dim // shrink}
        return {"kind": "mla", "num_query_heads": heads, "num_kv_heads": heads} | sizes

    return paper_config("mla_250m", argument, attention, latent=224, rope_dim=32)
