"""Config files by path or by name, and overrides from the command line (`--config.a.b=value`)."""

import ast
import contextlib
import importlib.util
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from gqe_jax.config import ConfigError, RunConfig, nearest
from gqe_jax.config_dict import build
from gqe_jax.configs import shipped_configs


def load_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked configuration of `FILE[:arg]` with overrides applied.

    Args:
      spec: path of a Python file that defines `get_config(arg=None)`, or the name of a config that comes with gqe_jax
        ("smoke"); behind a colon the argument that get_config is called with.
      overrides: "a.b=value" each. Values are read as Python literals; None, true and false as usual, sequences with
        commas ("1,2").

    Raises:
      ConfigError: no such file, no such key, a value of the wrong type, or a rule broken.
    """
    name, _, argument = spec.partition(":")
    path = _find(name)
    with _errors_located(path):
        config = _load_module(path).get_config(argument or None)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"get_config of {path} returned {type(config).__name__}: start from gqe_jax.config_dict.defaults(), and "
            f"return the ConfigDict"
        )
    for assignment in overrides:
        _override(config, assignment)
    return build(config)


def parse_argument(argument: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """What a config file is called with: "steps=100,kind=gqa"; a name alone means True.

    Args:
      argument: the text behind the colon of `--config FILE:ARG`, or None.
      **defaults: the names that the file understands, with their values when not given.

    Raises:
      ConfigError: another name, a value of another type than the default's, or an integer below 1 where the default is
        a positive one: they count something.
    """
    result = ml_collections.ConfigDict(defaults)
    for assignment in filter(None, (argument or "").split(",")):
        _override(result, assignment if "=" in assignment else f"{assignment}=True")
    for name, default in defaults.items():
        value: Any = result[name]
        if type(default) is int and default > 0 and value < 1:
            raise ConfigError(f"{name}={value}, behind the colon of --config, must be at least 1: raise {name}")
    return result


def _find(name: str) -> Path:
    shipped = shipped_configs()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(
            f"--config={name}: no such file, nor a config that comes with gqe_jax; {nearest(name, shipped)}"
        )
    return path


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config={path} is no Python file: name a .py file that defines get_config(arg=None)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"--config={path} defines no get_config(arg=None): add it, returning a ConfigDict")
    return module


@contextlib.contextmanager
def _errors_located(path: Path) -> Iterator[None]:
    """Turns whatever a config file raises into a ConfigError with the line, for it is the user's input."""
    try:
        yield
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"--config={path}, line {error.lineno}: {error.msg}: correct the file") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        message = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(f"--config={path}{where}: {type(error).__name__}: {message}: correct the file") from error


def _override(config: ml_collections.ConfigDict, assignment: str) -> None:
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
    """The sequence that a text means: "1,2" and "(1, 2)" and "[1, 2]" are two numbers, "1" is one, "a,b" two words."""
    if isinstance(value, tuple | list):
        return tuple(value)
    if value != text:  # a single literal, such as 1
        return (value,)
    return tuple(_literal(part.strip()) for part in text.split(",")) if text else ()
