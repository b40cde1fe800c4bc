"""The static controls of gqe_250m: sparse-query attention (arXiv 2510.01817), with fewer query heads than d / D.

  gqe train --config sqa_250m --run runs/sqa --config.data.path=DIR     prepared rows of 2048 tokens
  gqe train --config sqa_250m:form=xsqa --run ...                       a quarter of the query heads
  gqe train --config sqa_250m:head_dim=128 --run ...                    for TPUs: half as many heads, twice as wide
  gqe train --config sqa_250m:laptop --run runs/sqa_laptop              minutes on a CPU, no data needed

The forms, by query heads and KV heads of the 16 that d / D = 1024 / 64 gives. `ssqa` has the 8 query heads that GQE's
routed slots cost, each with a KV head of its own:

  sqa 8, 4      ssqa 8, 8      xsqa 4, 4      xsmqa 4, 1
"""

from gqe_jax.config import ConfigError, nearest
from gqe_jax.configs._paper import paper_config

# Form → the divisor of d / D that gives the query heads, and of these the one that gives the KV heads; None: one head.
FORMS = {"sqa": (2, 2), "ssqa": (2, 1), "xsqa": (4, 1), "xsmqa": (4, None)}


def get_config(argument=None):
    """Arguments: form (sqa, ssqa, xsqa or xsmqa), laptop, head_dim (64 or 128)."""

    def attention(arguments, heads, groups):
        if arguments.form not in FORMS:
            raise ConfigError(f"form={arguments.form}, behind the colon of --config: {nearest(arguments.form, FORMS)}")
        fewer, shared = FORMS[arguments.form]
        query_heads = heads // fewer
        kv_heads = 1 if shared is None else query_heads // shared
        return {"kind": "gqa", "num_query_heads": query_heads, "num_kv_heads": kv_heads}

    return paper_config("sqa_250m", argument, attention, form="ssqa")
