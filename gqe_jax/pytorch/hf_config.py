"""Our model configuration as a Hugging Face config.json, and back: GQE's own, Llama, Mistral, Qwen2 and Qwen3.

A dense model is written for the first of these classes that computes it, so that loading it needs no code of ours; what
none of them can (a soft cap, say) goes through `modeling_gqe.py`, as every GQE model does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gqe_jax.attention.kinds import kind_named
from gqe_jax.config import AttentionConfig, ConfigError, ModelConfig, RopeScaling, nearest
from gqe_jax.data.tokenizer import Tokenizer
from gqe_jax.pytorch.outside import checked_config


class Family(NamedTuple):
    """What a class of transformers can compute, and what a key that its config.json leaves out means."""

    model_type: str
    architecture: str
    qk_norm: bool
    biases: tuple[tuple[bool, bool], ...]  # (on q, k and v; on the output)
    window: bool
    heads_divide_width: bool  # num_attention_heads has to divide hidden_size, though head_dim is free
    any_tokenizer: bool  # False: transformers reads every tokenizer.json beside it as this family's own
    defaults: dict[str, Any]


_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "hidden_act": "silu", "initializer_range": 0.02}
_QWEN = _DEFAULTS | {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = (
    Family(
        "llama", "LlamaForCausalLM", False, ((False, False), (True, True)), False, True, True,
        _DEFAULTS | {"max_position_embeddings": 2048},
    ),
    Family(
        "mistral", "MistralForCausalLM", False, ((False, False),), True, False, True,
        _DEFAULTS | {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Family(
        "qwen2", "Qwen2ForCausalLM", False, ((True, False),), True, False, False, _QWEN | {"num_key_value_heads": 32},
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", True, ((False, False), (True, True)), True, False, True,
        _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
    ),
)  # fmt: skip
# Read, never written: its weights are Llama's, q, k and v in one projection, gate and up in another.
PHI3 = Family(
    "phi3", "Phi3ForCausalLM", False, ((False, False),), True, False, True,
    _DEFAULTS | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
)  # fmt: skip
GQE = "gqe"
CODE_FILES = ("configuration_gqe.py", "modeling_gqe.py")
AUTO_MAP = {
    "AutoConfig": "configuration_gqe.GQEConfig",
    "AutoModel": "modeling_gqe.GQEModel",
    "AutoModelForCausalLM": "modeling_gqe.GQEForCausalLM",
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
ROPE_KEYS = {  # of transformers → of RopeScaling
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
ROPE_KEYS_OF = {  # kind → the keys of transformers that it reads
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


# ---------------------------------------------------------------------------- export


def choose_class(model: ModelConfig, tokenizer: Tokenizer) -> tuple[Family | None, str]:
    """Returns the class of transformers that computes the model (None: ours), and a sentence on why.

    Raises:
      ConfigError: no class computes its kind of attention, and neither does our modelling file.
    """
    check_exportable(model.attention)
    families = [family for family in FAMILIES if family.model_type in model.attention.transformers_classes]
    if not families:
        kind = model.attention.kind.upper()
        return None, f"GQEForCausalLM, in the folder's modeling_gqe.py: transformers has no class for {kind} attention"
    objections = {family.architecture: _objections(family, model, tokenizer) for family in families}
    for family in families:
        if not objections[family.architecture]:
            return family, f"{family.architecture}: dense attention that transformers has, no code in the folder"
    first, *others = objections.values()
    shared = [objection for objection in first if all(objection in found for found in others)]
    if shared:
        reasons = f"each of {', '.join(objections)} {' and '.join(shared)}"
    else:
        reasons = "; ".join(f"{name} {' and '.join(found)}" for name, found in objections.items())
    return None, f"GQEForCausalLM, in the folder's modeling_gqe.py, since {reasons}"


def check_exportable(attention: AttentionConfig) -> None:
    """Raises ConfigError unless a class of transformers or our modelling file computes this kind of attention."""
    if not attention.transformers_classes and attention.modelling_settings() is None:
        raise ConfigError(
            f"attention.kind={attention.kind!r} cannot be exported: neither a class of transformers nor the modelling "
            f"file that travels with exports computes it; use the model through gqe_jax"
        )


def _objections(family: Family, model: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    attention = model.attention
    _, heads = attention.query_heads
    biases = attention.bias, attention.has_out_bias
    checks = {
        f"has no soft cap (softcap={attention.softcap})": attention.softcap is None,
        "always has rotary embedding (rope_theta=None)": attention.rope_theta is not None,
        f"{'always has' if family.qk_norm else 'has no'} QK norm": attention.qk_norm == family.qk_norm,
        f"has one epsilon (norm_eps={model.norm_eps}, qk_norm_eps={attention.qk_norm_eps})": not attention.qk_norm
        or attention.qk_norm_eps == model.norm_eps,
        f"has other biases (bias={biases[0]}, out_bias={biases[1]})": biases in family.biases,
        f"has no sliding window (window={attention.window})": attention.window is None or family.window,
        f"wants heads that divide the width ({heads}, {model.d_model})": not family.heads_divide_width
        or model.d_model % heads == 0,
        f"reads every tokenizer as its own (here: {tokenizer.name})": family.any_tokenizer
        or tokenizer.name == "huggingface",
    }
    return [objection for objection, fits in checks.items() if not fits]


def to_hf(model: ModelConfig, family: Family | None, dtype: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
      model: of the weights beside it.
      family: from `choose_class`.
      dtype: "float32" or "bfloat16", of the weights.
      tokenizer: of the special tokens' ids. A document begins behind an eos, so that is the bos too.
    """
    attention = model.attention
    scaling = attention.rope_scaling
    _, heads = attention.query_heads
    config: dict[str, Any] = {
        "model_type": GQE if family is None else family.model_type,
        "architectures": [AUTO_MAP["AutoModelForCausalLM"].split(".")[1] if family is None else family.architecture],
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "attention_bias": attention.bias,
        "rope_theta": attention.rope_theta,
        **token_ids(tokenizer),
        "use_cache": True,
    }
    if scaling.kind != "none":
        config["rope_scaling"] = _rope_to_hf(scaling)  # transformers 4 reads this form alone, 5 this one too
    if family is None:
        config |= _gqe_to_hf(model)
    elif scaling.kind == "dynamic":
        config["max_position_embeddings"] = scaling.original_context  # there this key is the unstretched length
    elif scaling.kind == "yarn":
        config["max_position_embeddings"] = round(scaling.factor * scaling.original_context)  # else 4.x rescales
    if family is not None and family.window:
        config["sliding_window"] = attention.window
        if "max_window_layers" in family.defaults:
            config |= {"use_sliding_window": attention.window is not None, "max_window_layers": 0}
    return config


def token_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """Returns the special tokens as config.json and generation_config.json have them; several may end a generation."""
    stops = list(tokenizer.stop_ids)
    eos = stops if len(stops) > 1 else tokenizer.eos_id
    return {"bos_token_id": tokenizer.eos_id, "eos_token_id": eos, "pad_token_id": tokenizer.pad_id}


def _gqe_to_hf(model: ModelConfig) -> dict[str, Any]:
    attention = model.attention
    config: dict[str, Any] = {
        "auto_map": AUTO_MAP,
        "attention_kind": attention.kind,
        "attention_bias": attention.bias or attention.has_out_bias,
        "qk_norm": attention.qk_norm,
        "qk_norm_eps": attention.qk_norm_eps,
        "sliding_window": attention.window,
        "attn_logit_softcapping": attention.softcap,
        **(attention.modelling_settings() or {}),
    }
    if attention.rope_scaling.kind == "dynamic":
        config["rope_scaling"] = _rope_to_hf(attention.rope_scaling) | {
            "original_max_position_embeddings": attention.rope_scaling.original_context
        }
    return config


def _rope_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    values = {key: getattr(scaling, ROPE_KEYS[key]) for key in ROPE_KEYS_OF[scaling.kind]}
    return {"rope_type": scaling.kind} | {key: value for key, value in values.items() if value is not None}


# ---------------------------------------------------------------------------- import


def from_hf(config: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the model configuration that a config.json describes.

    Args:
      config: its content.
      path: where it is, for messages.

    Returns:
      (fields of `ModelConfig` but `attention`, fields of the attention's configuration with its `kind`).

    Raises:
      ConfigError: another architecture, or options that the model here does not have; all are listed.
    """
    spoken, config = config, checked_config(config, path)
    model_type = config.get("model_type")
    known = {family.model_type: family for family in (*FAMILIES, PHI3)}
    if model_type != GQE and model_type not in known:
        raise ConfigError(
            f"{path}: model_type={model_type!r} cannot be imported ({nearest(str(model_type)[:60], [GQE, *known])}): "
            f"Llama (SmolLM too), Mistral, Qwen2, Qwen3, Phi-3 and what gqe export wrote can"
        )
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}: copy it again from where the folder came from")
    family = known.get(model_type)
    defaults = _DEFAULTS | {"max_position_embeddings": 2048} if family is None else family.defaults
    kv_heads = (defaults | config).get("num_key_value_heads")  # null means as many as query heads
    no_rotary = family is None and any(
        "rope_theta" in place and place["rope_theta"] is None for place in (spoken, spoken.get("rope_parameters") or {})
    )
    config = defaults | {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    problems = [
        f"{key}={config[key]!r} ({why})"
        for key, (fine, why) in _ONLY.items()
        if key in config and config[key] not in fine
    ]
    attention: dict[str, Any] = {
        "num_kv_heads": kv_heads or config["num_attention_heads"],
        "head_dim": config.get("head_dim"),
        "window": _window(family, config, problems),
    }
    attention |= _rope_from_hf(config, problems)
    if no_rotary:
        attention["rope_theta"] = None
    model = {
        "vocab_size": config["vocab_size"],
        "d_model": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "d_ff": config["intermediate_size"],
        "context": config["max_position_embeddings"],
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "norm_eps": config["rms_norm_eps"],
        "init_std": config["initializer_range"],
    }
    scaling = attention["rope_scaling"]
    if family is not None and scaling["kind"] in ("dynamic", "yarn"):
        model["context"] = max(model["context"], round(scaling["factor"] * scaling["original_context"]))
    if family is None:
        attention |= _gqe_from_hf(config, path)
    else:
        biases = [pair for pair in family.biases if pair[0] == bool(config.get("attention_bias", family.biases[0][0]))]
        bias, out_bias = biases[0] if biases else family.biases[0]
        attention |= {"kind": "gqa", "num_query_heads": config["num_attention_heads"], "bias": bias}
        if out_bias != bias:
            attention["out_bias"] = out_bias
        attention |= {"qk_norm": True, "qk_norm_eps": config["rms_norm_eps"]} if family.qk_norm else {}
    if problems:
        raise ConfigError(f"{path} asks for what the model here does not have: {'; '.join(problems)}")
    return model, {key: value for key, value in attention.items() if value is not None or key == "rope_theta"}


_ONLY: dict[str, tuple[tuple, str]] = {
    "hidden_act": (("silu", "swish"), "the MLP is SwiGLU, with silu"),
    "mlp_bias": ((False,), "the MLP has no biases"),
    "partial_rotary_factor": ((1, 1.0), "rotary embedding turns whole heads"),
    "quantization_config": ((), "quantised weights are not read: export them in bfloat16 first"),
    "is_causal": ((True,), "attention is causal"),
}


def _window(family: Family | None, config: Mapping[str, Any], problems: list[str]) -> int | None:
    """Returns the window of every layer; a model in which only some layers have one is refused."""
    window = config.get("sliding_window")
    kinds = set(config.get("layer_types") or ())
    if family is not None and not family.window:
        if window is not None or kinds - {"full_attention"}:
            problems.append(f"sliding_window={window!r}, or layer_types with one ({family.architecture} has no window)")
        return None
    if family is not None and "max_window_layers" in family.defaults:
        if not config.get("use_sliding_window", False):
            if kinds - {"full_attention"}:
                problems.append("layer_types with a window, but use_sliding_window is not true")
            return None
        if not kinds:  # the first max_window_layers layers see everything
            first = config["max_window_layers"]
            seen = {"full_attention": first > 0, "sliding_attention": first < config["num_hidden_layers"]}
            kinds = {kind for kind, has in seen.items() if has}
    elif family is not None and kinds:
        problems.append(f"layer_types ({family.architecture} reads sliding_window alone; another class reads both)")
    if not kinds or kinds == {"sliding_attention"}:
        return window
    if kinds != {"full_attention"}:
        problems.append(f"layer_types of several kinds ({', '.join(sorted(kinds))}; all layers here are alike)"[:300])
    return None


def _rope_from_hf(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters") or {})
    kind = rope.get("rope_type", "default")
    result = {"rope_theta": rope.get("rope_theta") or config["rope_theta"], "rope_scaling": {"kind": "none"}}
    if any(isinstance(value, dict) for value in rope.values()):
        problems.append("rope_parameters of its own for each kind of layer (all layers here are alike)")
    elif kind != "default" and config["model_type"] == PHI3.model_type:
        problems.append(f"rope_type={kind!r} in Phi-3 (known: default)")
    elif kind not in ("default", *ROPE_KEYS_OF):
        problems.append(f"rope_type={kind!r} (known: default, {', '.join(ROPE_KEYS_OF)})")
    elif rope.get("partial_rotary_factor", 1) != 1:
        problems.append(f"partial_rotary_factor={rope['partial_rotary_factor']} (rotary embedding turns whole heads)")
    elif kind != "default":
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        if kind == "dynamic" and config["model_type"] != GQE:
            rope["original_max_position_embeddings"] = config["max_position_embeddings"]
        if kind == "yarn":
            _complete_yarn(rope, config, problems)
        needed = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key in ROPE_KEYS_OF[kind]]
        absent = [key for key in needed if rope.get(key) is None]
        if absent:
            problems.append(f"rope_type={kind!r} without {', '.join(absent)}")
        used = (*ROPE_KEYS_OF[kind], "original_max_position_embeddings")[: None if kind == "dynamic" else -1]
        scaling = {ROPE_KEYS[key]: rope[key] for key in used if rope.get(key) is not None}
        result["rope_scaling"] = {"kind": kind, "factor": 1.0} | scaling
    return result


def _complete_yarn(rope: dict[str, Any], config: Mapping[str, Any], problems: list[str]) -> None:
    """Returns the values that transformers derives: the factor from the lengths, the amplitude from two exponents."""
    if rope.get("factor") is None:
        rope["factor"] = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
    if not rope.get("truncate", True):
        problems.append("rope_scaling.truncate=False (yarn's bounds are whole dimensions here)")
    powers = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is None and all(powers):
        amplitude, divisor = (0.1 * power * math.log(max(rope["factor"], 1.0)) + 1.0 for power in powers)
        rope["attention_factor"] = amplitude / divisor


def _gqe_from_hf(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    kind = config.get("attention_kind", GQE)
    common = {
        "kind": kind,
        "bias": config.get("attention_bias", False),
        "qk_norm": config.get("qk_norm", False),
        "qk_norm_eps": config.get("qk_norm_eps", 1e-6),
        "softcap": config.get("attn_logit_softcapping"),
    }
    try:
        return common | kind_named(kind).config.from_modelling_settings(config)
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error.args[0]}: copy it again from where the folder came from") from error
