"""GQE at the paper's main setting: 16 query experts in 8 groups, one of two selected, so that 9 heads attend.

  gqe train --config gqe_250m --run runs/gqe --config.data.path=DIR     prepared rows of 2048 tokens
  gqe train --config gqe_250m:head_dim=128 --run ...                    for TPUs: half as many heads, twice as wide
  gqe train --config gqe_250m:laptop --run runs/gqe_laptop              minutes on a CPU, no data needed

Controls (the router learns nothing) and the ablations of the paper's Table 2:

  gqe_250m:router=fixed              always expert 0: the same layer as a static one of 9 heads
  gqe_250m:router=random             a uniform draw per token
  gqe_250m:variant=hard_concat       the selected slots alone, without renormalised slot and shared head
  gqe_250m:variant=weighted_concat   the selected slots alone, each scaled by its probability
"""

from gqe_jax.configs._paper import paper_config


def get_config(argument=None):
    """Arguments: laptop, head_dim (64 or 128), router (learned, fixed, random), variant."""

    def attention(arguments, heads, groups):
        router = {"kind": arguments.router}
        return {"num_query_experts": heads, "top_k": 1, "variant": arguments.variant, "router": router}

    return paper_config("gqe_250m", argument, attention, router="learned", variant="gqe")
