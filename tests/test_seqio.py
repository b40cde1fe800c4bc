"""seqio tasks and mixtures as prepared data. Needs seqio, which has an environment of its own: `make test-seqio`."""

import argparse
import gzip
import json
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

seqio = pytest.importorskip("seqio")

import pyarrow as pa
import pyarrow.parquet as pq

from gqe_jax.attention import GQAConfig
from gqe_jax.cli import prepare as prepare_cli
from gqe_jax.cli import preparing as preparing_cli
from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.manifest import Manifest, prepared_tokenizer, verify
from gqe_jax.data.reading.pipeline import PreparedRows, train_batches
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.data.sources import seqio_source, seqio_tasks
from gqe_jax.data.tokenizer import ByteTokenizer, train_sentencepiece

ATTENTION = GQAConfig(num_query_heads=1, num_kv_heads=1)  # of a model that is never built

SEQ_LEN = 64
MODULE = "tasks_of_the_tests"
TEXTS = [f"line {i}: the quick brown fox, é " + "jumps " * (i % 11) for i in range(120)]

TASKS = """
    import os, functools
    import seqio, tensorflow as tf

    FOLDER = os.environ["TASKS_OF_THE_TESTS"]
    vocabulary = seqio.SentencePieceVocabulary(f"{FOLDER}/spm.model", extra_ids=3)

    def add(name, splits, vocabulary=vocabulary, extra=(), **feature):
        preprocessors = [
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            *extra,
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ]
        paths = {split: f"{FOLDER}/{pattern}" for split, pattern in splits.items()}
        source = seqio.FileDataSource(lambda path: tf.data.TextLineDataset(path).map(lambda x: {"text": x}), paths)
        features = {"targets": seqio.Feature(vocabulary, add_eos=True, **feature)}
        seqio.TaskRegistry.add(name, source, preprocessors=preprocessors, output_features=features)

    @seqio.map_over_dataset
    def shout(example):
        return {"targets": tf.strings.upper(example["targets"], encoding="utf-8")}

    add("short", {"train": "short-*.txt"})
    add("long", {"train": "long.txt", "validation": "held.txt"}, extra=[shout])
    add("by_bytes", {"train": "long.txt"}, vocabulary=seqio.ByteVocabulary())
    add("odd", {"train": "long.txt"}, vocabulary=seqio.UnigramVocabulary(["a", "b"]), rank=0)
    add("untrained", {"validation": "held.txt"})
    seqio.MixtureRegistry.add("both", [("short", 3.0), ("long", 1.0)])
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A user's module of tasks over small files: a task of two shards, one with a validation split, a mixture 3:1."""
    folder = tmp_path_factory.mktemp("tasks")
    train_sentencepiece(TEXTS, 300, folder / "spm.model")
    (folder / "short-0.txt").write_text("\n".join(TEXTS[:30]))
    (folder / "short-1.txt").write_text("\n".join(TEXTS[30:60]) + "\n\n")  # its last line is empty
    (folder / "long.txt").write_text("\n".join(" ".join(TEXTS[i : i + 7]) for i in range(60, 110)))
    (folder / "held.txt").write_text("\n".join(TEXTS[110:]))
    (folder / f"{MODULE}.py").write_text(textwrap.dedent(TASKS))
    os.environ["TASKS_OF_THE_TESTS"] = str(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])  # of worker processes
    sys.path.insert(0, str(folder))
    seqio_source.import_seqio([MODULE])
    return folder


def gqe_prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    return prepare_cli.run(parser.parse_args(["--import", MODULE, *map(str, arguments)]))


def seqio_examples(name: str, split: str) -> list[tuple[int, ...]]:
    """The tokens of every example that seqio gives for the split, as it is documented to be read."""
    dataset = seqio.get_mixture_or_task(name).get_dataset(None, split, shuffle=False)
    return [tuple(example["targets"].tolist()) for example in dataset.as_numpy_iterator()]


def prepared_examples(directory: Path, split: str, eos_id: int) -> list[tuple[int, ...]]:
    """The documents of a split, read back from its rows, each with its eos."""
    rows = PreparedRows(directory, split)
    batch = rows.read(range(len(rows)))
    targets = batch["targets"][batch["mask"]]
    documents = np.split(targets, np.flatnonzero(targets == eos_id) + 1)[:-1]
    return [tuple(document.tolist()) for document in documents]


def test_a_mixture_has_the_examples_of_its_tasks(tasks, tmp_path, capsys):
    """Every example of seqio's own tasks, preprocessed and tokenised by seqio, once; splits as the tasks have them.

    An example without text (an empty line) is nothing but its eos, and is left out and counted.
    """
    out = tmp_path / "both"
    assert gqe_prepare("--seqio-mixture", "both", "--out", out, "--seq-len", SEQ_LEN, "--workers", 2) == 0
    assert "75.0000% of the examples" in capsys.readouterr().out
    for name in ("short", "long"):
        manifest = verify(out / name)
        tokenizer = prepared_tokenizer(out / name)
        splits = ("train", "heldout") if name == "short" else ("train",)
        found = [example for split in splits for example in prepared_examples(out / name, split, tokenizer.eos_id)]
        expected = [example for example in seqio_examples(name, "train") if len(example) > 1]
        assert Counter(found) == Counter(expected)
        assert manifest.empty_documents == (1 if name == "short" else 0)
    held = prepared_examples(out / "long", "heldout", tokenizer.eos_id)
    assert held == seqio_examples("long", "validation")
    assert Manifest.load(out / "long").split_rule == "source"
    text = tokenizer.decode(held[0])
    assert text == text.upper() and text.startswith("LINE 110")


def test_rates_match_seqios(tasks, tmp_path):
    """Documents of the tasks in our stream of rows occur at seqio's rates of examples, by a chi-square test at 1e-3.

    Beside it the same test of seqio's own sampling, so that the bound is known to be one that seqio passes. The
    documents of `long` have seven times the tokens, so mixing rows at the rates of examples would fail.
    """
    out = tmp_path / "both"
    gqe_prepare("--seqio-mixture", "both", "--out", out, "--seq-len", SEQ_LEN, "--workers", 1)
    data = open_data(DataConfig(path=str(out)), ModelConfig(attention=ATTENTION, context=SEQ_LEN, vocab_size=1000))
    with train_batches(data, batch_size=64, seed=0) as batches:
        targets = np.concatenate([next(batches)["targets"] for _ in range(30)])
    # A document of `long` is upper case: each row holds documents of one task.
    tokenizer = data.tokenizer
    is_long = np.array([tokenizer.decode(row).isupper() for row in targets])
    ends = (targets == tokenizer.eos_id).sum(1)
    empty = Manifest.load(out / "short").empty_documents / Manifest.load(out / "short").train.documents
    ours = np.array([ends[~is_long].sum() * (1 + empty), ends[is_long].sum()])
    mixture = seqio.MixtureRegistry.get("both").get_dataset(None, "train", shuffle=False, seed=0, num_epochs=None)
    sampled = [tokenizer.decode(example["targets"]).isupper() for example in mixture.take(2000).as_numpy_iterator()]
    theirs = np.array([len(sampled) - sum(sampled), sum(sampled)])
    for counts in (ours, theirs):
        expected = counts.sum() * np.array([0.75, 0.25])
        assert ((counts - expected) ** 2 / expected).sum() < 10.83, (counts, expected)  # 1 degree of freedom, p = 1e-3


def test_vocabularies_become_tokenizers(tasks, tmp_path):
    """Ids, text and sizes are the vocabulary's own, extra ids included; the byte vocabulary is ByT5's."""
    tokenizer = seqio_source.corpus_tokenizer("short", [MODULE])
    vocabulary = seqio.TaskRegistry.get("short").output_features["targets"].vocabulary
    assert tokenizer.vocab_size == vocabulary.vocab_size == 303 and tokenizer.eos_id == vocabulary.eos_id
    for text in TEXTS[:20]:
        assert tokenizer.encode(text).tolist() == vocabulary.encode(text)
        assert tokenizer.decode(vocabulary.encode(text)) == text
    tokenizer = seqio_source.corpus_tokenizer("by_bytes", [MODULE])
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode(TEXTS[0]).tolist() == seqio.ByteVocabulary().encode(TEXTS[0])


def test_shipped_tasks_read_local_stand_ins(tasks, tmp_path, monkeypatch):
    """fineweb_edu and c4 over files with the Hub's paths and forms; local_text over files of one's own."""
    fineweb = tmp_path / "HuggingFaceFW/fineweb-edu/sample/100BT"
    fineweb.mkdir(parents=True)
    for i in range(2):
        table = pa.table({"text": TEXTS[i * 60 : i * 60 + 60], "score": np.zeros(60)})
        pq.write_table(table, fineweb / f"{i:03d}_00000.parquet")
    c4 = tmp_path / "allenai/c4/en"
    c4.mkdir(parents=True)
    for name, texts in (("train.00000-of-01024", TEXTS[:70]), ("validation.00000-of-00008", TEXTS[70:])):
        lines = "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
        (c4 / f"c4-{name}.json.gz").write_bytes(gzip.compress(lines.encode()))
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    monkeypatch.setenv("GQE_HUB_COPY", str(tmp_path))
    monkeypatch.setenv("GQE_LOCAL_TEXT", str(tmp_path / "*.txt"))
    for name in ("fineweb_edu", "c4", "local_text"):
        out = tmp_path / f"out_{name}"
        gqe_prepare("--seqio-task", name, "--out", out, "--seq-len", SEQ_LEN, "--heldout", 0.3, "--workers", 1)
        manifest = verify(out)
        found = [
            ByteTokenizer().decode(document)
            for split in ("train", "heldout")
            for document in prepared_examples(out, split, 1)
        ]
        assert sorted(found) == sorted(TEXTS)
        if name == "c4":
            assert (manifest.train.documents, manifest.heldout.documents) == (70, 50)
    assert Manifest.load(tmp_path / "out_fineweb_edu").source_files == 2


def test_files_are_fetched_from_the_hub_one_by_one(monkeypatch, tmp_path):
    """Without a copy the repository is listed, and a file is downloaded when its shard is read, no other."""
    import huggingface_hub

    class Listing:
        def glob(self, pattern):
            assert pattern == "datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet"
            return [f"datasets/HuggingFaceFW/fineweb-edu/sample/10BT/{i}.parquet" for i in (1, 0)]

    fetched = []

    def download(repository, name, repo_type):
        fetched.append((repository, name, repo_type))
        pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "file.parquet")
        return str(tmp_path / "file.parquet")

    monkeypatch.delenv("GQE_HUB_COPY", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Listing)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    source = seqio_tasks.HubFiles("HuggingFaceFW/fineweb-edu", {"train": "sample/10BT/*.parquet"})
    assert source.list_shards("train") == ["sample/10BT/0.parquet", "sample/10BT/1.parquet"]
    dataset = source.get_dataset("train", shuffle=False, shard_info=seqio.ShardInfo(1, 2))
    assert [example["text"] for example in dataset.as_numpy_iterator()] == [b"one", b"two"]
    assert fetched == [("HuggingFaceFW/fineweb-edu", "sample/10BT/1.parquet", "dataset")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seqio-task", "shorter"], r"--seqio-task='shorter' is not registered \(did you mean 'short'\?\).*--import"),
        (["--seqio-mixture", "bot"], r"--seqio-mixture='bot' is not registered \(did you mean 'both'\?\)"),
        (["--seqio-mixture", "short"], r"it is a task: use --seqio-task"),
        (["--seqio-task", "odd"], r"has the vocabulary UnigramVocabulary, and what can be used .*--tokenizer"),
        (["--seqio-task", "untrained"], r"has no split 'train', only validation"),
        (["--seqio-task", "short", "--column", "target"], r"no feature 'target' \(did you mean 'targets'\?\)"),
        (["--seqio-task", "short", "--tokenizer", "bytes"], r"a vocabulary of its own \(sentencepiece\): leave out"),
        (["--seqio-task", "short", "--import", "no_such_module"], r"--import=no_such_module cannot be imported: give"),
    ],
)
def test_what_cannot_be_prepared(tasks, tmp_path, arguments, message):
    """Each message names what was given, what there is, and the remedy; nothing is written."""
    with pytest.raises(ConfigError, match=message):
        gqe_prepare(*arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_goes_on_with_finished_tasks(tasks, tmp_path, monkeypatch):
    """Stopped in the second task, the same command keeps the first; finished, it is not overwritten."""
    out = tmp_path / "both"
    command = ("--seqio-mixture", "both", "--out", out, "--seq-len", SEQ_LEN, "--workers", 1)
    prepare, made = preparing_cli.prepare, []

    def failing(corpus, folder, **settings):
        made.append(corpus.description)
        if len(made) == 2:
            raise OSError("no space left on device")
        return prepare(corpus, folder, **settings)

    monkeypatch.setattr(preparing_cli, "prepare", failing)
    with pytest.raises(OSError, match="no space"):
        gqe_prepare(*command)
    assert not (out / "mixture.json").exists()
    gqe_prepare(*command)
    assert made == ["seqio task long", "seqio task short", "seqio task short"]
    with pytest.raises(ConfigError, match=r"both' exists and is not empty"):
        gqe_prepare(*command)
