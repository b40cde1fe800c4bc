"""Prefill and cached decoding against the uncached model, sampling against NumPy, compilations counted."""

import argparse
import itertools
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqe_jax.attention import GQAConfig, GQEConfig
from gqe_jax.cli import generate as generate_cli
from gqe_jax.config import ConfigError, ModelConfig, RopeScaling
from gqe_jax.data.tokenizer import load_tokenizer
from gqe_jax.generate import Generator, Sampling, sample
from gqe_jax.models.transformer import Transformer

EOS = 1
VOCAB_SIZE = 37


def make_model(kind: str, context: int = 96, vocab_size: int = VOCAB_SIZE, dtype: str = "float32", **attention):
    if kind == "gqe":
        attention = GQEConfig(num_query_experts=8, num_kv_heads=2, top_k=2, head_dim=8, qk_norm=True, **attention)
    else:
        attention = GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8, **attention)
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=32,
        num_layers=2,
        d_ff=48,
        context=context,
        dtype=dtype,
        init_std=0.4,  # distributions far from uniform, so that rounding decides no argmax
        attention=attention,
    )
    return Transformer(config, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module", params=["gqe", "gqa"])
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="module")
def generator(model):
    """One for all tests: what it has compiled is used again."""
    return Generator(model, eos_id=EOS, capacity=model.config.context)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB_SIZE, length).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module")
def greedy_uncached(model):
    """Argmax after a full pass over [eos] + prompt + tokens so far, without a cache."""
    logits = jax.jit(lambda tokens: model.logits(model(tokens)[0]))

    def generate(prompt, count):
        tokens = [EOS, *prompt.tolist()]
        for _ in range(count):
            # Zeros behind: causality, tested elsewhere, keeps them from being seen, and one length compiles once.
            padded = np.zeros((1, model.config.context), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(np.argmax(np.asarray(logits(padded))[0, len(tokens) - 1])))
        return np.asarray(tokens[len(prompt) + 1 :])

    return generate


def test_greedy_equals_repeated_full_passes(generator, greedy_uncached):
    """The cache is an optimisation: the tokens are those of the uncached model, also where the prompt is empty."""
    for prompt in prompts(0, 1, 20, 31, 40):
        (got,) = generator.generate([prompt], max_new_tokens=16, stop_tokens=())
        np.testing.assert_array_equal(got, greedy_uncached(prompt, 16))


def test_up_to_the_last_token_of_the_context(generator, greedy_uncached):
    """With the eos before it, a prompt of n tokens leaves room for context - n new ones: the last one is never fed."""
    (prompt,) = prompts(70)
    (got,) = generator.generate([prompt], max_new_tokens=26, stop_tokens=())
    np.testing.assert_array_equal(got, greedy_uncached(prompt, 26))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0),
        pytest.param(Sampling(temperature=0.7, top_k=9, top_p=0.9, seed=5), marks=pytest.mark.slow),
    ],
)
def test_a_row_depends_on_no_other_row(generator, sampling):
    """Rows are padded to the longest, and draw by (seed, row, position): a row's tokens are those of a batch in which
    the others are other prompts of other lengths, in another bucket, and greedy ones those of the row alone."""
    rows = prompts(0, 50, 17)
    together = generator.generate(rows, max_new_tokens=12, sampling=sampling, stop_tokens=())
    for row, prompt in enumerate(rows):
        others = prompts(5, 9, 7, seed=1)
        others[row] = prompt
        again = generator.generate(others, max_new_tokens=12, sampling=sampling, stop_tokens=())
        np.testing.assert_array_equal(together[row], again[row])
    if sampling.temperature == 0:  # then the row's number is no part of it
        for row, prompt in enumerate(rows):
            (alone,) = generator.generate([prompt], max_new_tokens=12, stop_tokens=())
            np.testing.assert_array_equal(together[row], alone)


def test_bucket_does_not_reach_dynamic_rotary_scaling():
    """Dynamic scaling stretches by the longest position: a prompt within the original context, padded beyond it, must
    be rotated as if unscaled."""
    dynamic = RopeScaling(kind="dynamic", factor=4.0, original_context=20)
    (prompt,) = prompts(17)
    results = [
        Generator(model, eos_id=EOS).generate([prompt], max_new_tokens=2, stop_tokens=())
        for model in (make_model("gqa", rope_scaling=scaling) for scaling in (dynamic, RopeScaling()))
    ]
    np.testing.assert_array_equal(*results)


def test_cast_weights_leave_the_logits_alone():
    """Casting the matrices once is what the layers do at each use: the tokens are bitwise those of the model itself."""
    model = make_model("gqe", dtype="bfloat16")
    generator = Generator(model, eos_id=EOS)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(generator._params)}
    assert kinds == {"bfloat16", "float32"}
    tokens = jnp.asarray([[EOS, 5, 7, 30, 11]])
    model_logits = jax.jit(lambda model: model.logits(model(tokens)[0]))
    graphdef, _ = nnx.split(model)
    np.testing.assert_array_equal(model_logits(model), model_logits(nnx.merge(graphdef, generator._params)))


def test_stop_tokens(generator):
    """A row ends before its first stop token, the others go on."""
    rows = prompts(4, 9, 21)
    free = generator.generate(rows, max_new_tokens=24, stop_tokens=())
    assert all(len(row) == 24 for row in free)
    stops = [int(free[0][5]), int(free[1][9])]
    stopped = generator.generate(rows, max_new_tokens=24, stop_tokens=stops)
    for row, tokens in zip(stopped, free, strict=True):
        end = next((i for i, token in enumerate(tokens) if token in stops), 24)
        np.testing.assert_array_equal(row, tokens[:end])
    assert len(stopped[0]) <= 5


def test_eos_stops_by_default():
    """The greedy tokens are taken once with nothing to stop them: the default ends before the first eos among them."""
    model = make_model("gqa", implementation="reference")
    (prompt,) = prompts(4)
    for eos_id in range(3, VOCAB_SIZE):
        generator = Generator(model, eos_id=eos_id)
        (free,) = generator.generate([prompt], max_new_tokens=24, stop_tokens=())
        if eos_id in free:
            (stopped,) = generator.generate([prompt], max_new_tokens=24)
            np.testing.assert_array_equal(stopped, free[: free.tolist().index(eos_id)])
            return
    raise AssertionError("no token generated itself: choose another seed for the model")


def test_stream_gives_tokens_position_by_position(generator):
    """`stream` is `generate` in order of time: all rows' first tokens, then all rows' second ones."""
    rows = prompts(4, 9, 21)
    results = generator.generate(rows, max_new_tokens=5, stop_tokens=())
    expected = [(row, results[row][i]) for i in range(5) for row in range(3)]
    assert list(generator.stream(rows, max_new_tokens=5, stop_tokens=())) == expected


@pytest.mark.slow
def test_nothing_is_recompiled(monkeypatch):
    """Python code of the model runs only while it is traced: a generation of any number of tokens traces it twice
    (prefill, decode), and prompts of the same bucket and other sampling values not at all."""
    traces = itertools.count()
    call = Transformer.__call__

    def counted(*args, **kwargs):
        next(traces)
        return call(*args, **kwargs)

    monkeypatch.setattr(Transformer, "__call__", counted)
    model = make_model("gqa", implementation="reference")
    generator = Generator(model, eos_id=EOS)

    def count(lengths, max_new_tokens, sampling):
        before = next(traces)
        generator.generate(prompts(*lengths), max_new_tokens=max_new_tokens, sampling=sampling, stop_tokens=())
        return next(traces) - before - 1

    assert count([5], 20, Sampling(top_k=3)) == 2
    assert count([0], 3, Sampling(top_k=3)) == 0
    assert count([11], 21, Sampling(top_k=5, top_p=0.8, temperature=0.3, seed=9)) == 0
    assert count([20], 30, Sampling(top_k=3)) == 2  # the cache's next bucket
    assert count([40], 10, Sampling(top_p=0.1)) == 1  # the prompt's next bucket, in the same cache

    fixed = Generator(model, eos_id=EOS, capacity=64)
    before = next(traces)
    for length in (1, 20, 30):
        fixed.generate(prompts(length), max_new_tokens=64 - length, stop_tokens=())
    assert next(traces) - before - 1 == 2


def test_the_cache_is_donated():
    """Decoding writes into the cache it was given: no second cache is ever held."""
    generator = Generator(make_model("gqe"), eos_id=EOS)
    arrays = Sampling(temperature=0).arrays()
    tokens, lengths = np.full((1, 32), EOS, np.int32), np.asarray([3], np.int32)
    token, cache = generator._prefill(generator._params, tokens, lengths, arrays, capacity=64, method="greedy")
    generator._decode(generator._params, token, cache=cache, arrays=arrays, method="greedy")
    assert cache.k.is_deleted() and cache.v.is_deleted()


def numpy_support(logits, temperature, top_k, top_p):
    """The set of ids that may be drawn, by definition, in float64: ids by descending probability, ties by id."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))[: top_k or len(logits)]
    probabilities = np.exp(scaled[order] - scaled[order].max())
    probabilities /= probabilities.sum()
    size = 1
    while top_p is not None and size < len(order) and probabilities[:size].sum() < top_p:
        size += 1
    order = order[: len(order) if top_p is None else size]
    weights = np.exp(scaled[order] - scaled[order].max())
    result = np.zeros(len(logits))
    result[order] = weights / weights.sum()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 4},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 1e-6},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
        {"top_k": 3, "top_p": 1.0},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options):
    """Chi-square of 20,000 draws against the distribution computed by definition: nothing outside its support, and the
    statistic within 6 standard deviations of its mean (the number of degrees of freedom) inside it. The fourth and
    fifth logits are equal, so top_k=4 cuts a tie: the lower id stays."""
    logits = np.asarray([0.3, 2.0, -1.0, 0.9, 0.9, 1.4, -30.0, 0.1, 2.5, -0.5], np.float32)
    sampling = Sampling(**options)
    expected = numpy_support(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    draws = 20_000
    positions = jnp.arange(draws, dtype=jnp.int32)
    arrays, method = sampling.arrays(), sampling.method
    draw = jax.jit(jax.vmap(lambda position: sample(jnp.asarray(logits)[None], position[None], arrays, method)))
    counts = np.bincount(np.asarray(draw(positions))[:, 0], minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    likely = expected * draws > 5
    freedom = likely.sum() - 1
    chi_square = np.sum((counts[likely] - draws * expected[likely]) ** 2 / (draws * expected[likely]))
    assert chi_square <= freedom + 6 * np.sqrt(2 * freedom)
    assert (counts[likely] > 0).all()


def test_nucleus_is_the_smallest_set_that_reaches_p():
    """Probabilities 1/2, 1/4, 1/8, 1/8 are exact in float32: two tokens reach p = 3/4, a little more needs a third."""
    logits = jnp.log(jnp.asarray([[0.125, 0.5, 0.125, 0.25]]))
    for top_p, support in ((0.5, {1}), (0.7499, {1, 3}), (0.75, {1, 3}), (0.7501, {0, 1, 3}), (0.9, {0, 1, 2, 3})):
        sampling = Sampling(top_p=top_p)
        draw = jax.vmap(lambda position, s=sampling: sample(logits, position[None], s.arrays(), s.method))
        assert set(np.asarray(draw(jnp.arange(500)))[:, 0].tolist()) == support


def test_draws_of_rows_and_positions_are_unlike():
    """The key takes in seed, row and position: equal logits give different sequences for each."""
    logits = jnp.zeros((3, 50))

    def draws(seed):
        sampling = Sampling(seed=seed)
        return np.stack([sample(logits, jnp.full(3, i), sampling.arrays(), sampling.method) for i in range(40)])

    first = draws(0)
    for other in (first[:, [1, 2, 0]], np.roll(first, 1, axis=0), draws(1)):
        assert np.mean(first == other) < 0.1
    np.testing.assert_array_equal(first, draws(0))


def test_small_temperatures_neither_overflow_nor_vanish():
    """1e-5 divides differences of logits up to 1e7; 1e-50 is 0 in float32 and means greedy."""
    logits = jnp.asarray([[-300.0, 250.0, 249.0]])
    for temperature in (1e-5, 1e-50):
        sampling = Sampling(temperature=temperature, top_p=0.9)
        assert sample(logits, jnp.zeros(1, jnp.int32), sampling.arrays(), sampling.method).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number of at least 0: use 0 for the most likely"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"top_k": 0}, "top_k=0 must be at least 1: raise it, or leave it out"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]: choose a value in that range"),
        ({"top_p": 1.1}, "top_p=1.1 must lie in"),
        ({"seed": -1}, "seed=-1 must lie in"),
    ],
)
def test_sampling_errors(options, message):
    """Each names the field, its value, the rule and the remedy."""
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("lengths", "max_new_tokens", "capacity", "message"),
    [
        ([], 1, None, "prompts is empty: give at least one prompt"),
        ([3], 0, None, "max_new_tokens=0 must be at least 1: raise it"),
        (
            [700],
            1,
            None,
            "prompt has 700 tokens, but the model's context is 96 tokens, the new ones included: shorten the prompt to "
            "at most 95 tokens",
        ),
        ([3, 96], 1, None, "prompt 1 has 96 tokens, but the model's context is 96 tokens"),
        (
            [90],
            7,
            None,
            "max_new_tokens=7 behind a prompt of 90 tokens exceeds the model's context of 96 tokens: lower "
            "max_new_tokens to at most 6, or shorten the prompt",
        ),
        ([30], 7, 36, "max_new_tokens=7 behind a prompt of 30 tokens exceeds the generator's capacity of 36 tokens"),
        ([3], 1, 97, r"capacity=97 must lie in 1..96, the model's context: choose a value in that range, or None"),
    ],
)
def test_length_errors(lengths, max_new_tokens, capacity, message):
    """What does not fit is refused before anything is computed, by name, value, rule and remedy."""
    with pytest.raises(ConfigError, match=message):
        Generator(make_model("gqa"), eos_id=EOS, capacity=capacity).stream(
            prompts(*lengths), max_new_tokens=max_new_tokens
        )


def test_token_errors():
    """Ids that the embedding has no row for would silently read another row."""
    generator = Generator(make_model("gqa"), eos_id=EOS)
    message = "prompt holds the token id 37, but the model's vocab_size is 37: use the tokenizer that the model was"
    with pytest.raises(ConfigError, match=message):
        generator.generate([np.asarray([3, 37])], max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"prompt has shape .* must be a flat array of token ids"):
        generator.generate([np.zeros((1, 2), np.int32)], max_new_tokens=1)
    with pytest.raises(ConfigError, match="eos_id holds the token id 99"):
        Generator(make_model("gqa"), eos_id=99)


@pytest.fixture(scope="module")
def byte_model():
    return make_model("gqa", context=128, vocab_size=259, implementation="reference")


@pytest.fixture(scope="module")
def byte_generator(byte_model):
    return Generator(byte_model, eos_id=EOS)


class TestCommandLine:
    def run(self, model, *options):
        """`gqe generate`, but for the loading of the run's model."""
        parser = argparse.ArgumentParser()
        generate_cli.add_arguments(parser)
        trained = types.SimpleNamespace(model=model, tokenizer=load_tokenizer("bytes"))
        with mock.patch("gqe_jax.runs.load.load_model", lambda *_: trained):
            return generate_cli.run(parser.parse_args(["--run", "r", *options]))

    def expected(self, generator, *texts, count):
        tokenizer = load_tokenizer("bytes")
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=4)
        rows = generator.generate([tokenizer.encode(text) for text in texts], max_new_tokens=count, sampling=sampling)
        return [text + tokenizer.decode(row) for text, row in zip(texts, rows, strict=True)]

    def test_single_prompt(self, byte_model, byte_generator, capsys):
        """The prompt is echoed, and the streamed pieces make up the decoded whole; timings go to stderr."""
        assert self.run(byte_model, "--prompt", "def ", "--max-new-tokens", "40", "--seed", "4") == 0
        out, err = capsys.readouterr()
        assert [out] == [text + "\n" for text in self.expected(byte_generator, "def ", count=40)]
        assert "tokens/s" in err and "prefill of 5 tokens" in err and err.count("\n") == 1

    def test_several_prompts(self, byte_model, byte_generator, capsys):
        """Rows are computed together and printed one after another."""
        self.run(byte_model, "--prompt", "a", "--prompt", "bc", "--max-new-tokens", "20", "--seed", "4")
        first, second = self.expected(byte_generator, "a", "bc", count=20)
        assert capsys.readouterr().out == f"--- prompt 1 of 2\n{first}\n--- prompt 2 of 2\n{second}\n"

    def test_prompt_file(self, byte_model, capsys, tmp_path):
        """A file's text is the prompt; bytes that are no UTF-8 are replaced."""
        path = tmp_path / "prompt.txt"
        path.write_bytes(b"x\xff=")
        self.run(byte_model, "--prompt-file", str(path), "--max-new-tokens", "1")
        assert capsys.readouterr().out.startswith("x\ufffd=")
        with pytest.raises(ConfigError, match=r"--prompt-file '.*absent' cannot be read .*: give the path of a text"):
            self.run(byte_model, "--prompt-file", str(tmp_path / "absent"))

    def test_empty_prompt(self, byte_model, capsys):
        """Without a prompt a document is started."""
        self.run(byte_model, "--max-new-tokens", "3", "--temperature", "0")
        assert "prefill of 1 tokens" in capsys.readouterr().err
