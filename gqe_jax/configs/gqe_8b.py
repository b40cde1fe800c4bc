"""Llama-3-8B's shape with Grouped Query Experts: 32 query experts in 8 groups, two of four selected: 17 heads attend.

  gqe plan --config gqe_8b --topology v5p:4x4x4           does it fit, and how fast: no TPU needed
  gqe plan --config gqe_8b --topology v6e:16x16
  gqe train --config gqe_8b --run gs://BUCKET/gqe_8b --config.data.path=DIR      rows of 8192 tokens, 160B in all
  gqe train --config gqe_8b:kind=gqa --run ...            its dense twin, Llama 3's own shape: all 32 heads attend
  gqe train --config gqe_8b:context=131072 --run ... --config.mesh.context=4        for v5p:4x4x4
  gqe train --config gqe_8b:laptop --run runs/gqe_8b      minutes on a CPU, no data needed

Planned for v5p:4x4x4 and v6e:16x16, with context=131072 and context=1048576 too: docs/scaling.md has the plans.
"""

from gqe_jax.configs._llama import llama_config


def get_config(argument=None):
    """Arguments: laptop, kind (gqe or gqa), context (tokens of a row; a step takes 4M tokens at any)."""
    config, full_size = llama_config(
        "gqe_8b", argument, heads=32, top_k=2, context=8192, tokens_per_step=512 * 8192, tokens=160e9
    )
    if full_size:
        config.model.d_model = 4096
        config.model.num_layers = 32
        config.model.d_ff = 14_336
        config.model.tie_embeddings = False
        config.optimizer.learning_rate = 3e-4
        config.optimizer.min_learning_rate = 3e-6
    return config
