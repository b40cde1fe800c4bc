"""The name table of whole models: names and shapes that users' files hold, and both directions over stacked layers."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gqe_jax.attention import AsymGQAConfig, GQAConfig, GQEConfig, KeyDrivenConfig, MLAConfig, RouterConfig
from gqe_jax.config import ModelConfig
from gqe_jax.flops import parameter_count
from gqe_jax.pytorch import names
from gqe_jax.pytorch.model import abstract_parameters, to_write, torch_tensors

GOLDEN = Path(__file__).with_name("pytorch_names.txt")
SIZES = {"vocab_size": 11, "d_model": 6, "num_layers": 2, "d_ff": 10, "context": 16}
HEADS = {"num_kv_heads": 3, "head_dim": 4}
MODELS = {
    "gqe, every option": ModelConfig(
        attention=GQEConfig(
            num_query_experts=12, top_k=2, bias=True, qk_norm=True, router=RouterConfig(bias_update_rate=0.1), **HEADS
        ),
        tie_embeddings=False,
        **SIZES,
    ),
    "gqe": ModelConfig(attention=GQEConfig(num_query_experts=12, **HEADS), **SIZES),
    "gqe, hard_concat": ModelConfig(attention=GQEConfig(num_query_experts=12, variant="hard_concat", **HEADS), **SIZES),
    "dense": ModelConfig(attention=GQAConfig(num_query_heads=6, **HEADS), **SIZES),
    "mla, every option": ModelConfig(
        attention=MLAConfig(num_query_heads=6, latent_dim=5, rope_dim=2, bias=True, latent_norm=True, **HEADS), **SIZES
    ),
    "dense as Qwen2": ModelConfig(
        attention=GQAConfig(num_query_heads=6, bias=True, out_bias=False, **HEADS), tie_embeddings=False, **SIZES
    ),
    "key-driven": ModelConfig(attention=KeyDrivenConfig(num_query_heads=6, **HEADS), **SIZES),
    "unequal groups": ModelConfig(attention=AsymGQAConfig(num_query_heads=8, max_group_size=4, **HEADS), **SIZES),
}

BUFFERS = {f"layers.attention.{name}" for name in ("router.bias", "head_mask", "heads", "key_norm", "steps")}


def shapes(config):
    return {path: leaf.shape for path, leaf in abstract_parameters(config).items()}


def published_names():
    """All names and shapes as text, a section for each model."""
    lines = []
    for title, config in MODELS.items():
        lines += [f"[{title}]", *(f"{t.name} {list(t.shape)}" for t in torch_tensors(shapes(config))), ""]
    return "\n".join(lines)


def test_names_and_shapes_are_the_published_ones():
    """Files on users' disks and the PyTorch model hold these names: a change breaks all of them."""
    assert published_names() == GOLDEN.read_text(), (
        f"PyTorch's names or shapes have changed, and exported files no longer fit. If that is meant, renew the list "
        f"with: python {Path(__file__).name} (in tests/), and say so in CHANGELOG.md"
    )


def test_every_parameter_has_exactly_one_place():
    """No parameter is lost or written twice: the sizes on both sides agree, for every model."""
    for title, config in MODELS.items():
        parts = [(part.path, t.layer) for t in torch_tensors(shapes(config)) for part in t.parts]
        assert len(parts) == len(set(parts)), title
        ours = sum(np.prod(shape) for shape in shapes(config).values())
        assert ours == sum(np.prod(t.shape) for t in torch_tensors(shapes(config))), title
        buffers = sum(np.prod(shape) for path, shape in shapes(config).items() if path in BUFFERS)
        assert parameter_count(config)["total"] == ours - buffers, title


@pytest.mark.parametrize("title", MODELS)
def test_gather_and_scatter_are_inverse(title):
    """Each layer's slice goes to its own tensor and comes back to the same elements."""
    config = MODELS[title]
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape) for path, shape in shapes(config).items()}
    back = {path: np.full(shape, np.nan) for path, shape in shapes(config).items()}
    for tensor in torch_tensors(shapes(config)):
        value = tensor.gather(arrays.__getitem__)
        assert value.shape == tensor.shape
        tensor.scatter(value, back)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


def test_embedding_is_not_transposed_and_linear_layers_are():
    """PyTorch: Embedding [V, d], Linear computes x Wᵀ with [outputs, inputs]; the second layer is the second slice."""
    config = MODELS["gqe, every option"]
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape) for path, shape in shapes(config).items()}
    state = {t.name: t.make() for t in to_write(config, arrays.__getitem__, None)}
    equal = np.testing.assert_array_equal
    equal(state["model.embed_tokens.weight"], arrays["vocabulary.embedding"])
    equal(state["lm_head.weight"], arrays["vocabulary.lm_head"])
    equal(state["model.layers.1.mlp.up_proj.weight"], arrays["layers.mlp.up_proj.kernel"][1].T)
    k_proj = arrays["layers.attention.k_proj.kernel"][1]
    equal(state["model.layers.1.self_attn.k_proj.weight"][4 * 2 + 3], k_proj[:, 2, 3])
    equal(state["model.layers.0.post_attention_layernorm.weight"], arrays["layers.mlp_norm.scale"][0])


def test_routers_that_learn_nothing_are_zeros():
    """A class with a router in every layer finds its weight; zeros tie, and ties pick experts 0..k-1."""
    config = ModelConfig(
        attention=GQEConfig(num_query_experts=12, router=RouterConfig(kind="fixed"), **HEADS), dtype="bfloat16", **SIZES
    )
    tensors = {t.name: t for t in to_write(config, lambda path: np.zeros(0), np.dtype("float32"))}
    for layer in range(2):
        router = tensors[f"model.layers.{layer}.self_attn.router.weight"]
        assert router.shape == (12, 6) and router.dtype == np.float32 and not router.make().any()


def test_parameters_without_a_name_are_refused():
    """A new kind of parameter must not be left out of an export in silence."""
    with pytest.raises(ValueError, match=r"PyTorch's names are not known for the parameters attention\.latent, extra"):
        torch_tensors({"layers.attention.latent": (2, 3), "extra": (1,)})


def test_attention_rows_are_the_layers():
    """One table: a layer converted on its own has the names that it has within a model."""
    inside = {name.removeprefix("self_attn.") for name in names.BLOCK_ROWS if name.startswith("self_attn.")}
    assert inside == set(names.ATTENTION_ROWS)


if __name__ == "__main__":
    GOLDEN.write_text(published_names())
