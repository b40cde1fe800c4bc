"""The exported folder's life: saved again, sharded, in bfloat16, on devices; and configurations that cannot be."""

import ast
import json

import numpy as np
import pytest
import torch_folder
from torch_folder import CODE, model_config

from gqe_jax.attention import GQEConfig, RouterConfig
from gqe_jax.config import RopeScaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor(np.random.default_rng(0).integers(1, 101, (2, 9)))
CONFIG = model_config(
    GQEConfig(
        num_query_experts=8,
        num_kv_heads=2,
        top_k=2,
        head_dim=8,
        bias=True,
        qk_norm=True,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=64, beta_fast=16.0),
        router=RouterConfig(bias_update_rate=0.1),
    ),
    tie_embeddings=False,
)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        model_config(GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8, rope_theta=None)),
        model_config(
            GQEConfig(
                num_query_experts=4,
                num_kv_heads=2,
                head_dim=8,
                rope_scaling=RopeScaling(kind="dynamic", factor=4.0, original_context=4),
            )
        ),
    ],
    ids=["everything, untied", "tied, no rotary embedding", "dynamic"],
)
def test_saved_again(config, tmp_path):
    """`save_pretrained` writes a folder with the code, of many shards here, that gives the same tensors, logits and
    configuration; tied weights are stored once."""
    model = torch_folder.load(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "modeling_gqe.py").exists() and (tmp_path / "configuration_gqe.py").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (not config.tie_embeddings)
    again = torch_folder.load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(logits(again), logits(model))
    assert again.config.rope_parameters == model.config.rope_parameters
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == config.tie_embeddings


def test_rope_scaling_is_read_in_either_form():
    """`rope_theta` with `rope_scaling` (transformers 4), or `rope_parameters` alone (transformers 5)."""
    cls = type(torch_folder.load(CONFIG).config)
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = cls(rope_theta=5e5, rope_scaling=scaling)
    new = cls(rope_parameters=scaling | {"rope_theta": 5e5})
    assert old.rope_parameters == new.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert old.rope_theta == new.rope_theta == 5e5
    assert cls(rope_theta=None).rope_theta is None


def test_bfloat16():
    """Loaded in bfloat16 the matrices are, the router is not, so that its choices (in the first layer, which sees the
    rounded embeddings) are those of the same numbers in float32."""
    config = model_config(CONFIG.attention)
    model = torch_folder.load(config, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if "router" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "router" not in name} == {torch.bfloat16}
    exact = torch_folder.load(config)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = exact(IDS, output_router_logits=True)
        got = model(IDS, output_router_logits=True)
    assert got.logits.dtype == torch.bfloat16
    chosen_otherwise = (got.expert_index[0] != want.expert_index[0]).float().mean()
    assert chosen_otherwise < 0.05
    assert (got.logits.argmax(-1) == want.logits.argmax(-1)).float().mean() > 0.8


def test_device_map():
    """accelerate places the layers; `generate` runs on what it placed."""
    pytest.importorskip("accelerate")
    model = torch_folder.load(CONFIG, device_map="cpu")
    assert torch.equal(logits(model), logits(torch_folder.load(CONFIG)))
    assert torch.equal(logits(torch_folder.load(CONFIG, device_map="auto")), logits(model))
    layers = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    offloaded = torch_folder.load(
        CONFIG, device_map=layers | {"lm_head": "cpu"}, offload_folder=str(torch_folder.SCRATCH / "offload")
    )
    want = torch_folder.load(CONFIG).generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(offloaded.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), want)


def test_from_scratch():
    """A configuration alone makes a model, its embeddings tied or not, that trains."""
    cls = type(torch_folder.load(CONFIG))
    small = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = cls.config_class(**small, num_attention_heads=4, num_key_value_heads=2)
    model = cls(config).train()
    assert config.head_dim == 4 and model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.randint(11, (2, 5))
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"router_top_k": 3},
            "router_top_k=3 must lie between 1 and the 2 experts of a group (num_attention_heads=16 / "
            "num_key_value_heads=8): lower it or raise num_attention_heads",
        ),
        (
            {"num_attention_heads": 12},
            "num_attention_heads=12 is not a multiple of num_key_value_heads=8: every KV head needs the same number of "
            "query heads; change either",
        ),
        ({"variant": "moe"}, "variant='moe' is unknown: use one of 'gqe', 'hard_concat', 'weighted_concat'"),
        ({"router_kind": "hash"}, "router_kind='hash' is unknown: use one of 'learned', 'fixed', 'random'"),
        (
            {"attention_kind": "mqa"},
            "attention_kind='mqa' is unknown: use one of 'gqe', 'gqa', 'asym_gqa', 'key_driven', 'mla'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is unknown: use one of 'silu'"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope_type='longrope' is not supported: use one of 'default', 'linear', 'dynamic', 'llama3', 'yarn'",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0}},
            "rope_scaling lacks low_freq_factor, high_freq_factor, which rope_type='llama3' needs: add it",
        ),
        (
            {"head_dim": 7},
            "head_dim=7 is odd, but rotary embedding (rope_theta=10000.0) turns pairs of dimensions: make head_dim "
            "even, or set rope_theta to null",
        ),
    ],
)
def test_configurations_that_cannot_be(options, message):
    cls = type(torch_folder.load(CONFIG).config)
    with pytest.raises(ValueError) as error:
        cls(**options)
    assert str(error.value) == message


def test_the_code_needs_torch_and_transformers_only():
    """It is copied to where gqe_jax and JAX are not installed."""
    for path in CODE.glob("*_gqe.py"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        packages = {name.split(".")[0] for name in names}
        assert packages <= {"dataclasses", "inspect", "math", "torch", "transformers"}
