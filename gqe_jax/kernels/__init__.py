"""This folder holds the attention call `attend` (one signature, several implementations) and all that it needs."""

from gqe_jax.kernels.attend import IMPLEMENTATIONS, attend, mean_head
from gqe_jax.kernels.choose import Call, Choice, choose, target_platform
from gqe_jax.kernels.mask import Mask, make_mask, visible
from gqe_jax.kernels.partials import EMPTY_LSE, merge_partials
from gqe_jax.kernels.queries import prepare_queries, rms_norm, rotate, select_experts
from gqe_jax.kernels.tpu.blocks import BlockSizes

__all__ = [
    "EMPTY_LSE",
    "IMPLEMENTATIONS",
    "BlockSizes",
    "Call",
    "Choice",
    "Mask",
    "attend",
    "choose",
    "make_mask",
    "mean_head",
    "merge_partials",
    "prepare_queries",
    "rms_norm",
    "rotate",
    "select_experts",
    "target_platform",
    "visible",
]
