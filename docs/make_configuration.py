"""Writes docs/configuration.md from the dataclasses of a run's configuration and the comments beside their fields."""

import ast
import dataclasses
import inspect
import io
import pathlib
import textwrap
import tokenize
import typing

from gqe_jax.attention import KINDS
from gqe_jax.attention.router import RouterConfig
from gqe_jax.config import (
    AttentionConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeScaling,
    RunConfig,
    TrainConfig,
)

FILE = pathlib.Path(__file__).with_name("configuration.md")
HEAD = """# Every field of a run's configuration

Made by `python docs/make_configuration.py` from the dataclasses; a test compares. `--config.PATH=VALUE` sets a field of
`gqe train` and `gqe plan`; a config file returns the same tree as a `ConfigDict` (`gqe_jax/configs/smoke.py` is the
shortest). "required" fields are set by every config file that comes along. Where a value cannot be used, the command
says which rule it breaks and what to set instead.
"""


def sections() -> list[tuple[str, str, type, frozenset[str]]]:
    """Lists (title, path of the fields, dataclass, fields that an earlier section has)."""
    shared = frozenset(field.name for field in dataclasses.fields(AttentionConfig)) - {"kind"}
    kinds = [(f"Attention of kind `{kind}`", "model.attention", config, shared) for kind, (config, _) in KINDS.items()]
    return [
        ("The run", "", RunConfig, frozenset()),
        ("Model", "model", ModelConfig, frozenset()),
        ("Attention, all kinds", "model.attention", AttentionConfig, frozenset({"kind"})),
        *kinds,
        ("Router of `gqe`", "model.attention.router", RouterConfig, frozenset()),
        ("Scaling of the rotary embedding", "model.attention.rope_scaling", RopeScaling, frozenset()),
        ("Data", "data", DataConfig, frozenset()),
        ("Optimizer", "optimizer", OptimizerConfig, frozenset()),
        ("Mesh", "mesh", MeshConfig, frozenset()),
        ("Training", "train", TrainConfig, frozenset()),
    ]


def meanings(config: type) -> dict[str, str]:
    """Returns field → the comment that stands behind it in the source."""
    found: dict[str, str] = {}
    for base in reversed([x for x in config.__mro__ if dataclasses.is_dataclass(x)]):
        source = textwrap.dedent(inspect.getsource(base))
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        (definition,) = ast.parse(source).body
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and node.end_lineno in comments:
                found[node.target.id] = comments[node.end_lineno]
    return found


def default(field: dataclasses.Field) -> str:
    """Says in Markdown what a field has where nothing sets it."""
    if field.default is dataclasses.MISSING:
        return "required"
    return "its own" if dataclasses.is_dataclass(field.default) else f"`{field.default!r}`"


def type_name(hint: object) -> str:
    """Says in Markdown what a field takes: a type, or the values of a closed list."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value!r}`" for value in typing.get_args(hint))
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return "a section below" if dataclasses.is_dataclass(hint) else hint.__name__
    return " or ".join(type_name(x) for x in typing.get_args(hint)).replace("NoneType", "None") or str(hint)


def text() -> str:
    """Returns the whole page.

    Raises:
      ValueError: a field has no comment.
    """
    parts = []
    for title, path, config, skipped in sections():
        hints, meaning = typing.get_type_hints(config), meanings(config)
        rows = []
        for field in dataclasses.fields(config):
            if field.name in skipped:
                continue
            if field.name not in meaning:
                raise ValueError(f"{config.__name__}.{field.name} has no comment behind it that says what it means")
            name = ".".join(filter(None, (path, field.name)))
            rows.append(f"| `{name}` | {type_name(hints[field.name])} | {default(field)} | {meaning[field.name]} |")
        table = ["| field | type or values | default | meaning |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {title}", "", *table, ""]))
    return "\n".join([HEAD, *parts])


if __name__ == "__main__":
    FILE.write_text(text())
