"""Readers of what a Hugging Face folder says: nothing in it is believed before it is checked.

Each refusal names the file, the field, the value and the rule, and comes before any work is done for the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gqe_jax.checked_json import FLAG, LARGEST, OBJECT, TEXT, TEXTS, Rule, check_fields, is_number, is_whole, shown
from gqe_jax.config import ConfigError

IDS: Rule = (
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
    "num_query_heads": is_whole(1),
    "allocation": TEXT,
    "allocation_floor": is_whole(0),
    "allocation_window": is_whole(1),
    "perturb": FLAG,
    **dict.fromkeys(("max_position_embeddings", "original_max_position_embeddings", "router_top_k"), is_whole(1)),
    **dict.fromkeys(("max_window_layers", "router_seed"), is_whole(0)),
    **dict.fromkeys(("rms_norm_eps", "qk_norm_eps", "initializer_range"), is_number(0)),
    **dict.fromkeys(("rope_theta", "partial_rotary_factor", "attn_logit_softcapping"), is_number(0, above=True)),
    **dict.fromkeys(("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate"), is_number(0)),
    "router_jitter": is_number(0),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), FLAG),
    **dict.fromkeys(("qk_norm", "router_bias", "is_causal", "latent_norm"), FLAG),
    **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "rope_repeats"), is_whole(1)),
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


def checked_config(config: dict[str, Any], origin: object) -> dict[str, Any]:
    """Returns a config.json whose fields keep their rules, with one dictionary of rotary parameters: `rope_parameters`.

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
                f"{origin} has both rope_scaling={shown(old)} and rope_parameters={shown(new)}, which differ in "
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
