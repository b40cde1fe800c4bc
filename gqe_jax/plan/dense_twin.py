"""The dense model that `gqe plan --compare gqa` sets beside a configuration."""

import dataclasses

from gqe_jax.config import ConfigError, RunConfig


def dense_twin(config: RunConfig) -> RunConfig:
    """Returns the same run with all query heads attending.

    Raises:
      ConfigError: it is dense already.
    """
    dense = config.model.attention.dense_twin()
    if dense is None:
        kind = config.model.attention.kind
        raise ConfigError(f"--compare=gqa: {config.name} is dense itself (attention.kind={kind!r}): drop it")
    model = dataclasses.replace(config.model, attention=dense)
    return dataclasses.replace(config, name=f"{config.name}, dense", model=model)
