"""The static control of gqe_250m: sparse-query attention, with the 8 query heads that GQE's routed slots cost.

  gqe train --config sqa_250m --run runs/sqa --config.data.path=DIR     prepared rows of 2048 tokens
  gqe train --config sqa_250m:head_dim=128 --run ...                    for TPUs: half as many heads, twice as wide
  gqe train --config sqa_250m:laptop --run runs/sqa_laptop              minutes on a CPU, no data needed
"""

from gqe_jax.configs._paper import paper_config


def get_config(argument=None):
    """Arguments: laptop, head_dim (64 or 128)."""

    def attention(arguments, heads, groups):
        return {"kind": "gqa", "num_query_heads": groups}

    return paper_config("sqa_250m", argument, attention)
