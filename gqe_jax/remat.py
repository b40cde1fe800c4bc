"""Names the intermediate results that a layer may keep for its backward pass, and the policies that choose among them.

Code that computes one of these results marks it with `jax.ad_checkpoint.checkpoint_name`. The backward pass computes
again what the policy does not keep (rematerialisation, "remat").
"""

import jax

ATTENTION_OUT = "attention_out"
"""Output of every call of `attend`."""
ATTENTION_LSE = "attention_lse"
"""Log-sum-exp of the scores of every call of `attend`, which its gradient needs."""
PRODUCT = "product"
"""Products of inputs with weights."""
GATHERED = "gathered"
"""Parameters gathered over devices: to keep them would be to keep one more copy of the model."""

POLICIES = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT, ATTENTION_LSE),
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION_OUT, ATTENTION_LSE),
}
"""Policy (`model.remat`) → what a layer keeps beside its input: "none" everything but gathered parameters; "full"
nothing; "attention" the results of attention; "dots" these and the products with weights."""
