"""One kind of attention into another; and parameters to PyTorch's names and back, without torch."""

from typing import TYPE_CHECKING

from gqe_jax.lazy import lazy_names

if TYPE_CHECKING:  # the same names as in `lazy_names` below
    from gqe_jax.convert.asym import asym_gqa
    from gqe_jax.convert.driven import key_driven
    from gqe_jax.convert.latent import mla
    from gqe_jax.convert.layers import Converted
    from gqe_jax.convert.pool import gqa
    from gqe_jax.convert.upcycle import gqe
    from gqe_jax.pytorch.layer import layer_from_torch, layer_to_torch
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gqe_jax.convert.asym": ("asym_gqa",),
            "gqe_jax.convert.driven": ("key_driven",),
            "gqe_jax.convert.latent": ("mla",),
            "gqe_jax.convert.layers": ("Converted",),
            "gqe_jax.convert.pool": ("gqa",),
            "gqe_jax.convert.upcycle": ("gqe",),
            "gqe_jax.pytorch.layer": ("layer_from_torch", "layer_to_torch"),
        },
    )

__all__ = ["Converted", "asym_gqa", "gqa", "gqe", "key_driven", "layer_from_torch", "layer_to_torch", "mla"]
