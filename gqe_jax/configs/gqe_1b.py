"""A model of 1.2B parameters, Grouped Query Experts: 16 query experts in 8 groups, one of two selected: 9 heads attend.

  gqe plan --config gqe_1b --topology v5e:16x16           does it fit, and how fast: no TPU needed
  gqe train --config gqe_1b --run gs://BUCKET/gqe_1b --config.data.path=DIR      rows of 4096 tokens, 100B in all
  gqe train --config gqe_1b:kind=gqa --run ...            its dense twin: all 16 heads attend
  gqe train --config gqe_1b:laptop --run runs/gqe_1b      minutes on a CPU, no data needed

Planned for v5e:16x16: docs/scaling.md has the plan.
"""

from gqe_jax.configs._llama import llama_config


def get_config(argument=None):
    """Arguments: laptop, kind (gqe or gqa), context (tokens of a row; a step takes 2M tokens at any)."""
    config, full_size = llama_config(
        "gqe_1b", argument, heads=16, top_k=1, context=4096, tokens_per_step=512 * 4096, tokens=100e9
    )
    if full_size:
        config.model.d_model = 2048
        config.model.num_layers = 16
        config.model.d_ff = 8192
        config.model.remat = "dots"
        config.optimizer.learning_rate = 4e-4
        config.optimizer.min_learning_rate = 4e-6
    return config
