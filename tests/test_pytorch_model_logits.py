"""The exported PyTorch model computes what the JAX model computes: logits and router choices, for every option."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import torch_folder
from flax import nnx
from torch_folder import model_config

from gqe_jax.attention import (
    AsymGQAConfig,
    GQAConfig,
    GQEConfig,
    KeyDrivenConfig,
    MLAConfig,
    RouterConfig,
    RouterStats,
)
from gqe_jax.config import RopeScaling

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
flash_attention_mask = pytest.importorskip("transformers.masking_utils").flash_attention_mask

B, S = 2, 13
LENGTHS = np.array([S, 9])
TOKENS = np.random.default_rng(0).integers(1, 101, (B, S)).astype(np.int32)
TIE = 1e-6  # probabilities closer than this may be ordered either way


def gqe(experts=2, top_k=1, **options):
    options = {"implementation": "reference"} | options  # compiles in half the time
    return GQEConfig(num_query_experts=2 * experts, num_kv_heads=2, top_k=top_k, head_dim=8, **options)


def jax_model(config, monkeypatch):
    """Logits [B, S, V] of the rows with padding behind them, and the routing of each layer or None."""
    monkeypatch.setattr(RouterStats, "reduced", lambda self: self)  # the model drops the choices of single tokens
    graphdef, state = nnx.split(torch_folder.make_model(config))
    index = np.arange(S)

    @tiny.jit
    def run(state, tokens):
        model = nnx.merge(graphdef, state)
        x, stats = model(
            tokens,
            segment_ids=(index < LENGTHS[:, None]).astype(np.int32),
            positions=np.minimum(index, LENGTHS[:, None] - 1).astype(np.int32),
        )
        return model.logits(x), stats

    logits, stats = run(state, TOKENS)
    return np.asarray(logits), jax.device_get(stats)


def left_padded():
    """(input_ids, attention_mask) with the same rows, padding before them."""
    ids, mask = np.zeros((B, S), np.int64), np.zeros((B, S), np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, S - length :] = TOKENS[row, :length]
        mask[row, S - length :] = 1
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def real(left):
    """A function from [B, S, ...] to [sum of lengths, ...], without the padding before the tokens or behind them."""
    return lambda x: np.concatenate([x[b, S - n :] if left else x[b, :n] for b, n in enumerate(LENGTHS)])


def check(config, monkeypatch, *, cached=True, atol=2e-5):
    """Every implementation, with padding, and token by token through the cache; returns the largest difference."""
    want, stats = jax_model(config, monkeypatch)
    inputs, worst, ties = left_padded(), 0.0, 0
    implementations = ["eager"] if config.attention.softcap else ["sdpa", "eager"]
    for implementation in implementations:
        model = torch_folder.load(config, attn_implementation=implementation)
        with torch.no_grad():
            full = model(**inputs, output_router_logits=True)
            assert not full.logits.isnan().any()
            got = [real(left=True)(full.logits.numpy())]
            if cached:
                steps, cache = [], None
                for start, end in [(0, 6), *((i, i + 1) for i in range(6, S))]:
                    step = model(
                        inputs["input_ids"][:, start:end],
                        attention_mask=inputs["attention_mask"][:, :end],
                        past_key_values=cache,
                        use_cache=True,
                    )
                    cache = step.past_key_values
                    steps.append(step.logits)
                got.append(real(left=True)(torch.cat(steps, dim=1).numpy()))
        for logits in got:
            worst = max(worst, np.abs(logits - real(left=False)(want)).max())
        if isinstance(config.attention, GQEConfig):
            ties += count_ties(stats, full, config.attention)
    assert worst <= atol, worst
    print(f"max abs difference {worst:.2e}, {ties} ties")
    return worst


def count_ties(stats, outputs, attention):
    """Asserts that all tokens chose the same experts in the same order, but for ties, and counts those."""
    ties = 0
    for layer in range(len(outputs.expert_index)):
        want = real(left=False)(stats.expert_index[layer])
        got = real(left=True)(outputs.expert_index[layer].numpy())
        probs = real(left=False)(stats.router_probs[layer])
        np.testing.assert_allclose(
            real(left=True)(outputs.router_logits[layer].softmax(-1).numpy()), probs, atol=1e-5
        )
        differs = (want != got).any(-1)
        assert not differs.any() or attention.router.kind == "learned"
        gap = np.diff(np.sort(probs, -1)).min(-1, initial=np.inf)
        assert (gap[differs] < TIE).all()
        ties += differs.sum()
    return ties


@pytest.mark.parametrize("variant", ["gqe", "hard_concat", "weighted_concat"])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_variants(variant, experts, top_k, monkeypatch):
    """All variants and numbers of experts, M = 1 (nothing to route) and k = M (all of them) among them."""
    check(model_config(gqe(experts, top_k, variant=variant)), monkeypatch)


OPTIONS = {
    "qk_norm, bias, untied": ({"qk_norm": True, "bias": True}, {"tie_embeddings": False}),
    "window": ({"window": 4}, {}),
    "softcap": ({"softcap": 1.5}, {}),
    "softcap, window": ({"softcap": 1.5, "window": 4}, {}),
    "no rotary embedding": ({"rope_theta": None}, {}),
    "linear": ({"rope_scaling": RopeScaling(kind="linear", factor=4.0)}, {}),
    "llama3": ({"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_context=16)}, {}),
    "yarn": ({"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_context=64), "rope_theta": 500.0}, {}),
    "yarn, attention_factor": (
        {"rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_context=64, attention_factor=1.3)},
        {},
    ),
    "fixed router": ({"router": RouterConfig(kind="fixed")}, {}),
    "random router": ({"router": RouterConfig(kind="random", seed=2**32 - 5)}, {}),
    "loss-free balancing": ({"router": RouterConfig(bias_update_rate=0.1)}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, monkeypatch):
    """Each option of the attention, at M = 4 and k = 2."""
    attention, model = OPTIONS[name]
    check(model_config(gqe(4, 2, **attention), **model), monkeypatch)


def test_dynamic_rotary_scaling(monkeypatch):
    """Each row by its own length in the call: decoding past the original context is another function, there as here."""
    scaling = RopeScaling(kind="dynamic", factor=4.0, original_context=8)
    check(model_config(gqe(2, 1, rope_scaling=scaling)), monkeypatch, cached=False)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dense_attention(groups, monkeypatch):
    """MQA, GQA and MHA through the same file."""
    dense = GQAConfig(num_query_heads=4, num_kv_heads=groups, head_dim=8, qk_norm=True, window=4)
    check(model_config(dense), monkeypatch)


def test_unequal_groups(monkeypatch):
    """The mask of each layer comes with the weights; what stands in padded places does not count."""
    attention = AsymGQAConfig(num_query_heads=7, num_kv_heads=3, max_group_size=4, head_dim=8, bias=True)
    check(model_config(attention), monkeypatch)


def test_key_driven(monkeypatch):
    """Each layer's run of query heads on each KV head comes with the weights, none on some; no noise in evaluation."""
    attention = KeyDrivenConfig(num_query_heads=6, num_kv_heads=3, head_dim=8, perturb=True, implementation="reference")
    check(model_config(attention), monkeypatch)
    torch_model = torch_folder.load(model_config(attention)).train()
    attended = {}
    layer = torch_model.model.layers[0].self_attn
    layer.o_proj.register_forward_pre_hook(lambda _, inputs: attended.update(o=inputs[0].unflatten(-1, (6, 8))))
    torch_model(**left_padded())
    assert attended["o"][1, S - LENGTHS[1] :].mean(-1).abs().max() < 1e-5 < attended["o"].abs().max()


@pytest.mark.parametrize("groups", [2, 4])
def test_latent_attention(groups, monkeypatch):
    """Tied and untied, with a norm of the latent, a window and frequencies that repeat; the cache holds latents."""
    options = {"latent_norm": True, "bias": True} if groups == 2 else {"window": 4, "rope_repeats": 2}
    latent = MLAConfig(num_query_heads=4, num_kv_heads=groups, head_dim=8, latent_dim=12, rope_dim=4, **options)
    check(model_config(latent), monkeypatch)


@pytest.mark.slow
def test_24_layers(monkeypatch):
    """Rounding of 24 layers adds up to at most 1e-4, and does not change a choice but at ties."""
    config = model_config(gqe(4, 2), num_layers=24)
    check(config, monkeypatch, atol=1e-4)
    check(dataclasses.replace(config, attention=gqe(2, 1)), monkeypatch, atol=1e-4)


def test_packed_rows_do_not_see_each_other():
    """Positions that start again mark a new document, as `DataCollatorWithFlattening` packs them: each gets the logits
    that it has alone."""
    model = torch_folder.load(model_config(gqe(2, 1)))
    ids = torch.tensor(TOKENS[:1], dtype=torch.long)
    positions = torch.cat([torch.arange(5), torch.arange(S - 5)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        alone = [model(part).logits for part in (ids[:, :5], ids[:, 5:])]
    np.testing.assert_allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


def test_sdpa_cannot_cap_scores():
    """Left to itself the model takes the eager implementation; told to use sdpa afterwards, it says why not."""
    model = torch_folder.load(model_config(gqe(2, 1, softcap=2.0)), attn_implementation="sdpa")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"sdpa' cannot cap scores \(attn_logit_softcapping=2.0\): use 'eager'"):
        model(torch.ones(1, 3, dtype=torch.long))


def test_other_implementations_are_handed_everything():
    """As flash_attention_2 has it: a mask [B, T] of real tokens, and window and cap as arguments. This one, written out
    per head in float64, stands for it."""

    def attend(module, q, k, v, mask, scaling, sliding_window, softcap, **kwargs):
        k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1).double() for x in (k, v))
        scores = softcap * torch.tanh(q.double() @ k.mT * scaling / softcap)
        i, j = torch.arange(S)[:, None], torch.arange(S)
        seen = (j <= i) & (j > i - sliding_window) & mask[:, None, None].bool()
        probs = scores.masked_fill(~seen, -1e30).softmax(-1)
        return (probs @ v).to(q.dtype).transpose(1, 2), None

    transformers.AttentionInterface.register("per_head", attend)
    transformers.AttentionMaskInterface.register("per_head", flash_attention_mask)
    config = model_config(gqe(4, 2, softcap=1.5, window=4))
    with torch.no_grad():
        want = torch_folder.load(config)(**left_padded()).logits
        model = torch_folder.load(config)
        model.set_attn_implementation("per_head")
        got = model(**left_padded(), use_cache=False).logits
    take = real(left=True)
    np.testing.assert_allclose(take(got.numpy()), take(want.numpy()), atol=1e-5)
