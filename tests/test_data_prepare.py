"""Preparation: complete, deterministic, all or nothing; and what its manifest catches."""

import argparse
import bz2
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections import Counter

import numpy as np
import pytest
from read_back import all_files, texts_of

from gqe_jax.cli import prepare as prepare_cli
from gqe_jax.cli import preparing as preparing_cli
from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import Manifest, heldout_documents, prepared_tokenizer, verify
from gqe_jax.data.preparing import prepare as prepare_module
from gqe_jax.data.preparing import units as units_module
from gqe_jax.data.preparing.prepare import default_corpus_dir, prepare
from gqe_jax.data.reading.compressors import compression_baselines
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.sources.corpus import files_corpus, stdlib_corpus
from gqe_jax.data.tokenizer import ByteTokenizer, Tokenizer

BYTES = ByteTokenizer()
NUM_DOCUMENTS = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """JSON lines of made-up text: 300 documents, two of them empty."""
    path = tmp_path_factory.mktemp("corpus") / "made.jsonl"
    texts = [f"document {i}: " + "é" * (i * 7 % 50) + "\n" for i in range(NUM_DOCUMENTS)]
    texts[3] = texts[200] = ""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files_corpus([path])


@pytest.fixture
def prepared(corpus, tmp_path):
    out = tmp_path / "prepared"
    prepare(corpus, out, tokenizer=BYTES, seq_len=32, heldout_fraction=0.2)
    return out


def test_rows_hold_every_document_once(corpus, prepared):
    """Training and held-out rows together are the corpus; the counts in the manifest are those of the texts."""
    manifest = Manifest.load(prepared)
    texts = [document.text for document in corpus.documents() if document.text]
    train, heldout = texts_of(prepared, "train"), texts_of(prepared, "heldout")
    assert Counter(train) + Counter(heldout) == Counter(texts)
    assert not set(train) & set(heldout)
    assert 0.1 < len(heldout) / len(texts) < 0.3
    assert manifest.empty_documents == 2 and manifest.replaced == 0
    for found, split in ((train, manifest.train), (heldout, manifest.heldout)):
        assert split.documents == len(found)
        assert split.bytes == sum(len(text.encode()) for text in found)
        assert split.tokens == split.bytes + len(found)  # one eos for each
        assert split.rows == -(-split.tokens // 32)
    assert [document.text for document in heldout_documents(prepared)] == heldout
    assert verify(prepared) == manifest
    assert prepared_tokenizer(prepared).digest == BYTES.digest == manifest.tokenizer_digest


def test_same_input_same_bytes(corpus, prepared, tmp_path):
    """No clock, path, process or order of hashing enters the files."""
    moved = tmp_path / "elsewhere" / "moved.jsonl"
    moved.parent.mkdir()
    shutil.copy(corpus.files[0].path, moved.with_name(corpus.files[0].name))
    again = files_corpus([moved.with_name(corpus.files[0].name)])
    prepare(again, tmp_path / "again", tokenizer=BYTES, seq_len=32, heldout_fraction=0.2)
    assert all_files(tmp_path / "again") == all_files(prepared)


def test_many_shards(corpus, prepared, tmp_path, monkeypatch):
    """How many shards the rows are spread over changes no row; shard names say how many there are."""
    monkeypatch.setattr(units_module, "_SHARD_TOKENS", 32 * 50)
    manifest = prepare(corpus, tmp_path / "many", tokenizer=BYTES, seq_len=32, heldout_fraction=0.2)
    count = len(manifest.train.shards)
    assert count == -(-manifest.train.rows // 50) > 3
    assert manifest.train.shards[1].name == f"train-00001-of-{count:05d}.arrayrecord"
    assert [shard.rows for shard in manifest.train.shards[:-1]] == [50] * (count - 1)
    for split in ("train", "heldout"):
        assert texts_of(tmp_path / "many", split) == texts_of(prepared, split)
    order = np.random.default_rng(0).permutation(manifest.train.rows)
    one, many = PreparedRows(prepared, "train").read(order), PreparedRows(tmp_path / "many", "train").read(order)
    assert all(np.array_equal(one[name], many[name]) for name in one)


def test_few_files_hold_out_their_ends(tmp_path):
    """A corpus of one file still gets a held-out part: its last lines. Nothing is lost at the cut."""
    path = tmp_path / "one.txt"
    text = "".join(f"line {i}\n" for i in range(200))
    path.write_text(text)
    manifest = prepare(files_corpus([path]), tmp_path / "out", tokenizer=BYTES, seq_len=16, heldout_fraction=0.1)
    (train,), (heldout,) = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "heldout")
    assert manifest.split_rule == "tail"
    assert train + heldout == text and train.endswith("\n")
    assert 0.1 <= len(heldout) / len(text) < 0.12


def test_invalid_utf8_is_counted(tmp_path):
    """Invalid bytes become U+FFFD; the manifest and the report say how many."""
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe text\n" * 50)
    manifest = prepare(files_corpus([tmp_path / "a.txt"]), tmp_path / "out", tokenizer=BYTES, seq_len=16)
    assert manifest.replaced == 100
    assert "invalid UTF-8 sequences replaced by U+FFFD: 100" in preparing_cli.report(manifest, "out", 1.0)


def test_refuses_what_would_be_lost_or_empty(corpus, prepared, tmp_path):
    """An existing data set is not overwritten, and settings that leave a split empty are named; `out` is not made."""
    before = all_files(prepared)
    with pytest.raises(ConfigError, match=r"prepared' exists and is not empty: choose another folder, or delete it"):
        prepare(corpus, prepared, tokenizer=BYTES, seq_len=32)
    assert all_files(prepared) == before
    empty = tmp_path / "empty.txt"
    empty.touch()
    small = tmp_path / "small.jsonl"
    small.write_text('{"text": "only one"}\n')
    settings = {"tokenizer": BYTES, "seq_len": 32}
    for source, changes, message in (
        (files_corpus([empty]), {}, r"empty.txt\) holds no text, only empty documents: check the path"),
        (files_corpus([small]), {"heldout_fraction": 1e-9}, r"leaves the held-out split empty \(.* 1 documents"),
        (corpus, {"heldout_fraction": 1.5}, r"heldout=1.5 must lie in \[0, 1\)"),
        (corpus, {"seq_len": 0}, r"seq_len=0 must be positive"),
        (corpus, {"seq_len": 99999999999999}, r"seq_len=99999999999999 must be positive and at most 16777216"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(source, tmp_path / "out", **settings | changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "prepared", "small.jsonl"]


def test_without_heldout(corpus, tmp_path):
    """--heldout 0 keeps every document for training; asking for held-out rows then says why there are none."""
    manifest = prepare(corpus, tmp_path / "out", tokenizer=BYTES, seq_len=32, heldout_fraction=0)
    assert manifest.train.documents == NUM_DOCUMENTS - 2 and manifest.heldout.rows == 0
    with pytest.raises(ConfigError, match=r"has no heldout rows \(it was prepared with --heldout 0\)"):
        PreparedRows(tmp_path / "out", "heldout")
    assert preparing_cli.next_command(manifest, tmp_path / "out") == (
        "to train on it, held-out text is needed: prepare it again with --heldout above 0, such as 0.05"
    )


class Interrupted(Exception):
    pass


class InterruptedTokenizer(ByteTokenizer):
    def encode(self, text):
        if "document 150" in text:
            raise Interrupted
        return super().encode(text)


def test_failure_leaves_nothing(corpus, tmp_path):
    """Whatever stops the work in the middle, neither `out` nor a part of it is left behind."""
    with pytest.raises(Interrupted):
        prepare(corpus, tmp_path / "out", tokenizer=InterruptedTokenizer(), seq_len=32)
    assert list(tmp_path.iterdir()) == []


def test_killed_leaves_no_out_and_is_swept_up(corpus, tmp_path):
    """After kill -9 there is no `out`; the next run removes what was left beside it and succeeds."""
    script = (
        "import os, signal, sys\n"
        "from gqe_jax.data.sources.corpus import files_corpus\n"
        "from gqe_jax.data.preparing.prepare import prepare\n"
        "from gqe_jax.data.tokenizer import ByteTokenizer\n"
        "class Killing(ByteTokenizer):\n"
        "    def encode(self, text):\n"
        "        if 'document 150' in text: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().encode(text)\n"
        "prepare(files_corpus([sys.argv[1]]), sys.argv[2], tokenizer=Killing(), seq_len=32)\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(corpus.files[0].path), str(out)]
    assert subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode == -9
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    prepare(corpus, out, tokenizer=BYTES, seq_len=32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_full_disk_is_an_os_error(corpus, tmp_path):
    """The shard writer reports a full disk only when it closes, and not as OSError: it must not pass for bad input.

    A limit on file size stands in for the full disk (its signal ignored, so that writing fails with EFBIG).
    """
    script = (
        "import resource, signal, sys\n"
        "from gqe_jax.data.sources.corpus import files_corpus\n"
        "from gqe_jax.data.preparing.prepare import prepare\n"
        "from gqe_jax.data.tokenizer import ByteTokenizer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        "try:\n"
        "    prepare(files_corpus([sys.argv[1]]), sys.argv[2], tokenizer=ByteTokenizer(), seq_len=32)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(corpus.files[0].path), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    needed = r"could not write .*/out \(File too large\): for .*B of text about as much is needed, nothing is kept, "
    assert re.search(needed + r"and .*B are free: make room, or choose --out on another disk", done.stdout), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_out_may_be_a_link(corpus, tmp_path):
    """A link to an empty folder, or to one that is still to be made, keeps leading there; one to data is refused."""
    for name in ("empty", "missing"):
        if name == "empty":
            (tmp_path / name).mkdir()
        link = tmp_path / f"to_{name}"
        link.symlink_to(tmp_path / name)
        manifest = prepare(corpus, link, tokenizer=BYTES, seq_len=32)
        assert link.is_symlink() and verify(tmp_path / name) == manifest
        with pytest.raises(ConfigError, match=rf"to_{name}' exists and is not empty"):
            prepare(corpus, link, tokenizer=BYTES, seq_len=32)


def damage(path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


def test_damaged_shards_are_named(prepared):
    """A truncated or missing shard is named on opening, before any step; an altered byte by `verify`."""
    shard = Manifest.load(prepared).train.shards[0]
    path = prepared / shard.name
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    message = rf"train-00000-of-00001.arrayrecord is truncated \(1000 bytes, {shard.bytes} expected\).*gqe prepare"
    for check in (verify, lambda directory: PreparedRows(directory, "train")):
        with pytest.raises(ConfigError, match=message):
            check(prepared)
    path.write_bytes(flipped(whole))
    with pytest.raises(ConfigError, match=r"sha256 differs from the manifest's in train-00000-of-00001.arrayrecord"):
        verify(prepared)
    path.write_bytes(b"x" * len(whole))  # of the right size, but no shard
    with pytest.raises(ConfigError, match=r"train-00000-of-00001.arrayrecord is damaged .*its index does not give"):
        PreparedRows(prepared, "train")
    path.unlink()
    with pytest.raises(ConfigError, match=r"train-00000-of-00001.arrayrecord is missing"):
        PreparedRows(prepared, "train")
    PreparedRows(prepared, "heldout")  # the other split is whole


def test_unreadable_rows_are_named(prepared):
    """Damage that sizes and counts do not show is met while reading: the shard is named, no wrong tokens come back."""
    path = prepared / Manifest.load(prepared).train.shards[0].name
    damage(path, lambda data: data[:2000] + bytes(500) + data[2500:])
    with pytest.raises(ConfigError, match=r"train-00000-of-00001.arrayrecord is damaged"):
        rows = PreparedRows(prepared, "train")
        for index in range(len(rows)):
            rows.read([index])


def test_damaged_manifests(prepared, tmp_path):
    """Missing, cut off, of another version, incomplete: each message names the file and the remedy."""
    with pytest.raises(ConfigError, match=r"nothing' holds no manifest.json, so it is no prepared data set"):
        Manifest.load(tmp_path / "nothing")
    path = prepared / "manifest.json"
    whole = path.read_text()
    for content, message in (
        (whole[:200], r"manifest.json is no JSON .*prepare it again"),
        ("[]", r"manifest.json holds no JSON object: .*prepare it again"),
        ("{}", r"has format_version=None, and this version of gqe_jax reads 2"),
        (whole.replace('"format_version": 2', '"format_version": 7'), r"has format_version=7, .*reads 2"),
        (whole.replace('"seq_len"', '"sequence"'), r"manifest.json lacks seq_len; has the unknown 'sequence'"),
        (whole.replace('"shards"', '"shard"'), r"manifest.json lacks shards"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            Manifest.load(prepared)


class OtherTokenizer(ByteTokenizer):
    def files(self):
        return {"bytes.json": b"other"}


def test_tokenizer_and_vocabulary_must_fit(prepared):
    """Ids mean nothing under another tokenizer, and an id beyond the model's vocabulary would read past its table."""
    manifest = Manifest.load(prepared)
    manifest.check_tokenizer(BYTES)
    manifest.check_vocab_size(259)
    with pytest.raises(ConfigError, match=r"prepared with the tokenizer bytes .*: prepare the data again"):
        manifest.check_tokenizer(OtherTokenizer())
    with pytest.raises(ConfigError, match=r"model.vocab_size=128 is smaller than .* vocab_size=259 .*at least 259"):
        manifest.check_vocab_size(128)
    path = prepared / "tokenizer" / "bytes.json"
    path.unlink()
    with pytest.raises(ConfigError, match=r"tokenizer with the data's tokenizer is missing"):
        prepared_tokenizer(prepared)


def test_default_corpus(tmp_path, monkeypatch):
    """Made once per tokenizer and length, in the user's cache; processes that start together get one whole data set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = stdlib_corpus()
    small = type(small)(small.description, tuple(file for file in small.files if file.name.startswith("json/")))
    monkeypatch.setattr(prepare_module, "stdlib_corpus", lambda: small)
    found = []
    threads = [threading.Thread(target=lambda: found.append(default_corpus_dir(BYTES, 64))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    directory = found[0]
    assert directory.parent == tmp_path / "gqe_jax"
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]
    stamp = (directory / "manifest.json").stat().st_mtime_ns
    assert default_corpus_dir(BYTES, 64) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == stamp
    assert default_corpus_dir(BYTES, 32) != directory
    verify(directory)


def test_compression_baselines():
    """Each text compressed alone, sizes and bytes summed; order 0 is the entropy of byte frequencies (1 bit: a, b)."""
    texts = ["abab" * 100, "bbaa" * 50, ""]
    data = [text.encode() for text in texts]
    total = sum(map(len, data))
    found = compression_baselines(texts)
    assert found["order0"] == pytest.approx(1.0)
    assert found["zlib"] == sum(len(zlib.compress(d, 9)) for d in data) * 8 / total
    assert found["bz2"] == sum(len(bz2.compress(d, 9)) for d in data) * 8 / total
    assert found["lzma"] == sum(len(lzma.compress(d, preset=9 | lzma.PRESET_EXTREME)) for d in data) * 8 / total
    assert compression_baselines(["aaab"])["order0"] == pytest.approx(2 - 0.75 * math.log2(3))
    with pytest.raises(ValueError, match="the texts hold no byte"):
        compression_baselines([""])


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    return prepare_cli.run(parser.parse_args(arguments))


def test_command(corpus, tmp_path, capsys):
    """`gqe prepare` prints what it did and the next command; a trained SentencePiece model travels with the data."""
    source, out = str(corpus.files[0].path), str(tmp_path / "out")
    assert run_command("--data", source, "--out", out, "--seq-len", "64", "--train-sentencepiece", "300") == 0
    printed = capsys.readouterr().out
    manifest = Manifest.load(out)
    assert f"gqe train --config smoke --run runs/out --config.data.path={out} " in printed
    assert "--config.model.context=64 --config.model.vocab_size=300" in printed
    assert f"{manifest.train.tokens:,}" in printed and "documents without text, left out: 2" in printed
    tokenizer: Tokenizer = prepared_tokenizer(out)
    assert tokenizer.name == "sentencepiece" and manifest.vocab_size == 300
    manifest.check_tokenizer(tokenizer)
    with pytest.raises(SystemExit):
        run_command("--out", out, "--tokenizer", "bytes", "--train-sentencepiece", "300")


def test_imports_stay_light():
    """Reading data needs no TensorFlow and no torch, and grain and the tokenizer libraries only when they are used."""
    script = (
        "import sys, gqe_jax.data\n"
        "heavy = {'tensorflow', 'torch', 'seqio', 'grain', 'sentencepiece', 'tokenizers'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
