"""Exported tokenizers: transformers gives our encoder's ids on real text, and an import restores the very tokenizer."""

import argparse
import inspect
import io
import json
import textwrap

import pytest
import torch_folder  # noqa: F401 (keeps transformers off the network: before transformers)

from gqe_jax.config import ConfigError
from gqe_jax.data.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    train_sentencepiece,
)
from gqe_jax.pytorch.hf_tokenizer import read_tokenizer, start_token, tokenizer_files

# Real text that every machine has. Longer documents may differ: SentencePiece sums their scores in float32, and takes
# another of two nearly equal ways to cut a word.
DOCUMENTS = [inspect.getsource(module)[:5000] for module in (argparse, inspect, json, textwrap)]
TRAINING = [line for document in DOCUMENTS for line in document.splitlines() if line] + ["voilà, né à Zürich"] * 9
ODD = ["", " ", "two  spaces ", "\ttab\n\n\nnew", "é ü 漢字 🙂 x", "<0x41>", "a\u0301 ﬁ ½", " lead", "x" * 300]
TEXTS = DOCUMENTS + TRAINING + ODD
NAMES = ["a</s> b", "<unk><pad>", "</s>"]  # of special tokens: here they are text, and so they are where we define them


def sentencepiece_model(**options):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    return SentencePieceTokenizer(model.getvalue())


def huggingface():
    """A byte-level BPE with a few merges, whose pad is another token than its end."""
    definition = json.loads(tokenizer_files(ByteTokenizer(), 64)["tokenizer.json"])
    model = definition["model"]
    for pair in (["e", "l"], ["s", "el"], ["sel", "f"], ["Ġ", "Ġ"]):
        model["vocab"]["".join(pair)] = len(model["vocab"])
        model["merges"].append(pair)
    return HuggingFaceTokenizer(json.dumps(definition).encode(), b'{"eos_token": "</s>", "pad_token": "<pad>"}')


KINDS = {
    "bytes": lambda folder: ByteTokenizer(),
    "ours": lambda folder: train_sentencepiece(TRAINING, 500, folder / "x.model"),
    "unigram with normalisation": lambda folder: sentencepiece_model(vocab_size=300, pad_id=3, character_coverage=1.0),
    "unigram without a prefix": lambda folder: sentencepiece_model(
        vocab_size=600, add_dummy_prefix=False, byte_fallback=True, user_defined_symbols=["self", "__"]
    ),
    "bpe": lambda folder: sentencepiece_model(vocab_size=600, model_type="bpe", byte_fallback=True, eos_id=1, bos_id=2,
                                              unk_id=0),
    "huggingface": lambda folder: huggingface(),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind, model_type",
    [(kind, "llama") for kind in KINDS]  # the type of the model may change which class transformers takes
    + [(kind, model_type) for kind in ("bytes", "ours") for model_type in ("gqe", "mistral", "qwen3")],
)
def test_transformers_gives_the_same_ids(tmp_path, kind, model_type):
    """Encoding, decoding and special tokens; where the definition is ours, a text begins with eos, as in training."""
    transformers = pytest.importorskip("transformers")
    ours = KINDS[kind](tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in tokenizer_files(ours, 64).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
    for text in TEXTS + (NAMES if kind != "huggingface" else []):
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
        unknown = theirs.unk_token_id in ids  # SentencePiece writes ⁇ for it
        assert unknown or theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
        assert theirs(text).input_ids == [ours.eos_id, *ids]
    assert set(theirs(text)) == {"input_ids", "attention_mask"}  # what `generate` takes


def with_template(single):
    """A byte-level tokenizer.json from elsewhere that puts tokens around a text: <s> is its bos, </s> its eos."""
    definition = json.loads(tokenizer_files(ByteTokenizer(), 64)["tokenizer.json"])
    definition["added_tokens"].append(definition["added_tokens"][0] | {"id": 259, "content": "<s>"})
    definition["model"]["vocab"]["<s>"] = 259
    if single is None:
        definition["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    else:
        tokens = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in (("<s>", 259), ("</s>", 1))}
        definition["post_processor"] |= {"single": single, "pair": single, "special_tokens": tokens}
    return HuggingFaceTokenizer(json.dumps(definition).encode(), b'{"eos_token": "</s>"}')


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BOS, EOS = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>"))
TEMPLATES = {
    "none": (None, 1),
    "bos": ([BOS, TEXT], 259),
    "bos and eos": ([BOS, TEXT, EOS], 259),
    "eos": ([TEXT, EOS], 1),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_begins_with_one_token(tmp_path, template):
    """With its own bos where a tokenizer.json has one, else with eos as in training; and nothing stands behind it."""
    transformers = pytest.importorskip("transformers")
    single, start = TEMPLATES[template]
    ours = with_template(single)
    assert start_token(ours) == start
    for name, content in tokenizer_files(ours, 64).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gqe"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode("a b").tolist()
    assert theirs("a b").input_ids == [start, *ids] and theirs("a b", add_special_tokens=False).input_ids == ids
    assert theirs.bos_token_id == start
    assert read_tokenizer(tmp_path).digest == ours.digest


@pytest.mark.parametrize("kind", KINDS)
def test_import_restores_the_tokenizer(tmp_path, kind):
    """The same digest: data that were prepared with it can still be trained on."""
    ours = KINDS[kind](tmp_path)
    (tmp_path / "out").mkdir()
    for name, content in tokenizer_files(ours, 64).items():
        (tmp_path / "out" / name).write_bytes(content)
    assert read_tokenizer(tmp_path / "out").digest == ours.digest


def test_tokenizers_of_other_folders(tmp_path):
    """A SentencePiece model under its usual names, and ByT5's, which is a class without a file."""
    with pytest.raises(ConfigError, match=r"has no tokenizer that can be read \(tokenizer\.json or tokenizer\.model"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert isinstance(read_tokenizer(tmp_path), ByteTokenizer)
    model = sentencepiece_model(vocab_size=300)
    (tmp_path / "tokenizer.model").write_bytes(model.files()["sentencepiece.model"])
    assert read_tokenizer(tmp_path).digest == model.digest


def test_a_model_of_another_type_is_refused():
    """SentencePiece's "word" and "char" models cut texts in ways that tokenizer.json cannot state."""
    with pytest.raises(ConfigError, match="SentencePiece model is of type 4, and only unigram and BPE models"):
        tokenizer_files(sentencepiece_model(vocab_size=60, model_type="char", hard_vocab_limit=False), 64)
