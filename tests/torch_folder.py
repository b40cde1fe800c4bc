"""A model of random weights in JAX, and the same one as a folder that transformers loads.

Imported before transformers, it keeps that library off the network and out of the user's cache.
"""

import atexit
import functools
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

import gqe_jax.convert
import gqe_jax.pytorch
from gqe_jax.attention import GQEConfig, KeyDrivenConfig, MLAConfig
from gqe_jax.config import ModelConfig
from gqe_jax.convert import layer_to_torch
from gqe_jax.models.transformer import Transformer

SCRATCH = Path(tempfile.mkdtemp(prefix="gqe-pytorch-"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(SCRATCH / "hf"), "TQDM_DISABLE": "1"}

CODE = Path(gqe_jax.pytorch.__file__).parent / "modelling"


def model_config(attention=None, **options) -> ModelConfig:
    """Two layers, width 32, 101 tokens, float32; attention by default GQE with G = 2, M = 2, k = 1, D = 8."""
    attention = attention or GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8)
    sizes = {"vocab_size": 101, "d_model": 32, "num_layers": 2, "d_ff": 48, "context": 256, "dtype": "float32"}
    return ModelConfig(attention=attention, **(sizes | options))


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """All parameters drawn, biases and norm scales too; matrices keep the variance of what they multiply."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path[-1] == "scale":
            return rng.uniform(0.5, 1.5, shape)
        if path[-1] == "heads":
            attention = config.attention
            return rng.multinomial(attention.num_query_heads, np.full(shape[1], 1 / shape[1]), shape[0])
        if path[-1] == "steps":
            return np.full(shape, 7)
        if path[-1] == "head_mask":  # as many places as there are heads, the first ones of each group
            layers, groups, places = shape
            taken = [rng.permutation(groups * places) < config.attention.num_query_heads for _ in range(layers)]
            return -np.sort(-np.reshape(taken, shape).astype(int))
        if path[-1] == "bias":
            return 0.1 * rng.standard_normal(shape)
        if path[-1] in ("embedding", "lm_head"):
            inputs = shape[1]
        else:  # a kernel, behind the axis of layers: inputs first, all axes but the last where it leads back to d
            inputs = math.prod(shape[1:-1]) if path[-2] in ("o_proj", "o_extra") else shape[1]
        return rng.standard_normal(shape) / math.sqrt(inputs)

    arrays = {
        path: jax.device_put(draw(path, variable.shape).astype(variable.dtype))
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    nnx.update(model, nnx.from_flat_state(arrays))
    return model


def torch_state(model: Transformer) -> dict[str, np.ndarray]:
    """All parameters under PyTorch's names and in its layout, written out: the name table is tested against it."""
    state = {
        "model.embed_tokens.weight": model.vocabulary.embedding.get_value(),
        "model.norm.weight": model.final_norm.scale.get_value(),
    }
    if not model.config.tie_embeddings:
        state["lm_head.weight"] = model.vocabulary.lm_head.get_value()
    graphdef, layers = nnx.split(model.layers)
    for index in range(model.config.num_layers):
        block = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], layers))
        prefix = f"model.layers.{index}."
        state[prefix + "input_layernorm.weight"] = block.attention_norm.scale.get_value()
        state[prefix + "post_attention_layernorm.weight"] = block.mlp_norm.scale.get_value()
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{prefix}mlp.{name}.weight"] = getattr(block.mlp, name).kernel.get_value().T
        state |= {f"{prefix}self_attn.{name}": value for name, value in layer_to_torch(block.attention).items()}
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def hf_config(config: ModelConfig) -> dict:
    """config.json of a model that goes through our own file, written out; no token ends a generation."""
    attention, scaling = config.attention, config.attention.rope_scaling
    rope_scaling = None
    if scaling.kind != "none":
        rope_scaling = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind != "linear":
            rope_scaling["original_max_position_embeddings"] = scaling.original_context
        keys = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow", "attention_factor"),
        }
        values = {key: getattr(scaling, key) for key in keys.get(scaling.kind, ())}
        rope_scaling |= {key: value for key, value in values.items() if value is not None}
    result = {
        "model_type": "gqe",
        "architectures": ["GQEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_gqe.GQEConfig",
            "AutoModel": "modeling_gqe.GQEModel",
            "AutoModelForCausalLM": "modeling_gqe.GQEForCausalLM",
        },
        "dtype": config.param_dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.query_heads[1],
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_kind": attention.kind,
        "attention_bias": attention.bias,
        "qk_norm": attention.qk_norm,
        "qk_norm_eps": attention.qk_norm_eps,
        "sliding_window": attention.window,
        "attn_logit_softcapping": attention.softcap,
        "rope_theta": attention.rope_theta,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if isinstance(attention, KeyDrivenConfig):
        result["perturb"] = attention.perturb
    if isinstance(attention, MLAConfig):
        result |= {
            "kv_lora_rank": attention.latent_dim,
            "qk_rope_head_dim": attention.rope_dim,
            "rope_repeats": attention.rope_repeats,
            "latent_norm": attention.latent_norm,
        }
    if isinstance(attention, GQEConfig):
        router = attention.router
        result |= {
            "router_top_k": attention.top_k,
            "variant": attention.variant,
            "router_kind": router.kind,
            "router_seed": router.seed,
            "router_bias": router.bias_update_rate > 0,
            "router_aux_loss_coef": router.load_balance_weight,
            "router_z_loss_coef": router.z_loss_weight,
        }
    return result


def write_folder(model: Transformer, folder: Path) -> Path:
    """Code, configuration and weights: what `from_pretrained(folder, trust_remote_code=True)` needs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    for name in ("configuration_gqe.py", "modeling_gqe.py"):
        shutil.copy(CODE / name, folder)
    safetensors.numpy.save_file(torch_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def folder_of(config: ModelConfig) -> Path:
    """The folder of `make_model(config)`, written once."""
    return write_folder(make_model(config), SCRATCH / f"model_{folder_of.cache_info().misses}")


def load(config_or_folder: ModelConfig | Path, **options):
    """The folder's model in evaluation mode, every weight found and none left over."""
    import torch
    import transformers

    torch.set_num_threads(1)  # handing such small tensors to more takes many times longer, on a busy machine above all
    folder = folder_of(config_or_folder) if isinstance(config_or_folder, ModelConfig) else config_or_folder
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model
