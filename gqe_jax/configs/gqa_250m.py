"""The dense baseline of gqe_250m: grouped-query attention, all 16 query heads in 8 groups attend.

  gqe train --config gqa_250m --run runs/gqa --config.data.path=DIR     prepared rows of 2048 tokens
  gqe train --config gqa_250m:head_dim=128 --run ...                    for TPUs: half as many heads, twice as wide
  gqe train --config gqa_250m:laptop --run runs/gqa_laptop              minutes on a CPU, no data needed
  gqe train --config gqa_250m:kind=key_driven --run ... --config.model.attention.allocation=dgqa_ema
"""

from gqe_jax.configs._paper import paper_config


def get_config(argument=None):
    """Arguments: laptop, head_dim (64 or 128), kind (gqa or key_driven)."""

    def attention(arguments, heads, groups):
        return {"kind": arguments.kind, "num_query_heads": heads}

    return paper_config("gqa_250m", argument, attention, kind="gqa")
