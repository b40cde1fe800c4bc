"""Loads config files by path or by name."""

import contextlib
import importlib.util
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import ml_collections

from gqe_jax.config import ConfigError, RunConfig, nearest
from gqe_jax.config_dict import build
from gqe_jax.config_overrides import override
from gqe_jax.configs import shipped_configs


def load_config(spec: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads and checks the configuration of `FILE[:arg]`, with overrides applied.

    Args:
      spec: path of a Python file that defines `get_config(arg=None)`, or the name of a config that comes with gqe_jax
        ("smoke"); behind a colon the argument that get_config is called with.
      overrides: "a.b=value" each. Values are read as Python literals; None, true and false as usual, sequences with
        commas ("1,2").

    Raises:
      ConfigError: there is no such file or key, a value has the wrong type, or a rule is broken.
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
        override(config, assignment)
    return build(config)


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
    """Turns whatever a config file raises into a ConfigError with its line, as the file is the user's input."""
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
