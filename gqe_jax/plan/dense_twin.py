"""The dense model that `gqe plan --compare gqa` sets beside a configuration."""

import dataclasses

from gqe_jax.config import AttentionConfig, ConfigError, GQAConfig, GQEConfig, RunConfig


def dense_twin(config: RunConfig) -> RunConfig:
    """The same run with all query heads attending.

    Raises:
      ConfigError: it is dense already.
    """
    attention = config.model.attention
    if not isinstance(attention, GQEConfig):
        raise ConfigError(f"--compare=gqa: {config.name} is dense itself (attention.kind={attention.kind!r}): drop it")
    shared = {field.name: getattr(attention, field.name) for field in dataclasses.fields(AttentionConfig)}
    dense = GQAConfig(**shared | {"kind": "gqa", "num_query_heads": attention.num_query_experts})
    model = dataclasses.replace(config.model, attention=dense)
    return dataclasses.replace(config, name=f"{config.name}, dense", model=model)
