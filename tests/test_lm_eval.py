"""lm-eval's interface to a model: against full logits in NumPy, and against lm-eval's own backend for PyTorch."""

import random

import numpy as np
import pytest
import tiny
from converted import write_run
from flax import nnx
from tiny_run import quick_compiles

from gqe_jax.attention import GQAConfig, GQEConfig
from gqe_jax.config import ConfigError
from gqe_jax.data.tokenizer import ByteTokenizer
from gqe_jax.pytorch.exporting import export_hf
from gqe_jax.runs.load import load_model
from gqe_jax.runs.saved_model import open_model

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from gqe_jax.evaluate.lm_eval_model import JaxLM, padded_length

CONTEXT = 80
EOS = ByteTokenizer.eos_id
ATTENTION = {
    "gqe": GQEConfig(num_query_experts=4, num_kv_heads=2, head_dim=8),
    "gqa": GQAConfig(num_query_heads=4, num_kv_heads=2, head_dim=8),
}


@pytest.fixture(scope="module", params=ATTENTION)
def run(request, tmp_path_factory):
    """The directory of a run of random weights, whose context is shorter than some of the requests below."""
    directory = tmp_path_factory.mktemp(request.param)
    with quick_compiles(directory / "compiled"):
        write_run(directory / "run", ATTENTION[request.param], context=CONTEXT)
        yield directory / "run"


@pytest.fixture(scope="module")
def trained(run):
    return load_model(run)


@pytest.fixture(scope="module")
def lm(trained):
    """One for all tests: what it has compiled is used again."""
    return JaxLM(trained, batch_size=3)


@pytest.fixture(scope="module")
def log_softmax(trained):
    """Token ids → float64 [S, V], log-probabilities of what follows each, by a pass of its own over all of them.

    What stands behind a token has no influence on it, so one length, filled up, serves all.
    """
    graphdef, state = nnx.split(trained.model)
    forward = tiny.jit(lambda state, ids: (model := nnx.merge(graphdef, state)).logits(model(ids)[0]))

    def function(ids):
        filled = np.zeros((1, CONTEXT), np.int32)
        filled[0, : len(ids)] = ids
        logits = np.asarray(forward(state, filled))[0, : len(ids)].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    return function


def ids(text):
    return [byte + 3 for byte in text.encode()]


def text(rng, length):
    """Words, since trailing spaces have a rule of their own."""
    letters = "abcdefgh é"
    return "".join(rng.choice(letters) for _ in range(length)).strip() or "a"


def requests(kind, arguments):
    return [Instance(kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def pairs(seed=0):
    """(context, continuation) of every length, with the edges: none, a space at the end, too long for the model."""
    rng = random.Random(seed)
    several = [(text(rng, rng.randint(1, 50)), " " + text(rng, rng.randint(1, 30))) for _ in range(8)]
    edges = [("", "abc"), ("abc ", "def"), ("a", "b"), (text(rng, 200), " " + text(rng, 20))]
    return several + edges + [("abc", "x" * (CONTEXT - 1)), ("abc", "x" * CONTEXT), ("", "y" * CONTEXT)]


def test_log_likelihoods_of_continuations(lm, log_softmax):
    """Σ log p(token | eos, context, continuation so far) over the continuation, whatever shares its batch.

    A context that does not fit loses its beginning, so that the last token of all is predicted from `CONTEXT` tokens.
    """
    got = lm.loglikelihood(requests("loglikelihood", pairs()), disable_tqdm=True)
    for (context, continuation), (loglikelihood, is_greedy) in zip(pairs(), got, strict=True):
        tokens = [EOS, *ids(context), *ids(continuation)][-(CONTEXT + 1) :]
        count = len(ids(continuation)) + (context[-1:] == " ")
        expected = log_softmax(tokens[:-1])[-count:]
        np.testing.assert_allclose(loglikelihood, expected[np.arange(count), tokens[-count:]].sum(), atol=1e-4)
        assert is_greedy == (expected.argmax(axis=-1) == tokens[-count:]).all()


def test_greedy_continuations_are_known(lm, log_softmax):
    """What argmax gives token by token is greedy, and with another last token it is not."""
    tokens = [EOS, *ids("abc")]
    for _ in range(5):
        tokens.append(int(log_softmax(tokens)[-1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 300]
    got = lm._loglikelihood_tokens([(("", ""), row[:4], row[4:]) for row in (tokens, other)], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in got] == [True, False]
    assert lm._loglikelihood_tokens([(("", ""), tokens, [])], disable_tqdm=True) == [(0.0, True)]


@pytest.mark.parametrize("length", [0, 1, CONTEXT, CONTEXT + 1, 3 * CONTEXT - 5])
def test_rolling_predicts_each_token_once(lm, log_softmax, length):
    """From eos on; where the text is longer than the context, in windows of which the last is as full as the others."""
    string = text(random.Random(length), length)[:length] if length else ""
    tokens = [EOS, *ids(string)]
    total, done = 0.0, 0
    while done < len(tokens) - 1:
        end = min(done + CONTEXT, len(tokens) - 1)
        window = tokens[max(0, end - CONTEXT) : end]
        count = end - done
        total += log_softmax(window)[-count:][np.arange(count), tokens[done + 1 : end + 1]].sum()
        done = end
    (got,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(string,)]), disable_tqdm=True)
    np.testing.assert_allclose(got, total, atol=2e-4)
    if string:
        ((same, _),) = lm.loglikelihood(requests("loglikelihood", [("", string)]), disable_tqdm=True)
        np.testing.assert_allclose(same, total, atol=2e-4)


def test_few_shapes_are_compiled(lm):
    """One compilation for each padded length, of which there are few, at whatever lengths the requests have."""
    lengths = {padded_length(length, CONTEXT) for length in range(1, CONTEXT + 1)}
    assert lengths == {32, 48, 64, CONTEXT}
    assert all(length <= padded_length(length, 10**9) <= max(32, 1.5 * length) for length in range(1, 5000))
    for seed in (1, 2):
        lm.loglikelihood(requests("loglikelihood", pairs(seed)), disable_tqdm=True)
    assert lm._score._cache_size() <= len(lengths)


def test_generation_stops_where_the_task_says(lm, log_softmax):
    """Greedy tokens of full passes without a cache, up to a stop string, eos or the number of tokens."""
    contexts = ["abc", "hello he", "x" * 100]
    options = {"until": ["\x00"], "max_gen_toks": 12, "do_sample": False}
    whole = []
    for context in contexts:
        tokens = [EOS, *ids(context)[-(CONTEXT - 12 - 1) :]]
        start = len(tokens)
        while len(tokens) < start + 12 and tokens[-1:] != [EOS] * (len(tokens) > start):
            tokens.append(int(log_softmax(tokens)[-1].argmax()))
        whole.append(ByteTokenizer().decode(tokens[start:]))
    got = lm.generate_until(requests("generate_until", [(c, options) for c in contexts]), disable_tqdm=True)
    assert got == [string.split("\x00")[0] for string in whole]
    stop = whole[0][1:3]
    options = options | {"until": [stop]}
    got = lm.generate_until(requests("generate_until", [(c, options) for c in contexts]), disable_tqdm=True)
    assert got == [string.split(stop)[0] for string in whole]


def test_generation_that_cannot_be(lm):
    """Options that are not known are not left out in silence, and a context needs room."""
    with pytest.raises(ConfigError, match=r"option\(s\) num_beams, which gqe_jax does not have"):
        lm.generate_until(requests("generate_until", [("a", {"until": ["."], "num_beams": 4})]), disable_tqdm=True)
    with pytest.raises(ConfigError, match=r"max_gen_toks=256 tokens, which leaves no room .* context of 80"):
        lm.generate_until(requests("generate_until", [("a", {"until": ["."]})]), disable_tqdm=True)


def test_a_tokenizer_larger_than_the_model(tmp_path):
    """Ids without an embedding would be read as some other token's."""
    write_run(tmp_path / "run", vocab_size=200)
    with pytest.raises(ConfigError, match=r"tokenizer has 259 tokens, but model\.vocab_size=200"):
        JaxLM(load_model(tmp_path / "run"))


def test_pytorch_backend_gives_the_same(run, lm, tmp_path):
    """The exported folder, scored by lm-eval's own backend: continuations at every edge, whole texts, generation."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    export_hf(open_model(run), tmp_path / "out")
    options = {"pretrained": str(tmp_path / "out"), "trust_remote_code": True, "device": "cpu", "dtype": "float32"}
    theirs = HFLM(**options, batch_size=4)
    compared = requests("loglikelihood", pairs())
    for (ours, our_greedy), (other, other_greedy) in zip(
        lm.loglikelihood(compared, disable_tqdm=True), theirs.loglikelihood(compared, disable_tqdm=True), strict=True
    ):
        assert abs(ours - other) < 1e-3 and our_greedy == other_greedy

    generated = requests("generate_until", [(c, {"until": ["q"], "max_gen_toks": 9}) for c in ("abc", "hello")])
    assert lm.generate_until(generated, disable_tqdm=True) == theirs.generate_until(generated, disable_tqdm=True)

    # Of whole texts that backend predicts the eos too which its tokenizer puts in front, unless told not to put it.
    theirs = HFLM(**options, batch_size=4, add_bos_token=False)
    whole = requests("loglikelihood_rolling", [("abc",), (text(random.Random(7), 200),)])
    np.testing.assert_allclose(
        lm.loglikelihood_rolling(whole, disable_tqdm=True),
        theirs.loglikelihood_rolling(whole, disable_tqdm=True),
        atol=1e-3,
    )
