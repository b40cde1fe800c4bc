"""The exported PyTorch model under transformers' `generate`."""

import numpy as np
import pytest
import torch_folder
from torch_folder import model_config

from gqe_jax.attention import GQAConfig, GQEConfig
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.generate import Generator
from gqe_jax.pytorch.hf_tokenizer import tokenizer_files

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BOS = 1
PROMPTS = [np.random.default_rng(row).integers(2, 101, n) for row, n in enumerate((3, 17, 8))]
CONFIG = model_config(GQEConfig(num_query_experts=8, num_kv_heads=2, top_k=2, head_dim=8, qk_norm=True))


def batch(prompts=PROMPTS):
    """The prompts as JAX's generator begins them, with padding before them."""
    rows = [np.concatenate([[BOS], prompt]) for prompt in prompts]
    ids, mask = (np.zeros((len(rows), max(map(len, rows))), np.int64) for _ in range(2))
    for row, tokens in enumerate(rows):
        ids[row, -len(tokens) :] = tokens
        mask[row, -len(tokens) :] = 1
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def greedy(model, inputs, new_tokens, **options):
    """New tokens [B, new_tokens]."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].numpy()


@pytest.mark.parametrize(
    "config",
    [CONFIG, model_config(GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8, window=20))],
    ids=["k2 of 4", "k1 of 2, window"],
)
def test_greedy_tokens_are_those_of_jax(config):
    """200 tokens behind prompts of three lengths in one batch: any slip of position, mask or cache would show, since
    each token depends on all before it."""
    generator = Generator(torch_folder.make_model(config), eos_id=BOS)
    want = generator.generate(PROMPTS, max_new_tokens=200, stop_tokens=())
    for implementation in ("sdpa", "eager"):
        got = greedy(torch_folder.load(config, attn_implementation=implementation), batch(), 200)
        np.testing.assert_array_equal(got, np.stack(want))


@pytest.fixture(scope="module")
def model():
    return torch_folder.load(CONFIG)


def test_a_row_does_not_depend_on_its_padding(model):
    """Each prompt alone, without mask or padding, gives the tokens that it gives in the batch."""
    together = greedy(model, batch(), 20)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor(np.concatenate([[BOS], prompt]))[None]
        np.testing.assert_array_equal(greedy(model, {"input_ids": ids}, 20)[0], together[row])


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("window", [None, 12])
def test_every_cache_gives_the_same_tokens(options, window):
    """No cache, and the static one (its compilation is tested elsewhere); with a window both hold its keys only."""
    config = model_config(GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8, window=window))
    model = torch_folder.load(config)
    np.testing.assert_array_equal(greedy(model, batch(), 24, **options), greedy(model, batch(), 24))


def test_the_cache_holds_the_keys_of_its_groups_alone(model):
    """[B, G, T, D] per layer: the mean over groups of the shared head is computed from it, not kept."""
    with torch.no_grad():
        cache = model(**batch(), use_cache=True).past_key_values
    assert len(cache.layers) == CONFIG.num_layers
    assert all(layer.keys.shape == layer.values.shape == (3, 2, 18, 8) for layer in cache.layers)


def test_beams(model):
    """The score of the best of four beams is that of its tokens in one full pass."""
    inputs, new = batch(PROMPTS[:2]), 12
    out = model.generate(
        **inputs,
        max_new_tokens=new,
        num_beams=4,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, new, dtype=torch.long)], dim=1)
    with torch.no_grad():
        log_probs = model(out.sequences, attention_mask=mask).logits.log_softmax(-1)[:, -new - 1 : -1]
    chosen = log_probs.gather(-1, out.sequences[:, -new:, None])[..., 0]
    np.testing.assert_allclose(out.sequences_scores, chosen.sum(-1), atol=1e-4)


def test_samples_follow_the_distribution(model):
    """20,000 draws of one next token: each frequency within five standard deviations of its probability."""
    ids = torch.tensor(np.concatenate([[BOS], PROMPTS[0]]))[None]
    with torch.no_grad():
        probs = model(ids).logits[0, -1].softmax(-1).numpy()
    torch.manual_seed(0)
    draws = 20_000
    sampled = model.generate(
        ids, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=draws, pad_token_id=0
    )[:, -1]
    frequency = np.bincount(sampled, minlength=101) / draws
    assert (np.abs(frequency - probs) <= 5 * np.sqrt(probs * (1 - probs) / draws)).all()


def test_sampling_options_are_not_those_of_the_router(model):
    """`top_k` in a model's configuration would become `generate`'s: the router's k has a name of its own."""
    assert model.config.router_top_k == 2
    fresh = transformers.GenerationConfig.from_model_config(model.config)
    assert fresh.top_k == transformers.GenerationConfig().top_k


def test_attention_maps_are_refused(model):
    """In forward, in `generate`, and asked for in the configuration."""
    ids = torch.ones(1, 3, dtype=torch.long)
    message = "output_attentions=True is refused: each token attends with heads of its own choice"
    with pytest.raises(ValueError, match=message):
        model(ids, output_attentions=True)
    eager = torch_folder.load(CONFIG, attn_implementation="eager")
    with pytest.raises(ValueError, match=message):
        eager.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    eager.config.output_attentions = True
    with pytest.raises(ValueError, match=message):
        eager(ids)


def test_keywords_that_no_one_reads_are_refused(model):
    """A newer transformers once passed the cache under another name, which was swallowed: the text was another, and
    nothing said so."""
    ids = torch.ones(1, 3, dtype=torch.long)
    for part in (model, model.model):
        with pytest.raises(TypeError, match=r"does not know the keyword cache_params, is_causal: leave it out"):
            part(ids, cache_params=None, is_causal=False)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="give one of past_key_values and cache"):
        model(ids, past_key_values=cache, cache=cache)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_has_two_names(model, name):
    """transformers calls it `cache` from 5.24 on; either continues the sequence as one full pass does."""
    ids = torch.tensor(PROMPTS[1])[None]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :9], use_cache=True).past_key_values
        rest = model(ids[:, 9:], **{name: cache}).logits
    np.testing.assert_allclose(rest, whole[:, 9:], atol=1e-5)


def test_pipeline(tmp_path):
    """The text-generation pipeline gives what `generate` and the tokenizer give."""
    folder = torch_folder.write_folder(torch_folder.make_model(model_config(vocab_size=300)), tmp_path / "model")
    for name, content in tokenizer_files(ByteTokenizer(), 256).items():
        (folder / name).write_bytes(content)
    model, tokenizer = torch_folder.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipe("A router", max_new_tokens=8, do_sample=False)
    tokens = greedy(model, tokenizer("A router", return_tensors="pt"), 8)
    assert found["generated_text"] == "A router" + tokenizer.decode(tokens[0], skip_special_tokens=True)


def test_decoding_is_one_graph(model):
    """With the static cache, `generate` compiles the decoding step: traced in one graph (no code generated, which takes
    long on a CPU), it gives the same tokens."""
    compile_config = transformers.CompileConfig(fullgraph=True, dynamic=None, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True  # else on accelerators only
    static = greedy(model, batch(), 12, cache_implementation="static", compile_config=compile_config)
    np.testing.assert_array_equal(static, greedy(model, batch(), 12))


@pytest.mark.slow
def test_torch_compile():
    """The forward pass as code that torch.compile generated, in one graph, gives the logits of eager execution."""
    model = torch_folder.load(model_config(GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8), num_layers=1))
    inputs = batch()
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        got = torch.compile(model, fullgraph=True)(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def test_dense_models_generate_too():
    config = model_config(GQAConfig(num_query_heads=4, num_kv_heads=1, head_dim=8))
    want = Generator(torch_folder.make_model(config), eos_id=BOS).generate(PROMPTS, max_new_tokens=20, stop_tokens=())
    np.testing.assert_array_equal(greedy(torch_folder.load(config), batch(), 20), np.stack(want))
