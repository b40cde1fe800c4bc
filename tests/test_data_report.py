"""`gqe inspect data` and `gqe bench data`: what they say is what is there."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest

from gqe_jax.bench import data as bench
from gqe_jax.cli.main import main
from gqe_jax.data.manifest import Manifest
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.reading.mixture import MixturePart, write_mixture
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.sources.corpus import files_corpus, stdlib_corpus
from gqe_jax.data.tokenizer import ByteTokenizer, train_sentencepiece
from gqe_jax.evaluate.data_report import histogram, histogram_edges, segment_lengths, show_row

SEQ_LEN = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture of two sets of documents of 1 to 60 bytes, one of them packed without cutting."""
    folder = tmp_path_factory.mktemp("sets")
    for name, packing in (("cut", "concat"), ("packed", "best-fit")):
        lines = [json.dumps({"text": "é" + "x" * (i % 60)}) for i in range(200)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        corpus = files_corpus([folder / f"{name}.jsonl"])
        prepare(corpus, folder / name, tokenizer=ByteTokenizer(), seq_len=SEQ_LEN, packing=packing)
    write_mixture(folder, "both", [MixturePart("cut", Fraction(1, 4)), MixturePart("packed", Fraction(3, 4))])
    return folder


def test_inspect_a_set(folder, capsys):
    """The manifest's numbers, rows with their segments, a histogram that counts every segment."""
    assert main(["inspect", "data", str(folder / "packed"), "--rows", "3", "--split", "heldout"]) == 0
    out = capsys.readouterr().out
    manifest = Manifest.load(folder / "packed")
    for text in ("packed by best-fit", f"{manifest.train.tokens:,}", f"{manifest.padding('train'):.2%}", "1→eos"):
        assert text in out
    assert out.count("row ") == 3 and f"of {manifest.heldout.rows} (heldout)" in out
    assert "198→'\ufffd'" in out  # the first byte of é alone is no character


def test_a_row_is_shown_as_it_is():
    """Places, ids and texts of a row of two segments, and what each is to predict last."""
    batch = {
        "tokens": np.array([[1, 100, 101, 1, 102, 0]]),
        "targets": np.array([[100, 101, 1, 102, 103, 0]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
    }
    assert show_row(batch, 0, ByteTokenizer()).splitlines() == [
        "6 positions, 2 segment(s), 1 of padding",
        "  ┌ segment 1: positions 0 to 2, 3 tokens",
        "  │ 1→eos 100→'a' 101→'b'",
        "  └ then 1→eos",
        "  ┌ segment 2: positions 3 to 4, 2 tokens",
        "  │ 1→eos 102→'c'",
        "  └ then 103→'d'",
    ]
    long = {name: np.full((1, 40), 100) for name in ("tokens", "targets")} | {"segment_ids": np.ones((1, 40), int)}
    shown = show_row(long, 0, ByteTokenizer()).splitlines()[2].split()
    assert shown.count("100→'a'") == 16 and shown.index("…") == 13


def test_lengths(folder):
    """Segment lengths are those of the documents, where none is cut; the ranges of the histogram double."""
    found = segment_lengths(PreparedRows(folder / "packed", "train"))
    assert found.sum() == Manifest.load(folder / "packed").train.tokens
    assert found.max() <= SEQ_LEN
    assert histogram_edges(32) == [1, 2, 4, 8, 16, 32, 33] and histogram_edges(1) == [1, 2]
    assert histogram_edges(100) == [1, 2, 4, 8, 16, 32, 64, 100, 101]
    text = histogram(np.array([1, 2, 3, 32, 32]), 32)
    counts = [int(line.split()[1]) for line in text.splitlines()[1:]]
    assert counts == [1, 2, 0, 0, 0, 2] and "5 segments, mean 14.0" in text


def test_inspect_a_mixture(folder, capsys, tmp_path):
    """Every set of a mixture with its share; a picture is of one set."""
    assert main(["inspect", "data", str(folder), "--rows", "0"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cut: 25.0000% of the rows .*packed: 75.0000% of the rows", out, re.DOTALL)
    assert main(["inspect", "data", str(folder), "--png", "x.png"]) == 2
    assert "--png draws one set" in capsys.readouterr().err
    assert main(["inspect", "data", str(folder / "cut"), "--png", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ([str(tmp_path)], "holds no manifest.json"),
        ([str(folder / "cut"), "--rows", "-1"], "--rows=-1 must not be negative"),
        ([str(folder / "cut"), "--png", str(tmp_path / "no/where.png")], "cannot be written"),
    ):
        assert main(["inspect", "data", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_bench_prints_every_figure(capsys, tmp_path, monkeypatch):
    """Two megabytes, and steps of a millisecond, are enough to see that all figures are made."""
    monkeypatch.setattr(bench, "_STEP_SECONDS", 0.001)
    pieces = tmp_path / "small.model"
    train_sentencepiece((document.text for document in stdlib_corpus().files[0].documents("text")), 400, pieces)
    assert main(["bench", "data", "--megabytes", "2", "--workers", "1", "--tokenizer", str(pieces)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"prepare with bytes +\d+\.\d MB/s", out) and re.search(r" +\d+\.\d\d of it", out)
    assert re.search(r"prepare with small.model, one process: \d+\.\d MB/s; its library alone: \d+\.\d MB/s", out)
    assert re.search(r"reading packed rows +\d+\.\d M tokens/s", out) and re.search(r"waiting for data +\d+\.\d+%", out)
    assert main(["bench", "data", "--megabytes", "-1"]) == 2


def test_bench_corpus_has_the_size_asked_for(tmp_path):
    """Files of JSON lines of equal size, whole documents each."""
    corpus = bench.write_corpus(tmp_path, 1.0, 4)
    sizes = [file.stamp()[0] for file in corpus.files]
    assert len(sizes) == 4 and all(250_000 <= size < 600_000 for size in sizes)
