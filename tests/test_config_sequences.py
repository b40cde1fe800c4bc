"""Fields that are sequences: from a file, from the command line, through a checkpoint's JSON, and what is refused."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqe_jax import config_dict, config_overrides
from gqe_jax.config import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """A config as a kind of attention may have it."""

    sizes: tuple[int, ...] = (1, 2)
    rates: tuple[float, ...] = ()
    names: tuple[str, ...] = ("a",)
    widths: tuple[int, ...] | None = None


def as_config_dict(groups):
    return config_dict._to_config_dict(groups)


def build(mapping):
    return config_dict._build(Groups, mapping, "")


def overridden(*assignments):
    config = as_config_dict(Groups())
    for assignment in assignments:
        config_overrides.override(config, assignment)
    return build(config)


finite = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(categories=["L"]), min_size=1).filter(lambda word: word.lower() not in ("none", "true"))
drawn = st.builds(
    Groups,
    sizes=st.lists(st.integers()).map(tuple),
    rates=st.lists(finite).map(tuple),
    names=st.lists(words.filter(lambda word: word.lower() != "false")).map(tuple),
    widths=st.none() | st.lists(st.integers()).map(tuple),
)


@given(drawn)
def test_round_trips(groups):
    """A config is the same after a config file's ConfigDict and after the JSON beside a checkpoint, which has lists."""
    assert build(as_config_dict(groups)) == groups
    assert build(json.loads(json.dumps(config_dict.to_dict(groups)))) == groups


@given(drawn, st.sampled_from(["{}", "{},", "({},)", "[{}]", "[{},]"]))
def test_overrides_from_the_command_line(groups, form):
    """Brackets and a comma at the end are optional; words need no quotes."""
    assignments = [f"widths={'None' if groups.widths is None else tuple(groups.widths)}"]
    for field in ("sizes", "rates", "names"):
        values = getattr(groups, field)
        assignments.append(f"{field}=" + (form.format(",".join(map(repr, values))) if values else "()"))
    assert overridden(*assignments) == groups
    if groups.names:
        assert overridden("names=" + ",".join(groups.names)).names == groups.names


@pytest.mark.parametrize(
    ("text", "sizes"), [("1,2", (1, 2)), ("(1, 2)", (1, 2)), ("3", (3,)), ("", ()), ("()", ()), ("2,", (2,))]
)
def test_forms(text, sizes):
    """One number is a sequence of one; nothing, and empty brackets, are one of none."""
    assert overridden(f"sizes={text}").sizes == sizes
    assert overridden("widths=4", f"widths={text}").widths == sizes
    assert overridden("widths=4", "widths=None").widths is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: overridden("size=1"), "unknown config key 'size': did you mean 'sizes'?"),
        (lambda: build({"sises": [1]}), "unknown config key 'sises': did you mean 'sizes'?"),
        (lambda: overridden("sizes=1,x"), r"sizes\[1\]='x' has type str, but must be int: correct the value"),
        (lambda: build({"sizes": 3}), "sizes=3 has type int, but must be a sequence of int: write it with commas"),
        (lambda: build({"sizes": "12"}), "sizes='12' has type str, but must be a sequence of int"),
        (lambda: build({"sizes": [True]}), r"sizes\[0\]=True has type bool, but must be int"),
        (lambda: build({"sizes": [1.0]}), r"sizes\[0\]=1.0 has type float, but must be int"),
        (lambda: build({"sizes": None}), "sizes=None has type NoneType, but must be a sequence of int: write it"),
        (lambda: build({"widths": 3}), "widths=3 has type int, but must be a sequence of int or None: write"),
        (lambda: build({"rates": [0.5, float("inf")]}), r"rates\[1\]=inf must be a finite number"),
    ],
)
def test_what_is_refused(make, message):
    """The message names the key, the entry, its value and its type."""
    with pytest.raises(ConfigError, match=message):
        make()
