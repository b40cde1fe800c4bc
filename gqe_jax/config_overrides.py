"""Sets fields of a ConfigDict from text: overrides (`--config.a.b=value`), and the argument of a config file."""

import ast
from collections.abc import Sequence
from typing import Any

import ml_collections

from gqe_jax.config import ConfigError, nearest


def parse_argument(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """Reads the argument of a config file, such as "steps=100,kind=gqa"; a name alone means True.

    Args:
      argument: the text behind the colon of `--config FILE:ARG`, or None.
      **defaults: the names that the file understands, with their values when not given.

    Raises:
      ConfigError: a name is unknown, a value has another type than its default, or an integer is below 1 though its
        default is positive, and so counts something.
    """
    result = ml_collections.ConfigDict(defaults)
    for assignment in filter(None, (argument or "").split(",")):
        override(result, assignment if "=" in assignment else f"{assignment}=True")
    for name, default in defaults.items():
        value: Any = result[name]
        if type(default) is int and default > 0 and value < 1:
            raise ConfigError(f"{name}={value}, behind the colon of --config, must be at least 1: raise {name}")
    return result


def override(config: ml_collections.ConfigDict, assignment: str) -> None:
    """Sets one field of a configuration, in place: "a.b=value", as on the command line behind `--config.`.

    Raises:
      ConfigError: there is no such key, or the value has the wrong type.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--config.{key} has no value: write --config.{key}=VALUE")
    *groups, leaf = key.split(".")
    for depth, group in enumerate(groups):
        config = _known(config, group, groups[:depth])
        if not isinstance(config, ml_collections.ConfigDict):
            raise ConfigError(f"config key {'.'.join(groups[: depth + 1])!r} is no group of keys: drop what follows it")
    current = _known(config, leaf, groups)
    kind = config.get_type(leaf)
    if isinstance(current, ml_collections.ConfigDict):
        raise ConfigError(f"config key {key!r} is a group: set one of {', '.join(current)}")
    try:
        plain = kind is str and text != "None" and text[:1] not in ("'", '"')  # a string may look like a number
        value = text if plain else _literal(text)
        config[leaf] = _sequence(value, text) if kind is tuple and value is not None else value
    except TypeError:
        what = {float: "a finite number", tuple: "a sequence"}.get(kind, f"of type {kind.__name__}")
        raise ConfigError(f"{key}={text!r} must be {what}: correct the value") from None


def _known(config: ml_collections.ConfigDict, key: str, groups: Sequence[str]) -> Any:
    if key not in config:
        raise ConfigError(f"unknown config key {'.'.join([*groups, key])!r}: {nearest(key, config)}")
    return config[key]


def _literal(text: str) -> Any:
    text = {"true": "True", "false": "False", "none": "None"}.get(text, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _sequence(value: Any, text: str) -> tuple[Any, ...]:
    """Returns the sequence that a text means: "1,2", "(1, 2)" and "[1, 2]" give two numbers, "1" one, "a,b" words."""
    if isinstance(value, tuple | list):
        return tuple(value)
    if value != text:  # a single literal, such as 1
        return (value,)
    return tuple(_literal(part.strip()) for part in text.split(",")) if text else ()
