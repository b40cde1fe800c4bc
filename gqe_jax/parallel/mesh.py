"""The device mesh: its axes, and where a batch and the training state live on it."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gqe_jax.config import ConfigError

AXES = ("data", "fsdp", "expert", "context")


def make_mesh() -> jax.sharding.Mesh:
    """All devices along `data`: each holds the whole model and takes its share of the batch.

    Every axis always exists, of size 1 where unused.
    """
    return jax.make_mesh((jax.device_count(), 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def check_batch(mesh: jax.sharding.Mesh, batch_size: int) -> None:
    """Raises ConfigError unless `batch_size` rows divide evenly over the devices."""
    if batch_size % mesh.shape["data"]:
        raise ConfigError(
            f"data.batch_size={batch_size} (divided by train.accumulate where that is set) is not a multiple of the "
            f"{mesh.shape['data']} devices that share a batch: change data.batch_size"
        )


def shard_batch(mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows [b, S] of each array → the global arrays [B, S], their rows spread over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
