"""What a layer keeps for its backward pass: the names of intermediate results, and the policies that choose among them.

Whoever computes one of these results marks it with `jax.ad_checkpoint.checkpoint_name`; what no policy can name is
computed again.
"""

import jax

ATTENTION_OUT = "attention_out"
"""Output of every call of `attend`."""
ATTENTION_LSE = "attention_lse"
"""Log-sum-exp of the scores of every call of `attend`, which its gradient needs."""
PRODUCT = "product"
"""Products with weights."""
GATHERED = "gathered"
"""Parameters gathered over devices: what is kept of them is one more copy of the model."""

POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT, ATTENTION_LSE),
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION_OUT, ATTENTION_LSE),
}
"""Policy (`model.remat`) → what a layer keeps: everything; its input alone; the results of attention; those, and the
products with weights."""
