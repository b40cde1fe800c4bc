"""The work of preparation: shared by processes, gone on with after a kill, the same bytes in every case."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from read_back import all_files, texts_of

from gqe_jax.cli import main as cli
from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import heldout_documents, verify
from gqe_jax.data.preparing import units
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.preparing.progress import progress_text
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SETTINGS = {"tokenizer": BYTES, "seq_len": 64, "heldout_fraction": 0.1}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Units of a few files, so that small corpora have several."""
    monkeypatch.setattr(units, "_UNIT_BYTES", 4000)


@pytest.fixture
def folder(tmp_path):
    """Six files of JSON lines; every third text is one that has been there, two of ten in the same file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for file in range(6):
        lines = []
        for n in range(60):
            number = file * 60 + n if n % 3 else int(rng.integers(0, 40))
            lines.append(json.dumps({"text": f"text {number} " * (number % 9 + 1)}))
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return folder


def corpus_of(folder):
    return files_corpus([folder / "*.jsonl"])


def test_the_number_of_processes_changes_no_byte(folder, tmp_path):
    """A unit depends on its files alone, so who makes it does not matter: processes give the bytes of one."""
    corpus = corpus_of(folder)
    assert len(units.plan_units(corpus)) > 2
    options = {"packing": "best-fit", "deduplicate": True}
    for workers in (1, 2):
        prepare(corpus, tmp_path / f"out{workers}", **SETTINGS, **options, workers=workers)
    one, two = all_files(tmp_path / "out1"), all_files(tmp_path / "out2")
    assert one == two
    assert len(verify(tmp_path / "out2").train.shards) == len(units.plan_units(corpus))


def test_units_hold_every_document(folder, tmp_path):
    """Cutting the corpus into units loses, repeats and moves nothing; counts add up."""
    texts = [document.text for document in corpus_of(folder).documents()]
    manifest = prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)
    train, heldout = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "heldout")
    assert sorted(train + heldout) == sorted(texts)
    assert [document.text for document in heldout_documents(tmp_path / "out")] == heldout
    for found, split in ((train, manifest.train), (heldout, manifest.heldout)):
        assert split.documents == len(found) and split.bytes == sum(map(len, found))
        assert split.words == sum(len(text.split()) for text in found)
        assert split.tokens == split.bytes + split.documents


def test_duplicates_are_left_out(folder, tmp_path):
    """Of equal texts the first in the corpus stays, in whichever file; the manifest counts the others."""
    texts = [document.text for document in corpus_of(folder).documents()]
    assert len(set(texts)) < len(texts) - 50
    manifest = prepare(corpus_of(folder), tmp_path / "out", **SETTINGS, deduplicate=True)
    found = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "heldout")
    assert sorted(found[0] + found[1]) == sorted(set(texts))
    assert manifest.deduplicated and manifest.duplicates == len(texts) - len(set(texts))
    first_names = {document.text: document.name for document in reversed([*corpus_of(folder).documents()])}
    for document in heldout_documents(tmp_path / "out"):
        assert document.name == first_names[document.text]
    assert not set(found[0]) & set(found[1])  # so no copy of a held-out text is trained on


def test_copies_of_files_are_said(tmp_path, capsys):
    """Files of the same bytes may fall on both sides of the split: preparing says how many, and what helps."""
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"text {i} "}) + "\n" for i in range(99)))
    command = ["prepare", "--data", str(tmp_path / "*.jsonl"), "--seq-len", "64", "--workers", "1", "--out"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    warning = "2 files have the bytes of another one"
    assert warning in capsys.readouterr().out
    assert set(texts_of(tmp_path / "out", "train")) & set(texts_of(tmp_path / "out", "heldout"))
    assert cli.main([*command, str(tmp_path / "without"), "--deduplicate"]) == 0
    assert warning not in capsys.readouterr().out
    assert not set(texts_of(tmp_path / "without", "train")) & set(texts_of(tmp_path / "without", "heldout"))


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"name": "a", "text": "b", "tokens": [1]}', r"line 2, has the unknown 'tokens'"),
        ('{"name": "a"}', r"line 2, lacks text"),
        ('{"name": "a", "text": 5}', r"line 2, has text=5, which must be a text"),
        ("[1]", r"line 2,: \[1\] must be an object with name, text"),
        ("[" * 100_000, r"line 2, is no JSON \(maximum recursion depth"),
    ],
)
def test_altered_heldout_texts(folder, tmp_path, line, message):
    """heldout.jsonl holds names and texts and nothing else: a line that does not is named by its number."""
    prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)
    path = tmp_path / "out/heldout.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=rf"heldout.jsonl, {message}.*prepare it again"):
        list(heldout_documents(tmp_path / "out"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"heldout.jsonl is missing or no plain file"):
        list(heldout_documents(tmp_path / "out"))


KILLED = """
import os, signal, sys
from gqe_jax.data.preparing import units
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.tokenizer import ByteTokenizer
units._UNIT_BYTES = 4000
write = units.Job.write_unit
def counted(job, number, progress, threads=1):
    if number == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)
    print(number, flush=True)
    write(job, number, progress, threads)
units.Job.write_unit = counted
corpus = files_corpus([sys.argv[1] + "/*.jsonl"])
prepare(corpus, sys.argv[2], tokenizer=ByteTokenizer(), seq_len=64, heldout_fraction=0.1)
"""


def run_killed(folder, out, unit: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, str(folder), str(out), str(unit)]
    return subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)


def test_a_killed_preparation_goes_on(folder, tmp_path):
    """After kill -9 nothing that was finished is done again, and the result is that of an undisturbed run, whatever
    signs of patterns the folder's name has."""
    out = tmp_path / "out[1]**"
    killed = run_killed(folder, out, 2)
    assert killed.returncode == -signal.SIGKILL and killed.stdout.split() == ["0", "1"]
    assert not out.exists()
    again = run_killed(folder, out, -1)
    count = len(units.plan_units(corpus_of(folder)))
    assert again.returncode == 0 and again.stdout.split() == [str(n) for n in range(2, count)], again.stderr
    prepare(corpus_of(folder), tmp_path / "undisturbed", **SETTINGS)
    assert all_files(out) == all_files(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, "texts", "undisturbed"]


def test_an_error_keeps_what_is_finished(folder, tmp_path, capsys):
    """A broken line in the last file does not cost the others: when it is repaired, they are done anew only if needed.

    The repair changes that file, so its plan is another one: the message says so and nothing stale is used.
    """
    broken = folder / "5.jsonl"
    whole = broken.read_text()
    broken.write_text(whole + "\n{")
    with pytest.raises(ConfigError, match=r"5.jsonl, line 61: not valid JSON"):
        prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)
    assert re.search(r"out: \d+ finished part\(s\) are kept; the same command goes on", capsys.readouterr().err)
    broken.write_text(whole)
    prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)
    assert "begun before, but sources have changed since (5.jsonl): starting anew" in capsys.readouterr().err
    prepare(corpus_of(folder), tmp_path / "undisturbed", **SETTINGS)
    assert all_files(tmp_path / "out") == all_files(tmp_path / "undisturbed")


def test_an_error_in_another_process(folder, tmp_path):
    """What a process of the pool raises arrives as it would in this one; a killed one is an OSError with a remedy."""
    (folder / "0.jsonl").write_text("[]")
    with pytest.raises(ConfigError, match=r"0.jsonl, line 1: a JSON list stands where an object is expected"):
        prepare(corpus_of(folder), tmp_path / "out", **SETTINGS, workers=2)
    assert not (tmp_path / "out").exists()


class Killing(ByteTokenizer):
    def encode_batch(self, texts, threads=1):
        os.kill(os.getpid(), signal.SIGKILL)

    def __reduce__(self):
        return Killing, ()


def test_a_killed_process(folder, tmp_path):
    """A process of the pool that the system kills is an OSError with a remedy, not a hang."""
    with pytest.raises(OSError, match=r"was killed, perhaps for want of memory: go on with fewer --workers"):
        prepare(corpus_of(folder), tmp_path / "out", **SETTINGS | {"tokenizer": Killing()}, workers=2)


class Touching(ByteTokenizer):
    """Changes the last file of the corpus while the first one is being prepared."""

    def __init__(self, path):
        self.path = path

    def encode_batch(self, texts, threads=1):
        self.path.write_text(self.path.read_text() + " ")
        return super().encode_batch(texts, threads)


def test_a_source_that_changes_is_refused(folder, tmp_path):
    """What is written down about a source must be true of what was read: a file that changes meanwhile is named."""
    with pytest.raises(ConfigError, match=r"5.jsonl' has changed while it was being prepared: start again when"):
        prepare(corpus_of(folder), tmp_path / "out", **SETTINGS | {"tokenizer": Touching(folder / "5.jsonl")})


def test_an_existing_set_says_which_sources_changed(folder, tmp_path):
    """Preparing again into a finished folder is refused, and names the sources that are not what they were."""
    prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)
    with pytest.raises(ConfigError, match=r"sources that changed since it was prepared: none"):
        prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)
    (folder / "2.jsonl").write_text('{"text": "other"}')
    (folder / "1.jsonl").rename(folder / "7.jsonl")
    with pytest.raises(ConfigError, match=r"changed since it was prepared: 1.jsonl, 2.jsonl, 7.jsonl"):
        prepare(corpus_of(folder), tmp_path / "out", **SETTINGS)


@pytest.mark.slow
def test_a_document_of_100_megabytes(tmp_path):
    """Its tokens are made in parts, so it takes bounded memory; none is lost, and it stays one document."""
    line = "the quick brown fox jumps over the lazy dog, é\r\n"
    text = line * (10**8 // len(line.encode()))
    path = tmp_path / "large.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "small\x00"}))
    manifest = prepare(files_corpus([path]), tmp_path / "out", tokenizer=BYTES, seq_len=2048, heldout_fraction=0)
    assert (manifest.train.documents, manifest.train.bytes) == (2, len(text.encode()) + 6)
    rows = PreparedRows(tmp_path / "out", "train")
    last = rows.read([len(rows) - 1])
    tail = BYTES.decode(last["targets"][last["mask"]])
    assert (text + "small\x00").endswith(tail) and len(tail) > 6
    assert manifest.train.rows == -(-manifest.train.tokens // 2048)


def test_long_documents_are_tokenised_in_parts(monkeypatch):
    """The parts are the text, cut after newlines where there are any within reach."""
    monkeypatch.setattr(units, "_PART_CHARACTERS", 10)
    for text in ("", "short", "a\n" * 30, "x" * 35, "line of text\n" * 5):
        parts = list(units._text_parts(text))
        assert "".join(parts) == text and all(len(part) <= 10 for part in parts)
    assert list(units._text_parts("12345\n789\nabc")) == ["12345\n789\n", "abc"]


def test_a_row_length_and_packing_must_be_usable(folder, tmp_path):
    """Unknown packings and worker counts are refused by name."""
    for options, message in (
        ({"packing": "first-fit"}, r"packing='first-fit' is unknown: use one of concat, best-fit"),
        ({"workers": 0}, r"workers=0 must be positive"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(corpus_of(folder), tmp_path / "out", **SETTINGS, **options)


def test_progress_line():
    """Share, size, rate and time left; what was done before the clock started counts for the share only."""
    text = progress_text("preparing", 50 * 10**9, 60 * 10**9, 100 * 10**9, 500)
    assert text == "preparing:  60% of 100.0 GB, 20 MB/s, 33 min 20 s left"
    assert progress_text("preparing", 0, 0, 4000, 1) == "preparing:   0% of 4 kB, 0 B/s"
    assert progress_text("comparing", 0, 1, 36_001, 1).endswith("1 B/s, 10 h 00 min left")
