"""A dense model with key-driven attention: the same function, until training allocates; or allocated once, for good."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gqe_jax.attention import KeyDrivenConfig
from gqe_jax.attention.key_driven import Allocation, allocate
from gqe_jax.config import ModelConfig
from gqe_jax.convert.align import pair_moments
from gqe_jax.convert.groups import unturned
from gqe_jax.convert.layers import Batch, Calibration, Conversion, Converted, Params, convert_layers
from gqe_jax.convert.pool import dense_source


def key_driven(
    params: Mapping[str, Any],
    config: ModelConfig,
    batches: Sequence[Batch],
    *,
    allocation: Allocation = "kdgqa",
    refit: bool = True,
) -> Converted:
    """Converts a dense model to key-driven attention.

    Args:
      params: path → array, the model's (`Converted.params`).
      config: of the model.
      batches: calibration rows.
      allocation: see `to_key_driven`.
      refit: whether each layer's output projection is fitted to what the source's layer gave.

    Raises:
      ConfigError: as `to_key_driven`.
    """
    return convert_layers(to_key_driven(config, allocation=allocation), params, config, batches, refit=refit)


def to_key_driven(model: ModelConfig, *, allocation: Allocation = "kdgqa", seed: int = 0) -> Conversion:
    """Returns the conversion of a dense model to key-driven attention.

    Args:
      model: of the source.
      allocation: `KeyDrivenConfig.allocation`. "static" gives each KV head query heads by the norm of its keys on the
        calibration rows, all of them together; the others start as the dense function.
      seed: unused, for nothing here is random.

    Raises:
      ConfigError: a source that is not dense, or an unknown allocation.
    """
    source = dense_source(model, "key_driven")
    shared: dict[str, Any] = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    del shared["kind"]
    config = KeyDrivenConfig(allocation=allocation, **shared)
    groups, heads = config.num_kv_heads, config.num_query_heads

    def layer(params: Params, calibration: Calibration, index: int) -> tuple[Params, str]:
        norms, counts = np.zeros(groups), np.full(groups, heads // groups)
        if allocation == "static":
            pairs = pair_moments(calibration.moments, params["k_proj.kernel"], params.get("k_proj.bias"))
            norms = np.sqrt(np.diagonal(unturned(pairs)))
            counts = np.asarray(allocate(jnp.asarray(norms, jnp.float32), heads, config.allocation_floor))
        said = f"query heads {' '.join(map(str, counts))}"
        return params | {"heads": counts, "key_norm": norms, "steps": np.zeros(1)}, said

    fixed = allocation == "static"
    return Conversion(config, layer, lossless=not fixed, moments=fixed)
