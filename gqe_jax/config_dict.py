"""Converts a ConfigDict or a plain dictionary to a run's dataclasses, and back.

A config file (`configs/*.py`) defines `get_config(arg=None)` and returns an `ml_collections.ConfigDict` that starts
from `defaults()`. `build` turns it into a `RunConfig`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections.config_dict import placeholder

from gqe_jax.attention.kinds import kind_named
from gqe_jax.config import AttentionConfig, ConfigError, RunConfig, nearest

DEFAULT_ATTENTION = {"kind": "gqe", "num_query_experts": 16, "num_kv_heads": 8}
"""The paper's main setting, which a configuration without `model.attention` gets."""


def defaults(**attention: Any) -> ml_collections.ConfigDict:
    """Returns every field of `RunConfig` at its default, as a ConfigDict to start a config file from.

    Args:
      **attention: fields of `model.attention`, its `kind` first of all ("gqe" unless given).
    """
    config = _default_fields(RunConfig)
    model: Any = config.model  # of a ConfigDict's values no type is known
    model.attention = _to_config_dict(_build(AttentionConfig, {"kind": "gqe"} | attention, "model.attention."))
    return config


def _default_fields(cls: type) -> ml_collections.ConfigDict:
    """Returns the defaults of a config class, groups of fields included; fields without a default are left out."""
    hints = typing.get_type_hints(cls)
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]) and field.default is dataclasses.MISSING:
            result[field.name] = _default_fields(hints[field.name])
        elif field.default is not dataclasses.MISSING:
            _set(result, field.name, field.default, hints[field.name])
    return result


def _to_config_dict(config: Any) -> ml_collections.ConfigDict:
    hints = typing.get_type_hints(type(config))
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        _set(result, field.name, getattr(config, field.name), hints[field.name])
    return result


def _set(result: ml_collections.ConfigDict, name: str, value: Any, hint: Any) -> None:
    # A field that is None gets a placeholder, so that an override from the command line is read as the field's type.
    if dataclasses.is_dataclass(value):
        result[name] = _to_config_dict(value)
    elif value is None:
        kind = _without_none(hint)
        result[name] = placeholder(typing.get_origin(kind) or kind)
    else:
        result[name] = value


def _without_none(hint: Any) -> Any:
    (kind,) = (option for option in typing.get_args(hint) if option is not type(None))
    return kind


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config dataclass to nested plain dictionaries (JSON-serialisable)."""
    return dataclasses.asdict(config)


def build(mapping: Mapping[str, Any] | ml_collections.ConfigDict) -> RunConfig:
    """Checks a ConfigDict (or the dictionary saved in a checkpoint) and makes the `RunConfig` from it.

    Raises:
      ConfigError: a key is unknown (the message has the nearest known one), a type is wrong, or a rule is broken.
    """
    if not isinstance(mapping, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"the configuration is a {type(mapping).__name__}, but must be a group of keys")
    values = dict(mapping)
    model = values.get("model", {})
    if isinstance(model, Mapping | ml_collections.ConfigDict):
        values["model"] = {"attention": DEFAULT_ATTENTION} | dict(model)
    return _build(RunConfig, values, "")


def _build(cls: type, mapping: Mapping[str, Any] | ml_collections.ConfigDict, path: str) -> Any:
    if cls is AttentionConfig:
        cls = kind_named(mapping.get("kind")).config
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls)}
    for key in mapping:
        if key not in known:
            kind = f" for attention.kind={mapping['kind']!r}" if issubclass(cls, AttentionConfig) else ""
            raise ConfigError(f"unknown config key {path + key!r}{kind}: {nearest(key, known)}")
    values = {key: _convert(hints[key], value, path + key) for key, value in mapping.items()}
    missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"config key {path + missing[0]!r} is missing: set it")
    try:
        return cls(**values)
    except ConfigError as error:
        if not path or str(error).startswith("in config."):
            raise
        raise ConfigError(f"in config.{path[:-1]}: {error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    optional = isinstance(hint, types.UnionType)
    if optional and value is None:
        return None
    kind = _without_none(hint) if optional else hint
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            raise ConfigError(f"{path}={value!r} must be a group of keys")
        return _build(kind, value, path + ".")
    if typing.get_origin(kind) is Literal:
        return value  # the dataclass checks it
    if typing.get_origin(kind) is tuple:  # tuple[X, ...]; JSON has lists for it
        element, _ = typing.get_args(kind)
        if not isinstance(value, tuple | list):
            raise ConfigError(
                f"{path}={value!r} has type {type(value).__name__}, but must be a sequence of {element.__name__}"
                f"{' or None' if optional else ''}: write it with commas, such as {_example(element)}"
            )
        return tuple(_convert(element, entry, f"{path}[{index}]") for index, entry in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{path}={value!r} has type {type(value).__name__}, but must be {kind.__name__}"
            f"{' or None' if optional else ''}: correct the value"
        )
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path}={value} must be a finite number: correct the value")
    return value


def _example(element: type) -> str:
    return {int: "1,2", float: "0.5,1.0", str: "a,b", bool: "True,False"}[element]
