"""Tokenizers: text comes back, streams agree with whole decoding, and what cannot be used is refused with a remedy."""

import inspect
import json
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqe_jax.config import ConfigError
from gqe_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    tokenizer_from_files,
    train_sentencepiece,
)

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "  indented code:\n\tif x == y:\n\t\treturn [x for x in range(10)]",
    "naïve café, 漢字 and кириллица; emoji 😀 and 👩‍👩‍👧",
] * 20
TRAINING_TEXTS = [*SENTENCES, inspect.getsource(textwrap)]
ODD_TEXTS = ["", " ", "\n", "\r\n\r", "\x00\x01", "a  b   c ", " leading", "😀", "\ufffd", "</s><pad><unk>", "a\u2028b"]

# Without surrogates (no text) and without U+2581, SentencePiece's own sign for a space.
any_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory):
    return train_sentencepiece(TRAINING_TEXTS, 400, tmp_path_factory.mktemp("spm") / "small.model")


def byte_level_bpe() -> str:
    """A GPT-2-like tokenizer.json (byte-level BPE), trained on the sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def byte_fallback_bpe() -> str:
    """A Llama-like tokenizer.json: pieces with U+2581 for spaces, bytes for all other characters."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a"]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i in (0, 1)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": ["\u2581 a"],
        },
    }
    return json.dumps(definition)


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "byte-level", "byte-fallback"])
def tokenizer(request, sentencepiece_tokenizer):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "sentencepiece":
        return sentencepiece_tokenizer
    definition = byte_level_bpe() if request.param == "byte-level" else byte_fallback_bpe()
    return HuggingFaceTokenizer(definition.encode())


@given(data=st.data())
def test_round_trip(tokenizer, data):
    """All four alphabets reach every byte, so any text comes back, white space and special tokens' names included."""
    text = data.draw(any_text | st.sampled_from(ODD_TEXTS + SENTENCES[:3]))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids and tokenizer.pad_id not in ids


@given(data=st.data())
def test_stream_equals_decode(tokenizer, data):
    """What a stream gives out is never taken back: its pieces concatenate to the decoding of all ids at once.

    Any ids, also those of no text: characters broken off in the middle, special tokens between bytes.
    """
    vocabulary = st.integers(0, tokenizer.vocab_size - 1)
    words = st.sampled_from(SENTENCES[:3] + ODD_TEXTS).map(lambda text: tokenizer.encode(text).tolist())
    pieces = st.lists(st.lists(vocabulary, max_size=4) | words, max_size=6)
    ids = [i for piece in data.draw(pieces) for i in piece]
    stream = tokenizer.stream()
    for _ in range(2):  # a flushed stream starts anew
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


def test_stream_does_not_wait(tokenizer):
    """Text is given out as soon as its characters are complete: of ASCII text, nothing is held back at any point."""
    ids = tokenizer.encode("a b a")
    stream = tokenizer.stream()
    text = ""
    for n, token_id in enumerate(ids, start=1):
        text += stream.push(token_id)
        assert text == tokenizer.decode(ids[:n])
    assert text == "a b a"


def test_files_carry_the_tokenizer(tokenizer):
    """A checkpoint stores `files()`: the tokenizer made from them is the same in ids, sizes and digest."""
    again = tokenizer_from_files(tokenizer.files())
    assert again.digest == tokenizer.digest and len(again.digest) == 64
    for name in ("name", "vocab_size", "eos_id", "pad_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    for text in SENTENCES[:3]:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_byte_ids_are_byt5s():
    """ByT5: pad 0, eos 1, unk 2, byte b is b + 3. All 256 bytes, and ids beyond them, decode as UTF-8 with U+FFFD."""
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 259)
    assert tokenizer.encode("Aé").tolist() == [65 + 3, 0xC3 + 3, 0xA9 + 3]
    every_byte = bytes(range(256))
    ids = [0, 1, 2, *(byte + 3 for byte in every_byte), 259, 383]
    assert tokenizer.decode(ids) == every_byte.decode("utf-8", errors="replace")
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids)


def test_trained_sentencepiece_is_deterministic(sentencepiece_tokenizer, tmp_path):
    """The same documents give the same bytes, so a prepared data set can be made again."""
    again = train_sentencepiece(TRAINING_TEXTS, 400, tmp_path / "again.model")
    assert again.digest == sentencepiece_tokenizer.digest
    assert (again.pad_id, again.eos_id, again.vocab_size) == (0, 1, 400)
    assert load_tokenizer(tmp_path / "again.model").digest == again.digest
    assert len(again.encode(SENTENCES[0])) < 0.8 * len(SENTENCES[0])  # it has learned pieces


def test_tokenizer_json_with_its_config(tmp_path):
    """tokenizer_config.json beside tokenizer.json says which tokens end a document and pad, as string or object."""
    definition = json.loads(byte_level_bpe())
    definition["added_tokens"][0]["content"] = "<|stop|>"
    definition["model"]["vocab"] = {
        ("<|stop|>" if piece == "<|endoftext|>" else piece): i for piece, i in definition["model"]["vocab"].items()
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    with pytest.raises(ConfigError, match=r"names no end-of-document token .*put a tokenizer_config.json"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|stop|>"}}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == definition["model"]["vocab"]["<|stop|>"] == tokenizer.pad_id
    assert tokenizer_from_files(tokenizer.files()).eos_id == tokenizer.eos_id


def test_unusable_tokenizers(tmp_path, sentencepiece_tokenizer):
    """Each message names the file, what is wrong and what to give instead."""
    import sentencepiece

    with pytest.raises(ConfigError, match=r"tokenizer='nowhere.model' is neither 'bytes' nor an existing file"):
        load_tokenizer("nowhere.model")
    odd = tmp_path / "vocab.txt"
    odd.write_text("a b")
    with pytest.raises(ConfigError, match=r"has the suffix '.txt', which says nothing about its kind"):
        load_tokenizer(odd)
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"broken.model cannot be read as a SentencePiece model: give the .model"):
        load_tokenizer(broken)
    broken.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"broken.model cannot be read as a SentencePiece model, for it is empty: gi"):
        load_tokenizer(broken)
    broken_json = tmp_path / "broken.json"
    broken_json.write_text("{")
    with pytest.raises(ConfigError, match=r"broken.json cannot be read as a Hugging Face tokenizer.json"):
        load_tokenizer(broken_json)
    no_eos = str(tmp_path / "no_eos")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=no_eos, vocab_size=60, eos_id=-1, minloglevel=2
    )
    with pytest.raises(ConfigError, match=r"no_eos.model has no end-of-sequence piece \(eos_id=-1\).*train it with"):
        load_tokenizer(f"{no_eos}.model")
    with pytest.raises(ConfigError, match=r"vocab_size=5000 does not fit this text .*choose another size"):
        train_sentencepiece(SENTENCES, 5000, tmp_path / "large.model")
    with pytest.raises(ConfigError, match="vocab_size=100 does not fit this text"):
        train_sentencepiece(SENTENCES, 100, tmp_path / "small.model")
    with pytest.raises(ConfigError, match=r"no tokenizer among the files \['a.txt'\]"):
        tokenizer_from_files({"a.txt": b""})
    with pytest.raises(ConfigError, match="describes another byte tokenizer"):
        tokenizer_from_files({"bytes.json": b"{}"})


@pytest.mark.parametrize("module", ["sentencepiece", "tokenizers"])
def test_missing_package_names_the_extra(module, monkeypatch, sentencepiece_tokenizer):
    """The libraries are an extra: without them the message says what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {module}.*pip install 'gqe_jax\[tokenizers\]'"):
        if module == "sentencepiece":
            SentencePieceTokenizer(sentencepiece_tokenizer.files()["sentencepiece.model"])
        else:
            HuggingFaceTokenizer(b"{}")
