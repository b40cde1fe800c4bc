"""config.json of every family, each field present, absent, contradictory and in each spelling that it has had: what the
import makes of it computes what transformers' own class computes, or the import refuses. Nothing in between.

The function that the import reads out of a config.json is computed by the exported PyTorch model, which other tests
hold to the JAX model in every option; so a case takes milliseconds, and fields can be drawn in combinations.
"""

import collections
import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch_folder
from safetensors.numpy import save_file

from gqe_jax.config import ConfigError
from gqe_jax.config_dict import build
from gqe_jax.pytorch.hf_config import from_hf
from gqe_jax.pytorch.names import split_fused
from gqe_jax.pytorch.safetensors_io import read_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "float32",
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
WINDOW = {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 2}
FAMILIES = {  # as their folders on the Hub have them, sizes aside
    "Llama 1": {"model_type": "llama", "pretraining_tp": 1},
    "Llama 2": {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None, "attention_bias": False},
    "Llama 3": {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": None, "attention_bias": False},
    "Llama 3.1": {"model_type": "llama", "rope_theta": 5e5, "mlp_bias": False,
                  "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "Llama 3.2": {"model_type": "llama", "rope_theta": 5e5, "head_dim": 8, "tie_word_embeddings": True,
                  "rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": 32.0}},
    "SmolLM": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 10000.0, "rope_scaling": None},
    "SmolLM2": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 100000, "rope_interleaved": False},
    "Mistral 0.1": {"model_type": "mistral", "sliding_window": 7, "rope_theta": 10000.0},
    "Mistral 0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "Qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True} | WINDOW,
    "Qwen2.5": {"model_type": "qwen2", "rope_theta": 1e6, "use_mrope": False} | WINDOW,
    "Qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 16, "attention_bias": False, "rope_scaling": None}
    | WINDOW | {"sliding_window": None},
    "Phi-3": {"model_type": "phi3", "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 7, "embd_pdrop": 0.0,
              "pad_token_id": 0},
}  # fmt: skip

YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
ROPES = [
    None,
    {},
    {"rope_type": "default"},
    {"rope_type": "default", "factor": 4.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 2},
    {"rope_type": "linear", "type": "dynamic", "factor": 2.0},
    {"rope_type": "linear", "factor": 0.5},
    {"factor": 2.0},
    {"type": "dynamic", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 8},
    LLAMA3 | {"rope_type": "llama3"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    YARN | {"type": "yarn"},
    YARN | {"rope_type": "yarn", "attention_factor": 0.75},
    YARN | {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 2.0},
    YARN | {"rope_type": "yarn", "mscale": 0.5, "mscale_all_dim": 0.75},
    YARN | {"rope_type": "yarn", "mscale": 0.5},
    YARN | {"rope_type": "yarn", "truncate": False},
    {"rope_type": "yarn", "factor": 2.0},
    {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
]
ABSENT = "absent"
FIELDS = {
    "num_key_value_heads": [ABSENT, None, 4, 2, 1],
    "head_dim": [ABSENT, None, 8, 12],
    "attention_bias": [ABSENT, True, False],
    "mlp_bias": [ABSENT, True, False],
    "tie_word_embeddings": [ABSENT, True, False],
    "rope_theta": [ABSENT, 10000, 500.0],
    "rope_scaling": [ABSENT, *ROPES],
    "rope_parameters": [ABSENT, *ROPES, *({"rope_theta": 300.0} | (rope or {}) for rope in ROPES)],
    "partial_rotary_factor": [ABSENT, 1.0, 0.5],
    "original_max_position_embeddings": [ABSENT, 8, 4],
    "max_position_embeddings": [ABSENT, 16, 64],
    "sliding_window": [ABSENT, None, 7, 1],
    "use_sliding_window": [ABSENT, True, False],
    "max_window_layers": [ABSENT, 0, 1, 2, 9],
    "layer_types": [ABSENT, None, ["full_attention"] * 2, ["sliding_attention"] * 2,
                    ["full_attention", "sliding_attention"], ["full_attention"]],
    "hidden_act": [ABSENT, "silu", "swish", "gelu"],
    "rms_norm_eps": [ABSENT, 1e-5, 0.1],
    "is_causal": [ABSENT, True, False],
    "attn_logit_softcapping": [ABSENT, 3.0],
    "quantization_config": [ABSENT, None],
}  # fmt: skip
IDS = torch.tensor(np.random.default_rng(0).integers(0, 61, (2, 24)))


def theirs(config, folder):
    """(logits, path of the weights) of transformers' class with random weights; None where it refuses or fails."""
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    if transformers.__version__ < "5" and config.get("rope_parameters"):
        return None  # transformers 4 passes over the spelling of 5
    try:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.2 if "bias" in name or "embed" in name else parameter.shape[-1] ** -0.5)
            logits = model(IDS).logits.numpy()
    except Exception:  # of any kind: there is nothing to compare with
        return None
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = {
        name: value.numpy() for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")
    }
    save_file(state, folder / "model.safetensors")
    return logits, folder / "model.safetensors"


@functools.cache
def code():
    """The class of the exported PyTorch model."""
    return type(torch_folder.load(torch_folder.model_config()))


def ours(config, folder, weights):
    """The logits of what the import reads, with the same weights; ConfigError where it refuses."""
    model, attention = from_hf(config, folder / "config.json")
    model = build({"model": model | {"attention": attention, "dtype": "float32"}}).model
    stored = read_file(weights)
    if config["model_type"] == "phi3":
        stored = split_fused(stored, config)
    state = {name: torch.tensor(tensor.read()) for name, tensor in stored.items()}
    description = torch_folder.hf_config(model)
    if model.attention.bias and not model.attention.has_out_bias:
        for layer in range(model.num_layers):
            state[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(model.d_model)
    if model.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    cls = code()
    network = cls(cls.config_class(**{key: value for key, value in description.items() if key != "auto_map"})).eval()
    network.load_state_dict(state)  # every name and every shape
    with torch.no_grad():
        return network(IDS, use_cache=False).logits.numpy()


def outcome(config, folder):
    """ "equal", "refused" or "transformers fails"; AssertionError for anything else."""
    try:
        reference = theirs(config, folder)
        if reference is None:
            return "transformers fails"
        found = ours(config, folder, reference[1])
    except ConfigError:
        return "refused"
    difference = np.abs(found - reference[0]).max()
    assert difference < 1e-4, f"logits differ by {difference:.2g}: {json.dumps(config)}"
    return "equal"


def change(config, field, value):
    return {key: item for key, item in (config | {field: value}).items() if not (key == field and value is ABSENT)}


COLUMNS = (  # of the table in docs/pytorch.md
    ("Llama 1", "Llama 2"), ("Llama 3", "SmolLM", "SmolLM2"), ("Llama 3.1",), ("Llama 3.2",),
    ("Mistral 0.1", "Mistral 0.3"), ("Qwen2", "Qwen2.5", "Qwen3"), ("Phi-3",),
)  # fmt: skip
DOCUMENTED_FOR = "5.23"  # version of transformers


def documented(family):
    """Field → how many of its values are (equal, refused, failures of transformers itself), as docs/pytorch.md says."""
    text = (Path(__file__).parents[1] / "docs" / "pytorch.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `") or "**all**" in line]
    column = 1 + next(number for number, families in enumerate(COLUMNS) if family in families)
    cells = {row[0].strip("`*"): row[column].split("/") for row in rows if len(row) == 1 + len(COLUMNS)}
    return {field: tuple(int(cell[i]) if i < len(cell) else 0 for i in range(3)) for field, cell in cells.items()}


def test_the_documented_table_has_every_field_and_adds_up():
    assert sum(map(len, COLUMNS)) == len(FAMILIES)
    for family in FAMILIES:
        table = documented(family)
        everything = table.pop("all")
        assert {field: sum(counts) for field, counts in table.items()} == {f: len(v) for f, v in FIELDS.items()}
        assert everything == tuple(map(sum, zip(*table.values(), strict=True)))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in ("Llama 3.1", "Phi-3") else pytest.mark.slow) for name in FAMILIES],
)
def test_every_field_alone(family, tmp_path):
    """The family as it is must be equal; each value of each field in turn equal or refused, as the docs say."""
    config = SIZES | FAMILIES[family]
    assert outcome(config, tmp_path) == "equal"
    for field, values in FIELDS.items():
        counts = collections.Counter(outcome(change(config, field, value), tmp_path) for value in values)
        assert counts["equal"], field
        if transformers.__version__.startswith(DOCUMENTED_FOR):
            found = tuple(counts[name] for name in ("equal", "refused", "transformers fails"))
            assert found == documented(family)[field], field


def draws(count, seed, folder):
    """Two to four fields changed at a time, in a family."""
    rng = random.Random(seed)
    counts = collections.Counter()
    for _ in range(count):
        config = SIZES | FAMILIES[rng.choice(list(FAMILIES))]
        for field in rng.sample(list(FIELDS), rng.randint(2, 4)):
            config = change(config, field, rng.choice(FIELDS[field]))
        counts[outcome(config, folder)] += 1
    print(dict(counts))
    assert counts["equal"] > count / 10 and counts["refused"] > count / 10


def test_fields_together(tmp_path):
    draws(100, random.SystemRandom().randrange(10**6), tmp_path)


@pytest.mark.slow
def test_many_fields_together(tmp_path):
    draws(1500, 0, tmp_path)


@pytest.mark.parametrize(
    "model_type", ["smollm3", "olmo2", "gemma", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "phi", "mixtral",
                   "qwen3_moe", "granite", "cohere", "ministral"],
)  # fmt: skip
def test_other_families_are_refused_by_name(model_type, tmp_path):
    """Each has a layer that ours has not, and all would fit by their names and shapes alone or nearly so."""
    with pytest.raises(ConfigError, match=f"model_type='{model_type}' cannot be imported"):
        from_hf(SIZES | {"model_type": model_type}, tmp_path / "config.json")
