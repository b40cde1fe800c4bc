"""Grouped Query Experts (GQE): mixture-of-experts on grouped-query attention, in JAX and Flax."""

from typing import TYPE_CHECKING

from gqe_jax.lazy import lazy_names

if TYPE_CHECKING:  # the same names as in `lazy_names` below
    from gqe_jax import convert
    from gqe_jax.attention import (
        AsymGQAConfig,
        AsymGQAttention,
        GQAConfig,
        GQAttention,
        GQEAttention,
        GQEConfig,
        KeyDrivenAttention,
        KeyDrivenConfig,
        KVCache,
        LatentCache,
        MLAConfig,
        MLAttention,
        RouterConfig,
        RouterStats,
        rotary_tables,
    )
    from gqe_jax.config import (
        ConfigError,
        MeshConfig,
        ModelConfig,
        RopeScaling,
        RunConfig,
    )
    from gqe_jax.kernels import EMPTY_LSE, BlockSizes, attend, merge_partials
    from gqe_jax.models.transformer import Transformer
    from gqe_jax.parallel.mesh import make_mesh
    from gqe_jax.parallel.zigzag import natural, zigzag
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gqe_jax.attention": (
                "AsymGQAConfig",
                "AsymGQAttention",
                "GQAConfig",
                "GQAttention",
                "GQEAttention",
                "GQEConfig",
                "KeyDrivenAttention",
                "KeyDrivenConfig",
                "KVCache",
                "LatentCache",
                "MLAConfig",
                "MLAttention",
                "RouterConfig",
                "RouterStats",
                "rotary_tables",
            ),
            "gqe_jax.config": (
                "ConfigError",
                "MeshConfig",
                "ModelConfig",
                "RopeScaling",
                "RunConfig",
            ),
            "gqe_jax.convert": ("convert",),
            "gqe_jax.kernels": ("EMPTY_LSE", "BlockSizes", "attend", "merge_partials"),
            "gqe_jax.models.transformer": ("Transformer",),
            "gqe_jax.parallel.mesh": ("make_mesh",),
            "gqe_jax.parallel.zigzag": ("natural", "zigzag"),
        },
    )

__version__ = "0.1.0"

__all__ = [
    # Layers for your own Flax model, and what they return
    "GQEAttention",
    "GQAttention",
    "AsymGQAttention",
    "KeyDrivenAttention",
    "MLAttention",
    "RouterStats",
    "KVCache",
    "LatentCache",
    # The attention call underneath
    "attend",
    "BlockSizes",
    "merge_partials",
    "EMPTY_LSE",
    "rotary_tables",
    # The language model
    "Transformer",
    # Many devices
    "make_mesh",
    "MeshConfig",
    "zigzag",
    "natural",
    # Configuration
    "ModelConfig",
    "GQEConfig",
    "GQAConfig",
    "AsymGQAConfig",
    "KeyDrivenConfig",
    "MLAConfig",
    "RouterConfig",
    "RopeScaling",
    "RunConfig",
    "ConfigError",
    # Weights to PyTorch's names and back
    "convert",
]
