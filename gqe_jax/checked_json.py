"""Readers of JSON that comes from outside: nothing in it is believed before it is checked.

Each refusal names the file, the field, the value and the rule, and comes before any work is done for the value.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gqe_jax.config import ConfigError

LONGEST_JSON = 10**8  # bytes; a tokenizer.json has some 10 MB
LARGEST = 2**31 - 1  # of a size
LARGEST_COUNT = 2**63 - 1  # of bytes, rows or tokens
COPY_AGAIN = "copy or download it again"


def parse_json(content: bytes, origin: object, remedy: str = COPY_AGAIN) -> Any:
    """Returns the value of JSON text; ConfigError where there is none, or one nested too deeply to be real."""
    try:
        value = json.loads(content)
        if b"\\u" in content:  # which may spell half a character, that no file can hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is no JSON ({error}): {remedy}") from error


def read_object(path: Path, remedy: str = COPY_AGAIN) -> dict[str, Any]:
    """Returns the JSON object in a file, on disk or (`etils.epath`) in a bucket.

    Raises:
      ConfigError: no such file, a file that is too long to be one of these, no JSON, or JSON that is no object.
    """
    with unread_named(path, remedy):
        if not path.is_file():
            raise ConfigError(f"{path} is missing or no plain file: {remedy}")
        with path.open("rb") as file:
            content = file.read(LONGEST_JSON + 1)
    if len(content) > LONGEST_JSON:
        raise ConfigError(f"{path} is longer than {LONGEST_JSON:,} bytes, which no such file is: {remedy}")
    value = parse_json(content, path, remedy)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object: {remedy}")
    return value


@contextlib.contextmanager
def unread_named(path: Path, remedy: str) -> Iterator[None]:
    """Turns the operating system's refusal to read a file into a ConfigError that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): {remedy}") from error


def read_records(path: Path, rules: Mapping[str, Rule], remedy: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file of JSON lines, each with just the fields of `rules`.

    Raises:
      ConfigError: no such file, or a line that is no such object; it is named by its number.
    """
    with unread_named(path, remedy):
        if not path.is_file():
            raise ConfigError(f"{path} is missing or no plain file: {remedy}")
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                origin = f"{path}, line {number},"
                yield check_record(parse_json(line, origin, remedy), rules, origin, remedy)


Rule = tuple[Callable[[Any], bool], str]
"""What a value must fulfil, and the words for it."""
FLAG: Rule = (lambda v: type(v) is bool, "true or false")
TEXT: Rule = (lambda v: type(v) is str, "a text")
OBJECT: Rule = (lambda v: type(v) is dict, "an object")
OBJECTS: Rule = (lambda v: type(v) is list and all(type(item) is dict for item in v), "a list of objects")
TEXTS: Rule = (lambda v: type(v) is list and all(type(item) is str for item in v), "a list of texts")


def is_whole(least: int, most: int = LARGEST) -> Rule:
    """Returns the rule of a whole number from `least` to `most`."""
    return lambda v: type(v) is int and least <= v <= most, f"a whole number from {least} to {most}"


COUNT = is_whole(0, LARGEST_COUNT)


def is_number(least: float, *, above: bool = False) -> Rule:
    """Returns the rule of a finite number that is at least, or above, `least`."""

    def fits(value: Any) -> bool:
        if type(value) not in (int, float) or abs(value) > 1e30 or not math.isfinite(value):
            return False
        return value > least if above else value >= least

    return fits, f"a finite number {'above' if above else 'of at least'} {least}"


def is_one_of(*choices: str) -> Rule:
    """Returns the rule of one of some texts."""
    return lambda v: type(v) is str and v in choices, f"one of {', '.join(choices)}"


def check_fields(
    values: Mapping[str, Any],
    rules: Mapping[str, Rule],
    origin: object,
    remedy: str = "copy it again from where the folder came from",
) -> None:
    """Raises ConfigError that names every field whose value breaks its rule; null is as good as absent."""
    problems = [
        f"{name}={shown(values[name])} must be {rule}"
        for name, (fits, rule) in rules.items()
        if values.get(name) is not None and not fits(values[name])
    ]
    if problems:
        raise ConfigError(f"{origin}: {'; '.join(problems)}: {remedy}")


def check_record(value: Any, rules: Mapping[str, Rule], origin: object, remedy: str) -> dict[str, Any]:
    """`value`, if it is an object with just the fields of `rules`, each of which keeps its rule.

    Raises:
      ConfigError: it is none; fields that it lacks, that nobody knows, or whose values break their rules are all named.
    """
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: {shown(value)} must be an object with {', '.join(rules)}: {remedy}")
    lacking = [name for name in rules if name not in value]
    unknown = [shown(name) for name in value if name not in rules][:5]
    problems = [f"lacks {', '.join(lacking)}"] if lacking else []
    problems += [f"has the unknown {', '.join(unknown)}"] if unknown else []
    problems += [
        f"has {name}={shown(value[name])}, which must be {rule}"
        for name, (fits, rule) in rules.items()
        if name in value and not fits(value[name])
    ]
    if problems:
        raise ConfigError(f"{origin} {'; '.join(problems)}: {remedy}")
    return value


def shown(value: Any) -> str:
    """Returns a value as a message shows it: at most some 60 characters."""
    if type(value) is int and abs(value) > 10**30:
        return "a huge number"
    if isinstance(value, (list, dict)) and len(value) > 30:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, or with a number of thousands of digits inside
        return f"{'a list' if isinstance(value, list) else 'an object'} that is no sensible one"
    return text if len(text) <= 60 else text[:60] + " …"
