"""Readers of what a Hugging Face folder says: nothing in it is believed before it is checked.

Each refusal names the file, the field, the value and the rule, and comes before any work is done for the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gqe_jax.config import ConfigError

LONGEST_JSON = 10**8  # bytes; a tokenizer.json has some 10 MB
LARGEST = 2**31 - 1  # of a size


def parse_json(content: bytes, origin: object) -> Any:
    """The value of JSON text; ConfigError where there is none, or one nested too deeply to be real."""
    try:
        value = json.loads(content)
        if b"\\u" in content:  # which may spell half a character, that no file can hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is no JSON ({error}): copy or download it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ConfigError: no such file, a file that is too long to be one of these, no JSON, or JSON that is no object.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > LONGEST_JSON:
            raise ConfigError(f"{path} is no file of at most {LONGEST_JSON:,} bytes: copy or download it again")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): copy or download it again") from error
    value = parse_json(content, path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object: copy or download it again")
    return value


def is_whole(least: int) -> tuple[Callable[[Any], bool], str]:
    """The rule of a whole number of at least `least`."""
    return lambda v: type(v) is int and least <= v <= LARGEST, f"a whole number from {least} to {LARGEST}"


def is_number(least: float, *, above: bool = False) -> tuple[Callable[[Any], bool], str]:
    """The rule of a finite number that is at least, or above, `least`."""

    def fits(value: Any) -> bool:
        if type(value) not in (int, float) or abs(value) > 1e30 or not math.isfinite(value):
            return False
        return value > least if above else value >= least

    return fits, f"a finite number {'above' if above else 'of at least'} {least}"


Rule = tuple[Callable[[Any], bool], str]
"""What a value must fulfil, and the words for it."""
FLAG: Rule = (lambda v: type(v) is bool, "true or false")
TEXT = (lambda v: type(v) is str, "a text")
OBJECT = (lambda v: type(v) is dict, "an object")
TEXTS = (lambda v: type(v) is list and all(type(item) is str for item in v), "a list of texts")
IDS = (
    lambda v: all(type(item) is int and 0 <= item <= LARGEST for item in (v if type(v) is list else [v])),
    "a token's id, or a list of them",
)

CONFIG_RULES = {
    "model_type": TEXT,
    "hidden_act": TEXT,
    "attention_kind": TEXT,
    "variant": TEXT,
    "router_kind": TEXT,
    "layer_types": TEXTS,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "bos_token_id": IDS,
    "eos_token_id": IDS,
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), is_whole(1)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"), is_whole(1)),
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "router_top_k"), is_whole(1)),
    **dict.fromkeys(("max_window_layers", "router_seed"), is_whole(0)),
    **dict.fromkeys(("rms_norm_eps", "qk_norm_eps", "initializer_range"), is_number(0)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "attn_logit_softcapping"), is_number(0, above=True)),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"), is_number(0)),
    "router_jitter": is_number(0),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), FLAG),
    **dict.fromkeys(("qk_norm", "router_bias", "is_causal"), FLAG),
}
ROPE_RULES = {
    "type": TEXT,
    "rope_type": TEXT,
    "factor": is_number(1),
    "rope_theta": is_number(0, above=True),
    "original_max_position_embeddings": is_whole(1),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), is_number(0, above=True)),
    **dict.fromkeys(
        ("attention_factor", "partial_rotary_factor", "mscale", "mscale_all_dim"), is_number(0, above=True)
    ),
    "truncate": FLAG,
}
TOKENIZER_RULES = {"chat_template": (lambda v: type(v) is str or type(v) is list, "a text, or a list of templates")}
GENERATION_RULES = {"eos_token_id": IDS}


def check_fields(values: Mapping[str, Any], rules: Mapping[str, Rule], origin: str) -> None:
    """Raises ConfigError that names every field whose value breaks its rule; null is as good as absent."""
    problems = [
        f"{name}={_short(values[name])} must be {rule}"
        for name, (fits, rule) in rules.items()
        if values.get(name) is not None and not fits(values[name])
    ]
    if problems:
        raise ConfigError(f"{origin}: {'; '.join(problems)}: copy it again from where the folder came from")


def _short(value: Any) -> str:
    text = repr(value) if type(value) is not int or abs(value) <= 10**30 else "a huge number"
    return text if len(text) <= 60 else text[:60] + " …"


def checked_config(config: dict[str, Any], origin: object) -> dict[str, Any]:
    """A config.json whose fields keep their rules, with one dictionary of rotary parameters: `rope_parameters`.

    transformers 4 wrote `rope_theta` and `rope_scaling`, 5 writes `rope_parameters`; where a file has several that say
    different things its versions do not agree on which is meant, so such a file is refused.

    Raises:
      ConfigError: a field that breaks its rule, or fields that contradict each other.
    """
    check_fields(config, CONFIG_RULES, f"{origin}")
    config = dict(config)
    given = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = config.pop(name, None)
        if value:
            if not any(isinstance(item, dict) for item in value.values()):  # else refused as such
                check_fields(value, ROPE_RULES, f"{origin}, {name}")
                _refuse_two(f"{origin}, {name}", value, "rope_type", "type")
            given[name] = {key: item for key, item in value.items() if item is not None}
            kind = given[name].pop("type", None)
            if kind is not None:
                given[name].setdefault("rope_type", kind)
    if len(given) == 2:
        old, new = given.values()
        both = {key for key in old.keys() & new.keys() if old[key] != new[key]}
        one = (old.keys() ^ new.keys()) - {"rope_theta"}
        if both or one:
            raise ConfigError(
                f"{origin} has both rope_scaling={_short(old)} and rope_parameters={_short(new)}, which differ in "
                f"{', '.join(sorted(both | one))}: remove the one that is wrong"
            )
    # Null switches the rotary embedding off in a folder of gqe export's, in either place.
    rope = {key: item for value in given.values() for key, item in value.items()}
    for name in ("rope_theta", "partial_rotary_factor"):
        _refuse_two(f"{origin}", config | {f"rope_parameters.{name}": rope.get(name)}, name, f"rope_parameters.{name}")
    if rope.get("rope_type") in ("llama3", "yarn"):
        own, outer = rope.get("original_max_position_embeddings"), config.get("original_max_position_embeddings")
        pair = {"original_max_position_embeddings": outer, "rope_parameters.original_max_position_embeddings": own}
        _refuse_two(f"{origin}", pair, *pair)
        if outer is not None:
            rope["original_max_position_embeddings"] = outer
    layers = config.get("layer_types")
    if layers is not None and len(layers) != config.get("num_hidden_layers"):
        raise ConfigError(
            f"{origin}: layer_types has {len(layers)} entries, and num_hidden_layers is "
            f"{config.get('num_hidden_layers')}: correct the one that is wrong"
        )
    return config | ({"rope_parameters": rope} if rope else {})


def _refuse_two(origin: str, values: Mapping[str, Any], first: str, second: str) -> None:
    """Raises ConfigError if two spellings of one thing are given and differ."""
    one, other = values.get(first), values.get(second)
    if one is not None and other is not None and one != other:
        raise ConfigError(f"{origin}: {first}={one!r} contradicts {second}={other!r}: remove the one that is wrong")
