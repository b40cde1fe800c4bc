"""Registers the kinds of attention: `model.attention.kind` → its configuration and its layer."""

import dataclasses
import inspect
from typing import Any, NamedTuple

from gqe_jax.attention.asym_gqa import AsymGQAConfig, AsymGQAttention
from gqe_jax.attention.base import Attention
from gqe_jax.attention.gqa import GQAConfig, GQAttention
from gqe_jax.attention.gqe import GQEAttention, GQEConfig
from gqe_jax.attention.gqe_mla import GQEMLAConfig, GQEMLAttention
from gqe_jax.attention.key_driven import KeyDrivenAttention, KeyDrivenConfig
from gqe_jax.attention.mla import MLAConfig, MLAttention
from gqe_jax.config import AttentionConfig, ConfigError


class Kind(NamedTuple):
    """A kind of attention has a config class, which answers for it, and a layer class, which computes it."""

    config: type[AttentionConfig]
    layer: type[Attention]


def checked(kinds: dict[str, Kind]) -> dict[str, Kind]:
    """Returns `kinds`, after a check that each is complete and that its config and its layer belong together.

    Raises:
      TypeError: a kind leaves a member of `AttentionConfig` or of `Attention` open, or config and layer do not agree.
    """
    for name, (config, layer) in kinds.items():
        if inspect.isabstract(config):
            raise TypeError(
                f"kind {name!r}: {config.__name__} does not answer {', '.join(sorted(config.__abstractmethods__))}: "
                f"every kind states all of AttentionConfig's abstract members"
            )
        unstated = [name for name in ("_make", "_compute") if getattr(layer, name) is getattr(Attention, name)]
        if unstated:
            raise TypeError(f"kind {name!r}: {layer.__name__} does not state {', '.join(unstated)}: every layer does")
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        if defaults["kind"] != name or layer.Config is not config:
            raise TypeError(
                f"kind {name!r}: {config.__name__}.kind is {defaults['kind']!r} and {layer.__name__}.Config is "
                f"{layer.Config.__name__}: both have to be those of the kind"
            )
    return kinds


KINDS: dict[str, Kind] = checked(
    {
        "gqe": Kind(GQEConfig, GQEAttention),
        "gqa": Kind(GQAConfig, GQAttention),
        "asym_gqa": Kind(AsymGQAConfig, AsymGQAttention),
        "key_driven": Kind(KeyDrivenConfig, KeyDrivenAttention),
        "mla": Kind(MLAConfig, MLAttention),
        "gqe_mla": Kind(GQEMLAConfig, GQEMLAttention),
    }
)


def kind_named(name: Any) -> Kind:
    """Returns the kind called `name`.

    Raises:
      ConfigError: no kind has this name.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"model.attention.kind={name!r} is unknown: use one of {', '.join(map(repr, KINDS))}")
    return KINDS[name]


def make_attention(config: AttentionConfig, d_model: int, **options: Any) -> Attention:
    """Makes the layer that `config` describes; `options` are the constructor's other arguments (dtype, rngs, ...)."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return kind_named(fields.pop("kind")).layer(d_model, **fields, **options)
