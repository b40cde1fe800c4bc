"""Files of documents in every form that is read, and how what cannot be read is refused."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gqe_jax.config import ConfigError
from gqe_jax.data.sources import files as sources
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.sources.files import Document, SourceFile

TEXTS = ["one\r\ntwo\n", "", "drei é\u2028\x00\n", "\ufeffvier"]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def texts(path, column="text") -> list[str]:
    return [document.text for document in files_corpus([path], column).documents()]


@pytest.mark.parametrize("pack, suffix", [(bytes, ""), (gzip.compress, ".gz"), (zstd, ".zst")])
def test_compressed_text_is_the_text(tmp_path, pack, suffix):
    """A compressed file has the documents of the plain one, two frames in a row included; newlines stay as they are."""
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(pack(TEXTS[0].encode()) + pack(TEXTS[2].encode()))
    assert texts(text) == [TEXTS[0] + TEXTS[2]]
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    assert texts(lines) == TEXTS
    names = [document.name for document in files_corpus([lines]).documents()]
    assert names == [f"a.jsonl{suffix}:{n}" for n in range(1, 5)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet_columns(tmp_path, kind):
    """One document per row, named by its number, over row groups; a null is an empty document."""
    values = [*TEXTS, None] * 50
    encoded = [value if value is None or kind != pa.binary() else value.encode() for value in values]
    table = pa.table({"id": range(len(values)), "body": pa.array(encoded, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    documents = list(files_corpus([tmp_path / "a.parquet"], "body").documents())
    assert documents == [Document(f"a.parquet:{n}", value or "") for n, value in enumerate(values, start=1)]


def test_text_columns_of_every_form(tmp_path):
    """Arrow keeps texts as values, as views or as numbers into a dictionary: the text is the same."""
    values = pa.array([*TEXTS, None])
    columns = {
        "dictionary": values.dictionary_encode(),
        "large": values.cast(pa.large_string()).dictionary_encode(),
        "view": values.cast(pa.string_view()),
        "bytes": values.cast(pa.binary()).cast(pa.binary_view()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    batch = pa.record_batch(columns)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    for name in columns:
        for file in ("a.parquet", "a.arrow"):
            assert texts(tmp_path / file, name) == [*TEXTS, ""], (file, name)


def test_columns_of_one_name(tmp_path):
    """Which of two columns is meant nobody can say; another one that has its name alone is read."""
    arrays = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["text", "text", "body"]), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", "body") == ["c"]
    with pytest.raises(ConfigError, match=r"a.parquet: column 'text' stands there 2 times \(columns with text: text"):
        texts(tmp_path / "a.parquet")


def write_dataset(folder, values, files=2) -> None:
    """The form in which Hugging Face's datasets library saves to disk: Arrow streams and a state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        batch = pa.record_batch({"text": pa.array(values[i::files])})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_hugging_face_dataset(tmp_path):
    """The folder of a saved dataset is read by its state.json; of several splits one has to be named."""
    write_dataset(tmp_path / "set/train", TEXTS)
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert texts(tmp_path / "set/train") == TEXTS[0::2] + TEXTS[1::2]
    with pytest.raises(ConfigError, match=r"dataset with the splits train, test: name one, such as --data .*set/train"):
        files_corpus([tmp_path / "set"])


def test_missing_columns(tmp_path):
    """A column that does not exist, or holds no text: the message names the nearest, and those with text."""
    pq.write_table(pa.table({"texts": ["a"], "title": ["b"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"column 'text' does not exist \(did you mean 'texts'\?; .*: texts, title\)"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"column 'n' is of type int64, not text \(.* texts, title\).*--column"):
        texts(tmp_path / "a.parquet", "n")


def test_damaged_files_are_named(tmp_path):
    """A file that ends too early, or is not what its suffix says, is named; no part of it is taken for the whole."""
    whole = {
        "a.txt.gz": gzip.compress(b"text " * 1000),
        "a.jsonl.zst": zstd(b'{"text": "text"}\n' * 1000),
    }
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "whole.parquet")
    whole["a.parquet"] = (tmp_path / "whole.parquet").read_bytes()
    for name, data in whole.items():
        for damaged in (data[: len(data) // 2], b"x" * 100):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ConfigError, match=rf"{name}' is cut off or damaged \(.*\): fetch it again"):
                texts(tmp_path / name)


def test_large_text_files_are_several_documents(tmp_path, monkeypatch):
    """Memory is bounded: beyond TEXT_PART bytes a file is cut after a line, or where there is none, after a character.

    The parts together are the file, and each decodes on its own: no U+FFFD is made at a cut.
    """
    monkeypatch.setattr(sources, "TEXT_PART", 16)
    for text in ("line 1\nline two\nline three\n" * 4, "é" * 50, "a" * 16, "a" * 17 + "\u20ac" * 30 + "\nend"):
        path = tmp_path / "a.txt"
        path.write_bytes(text.encode())
        documents = list(SourceFile("a.txt", path).documents("text"))
        assert "".join(document.text for document in documents) == text
        assert not any(document.replaced for document in documents)
        assert all(len(document.text.encode()) <= 2 * 16 + 3 for document in documents)
        if len(documents) > 1:
            assert [document.name for document in documents] == [f"a.txt#{n + 1}" for n in range(len(documents))]
        else:
            assert documents[0].name == "a.txt" and len(text) == 16
        if text.count("\n") > 1:
            assert all(document.text.endswith("\n") for document in documents)


def test_progress_is_in_bytes_of_the_file(tmp_path):
    """What is reported never falls and ends at the size of the file."""
    lines = b'{"text": "a"}\n' * 5000
    for name, data in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines))):
        (tmp_path / name).write_bytes(data)
        seen = []
        list(SourceFile(name, tmp_path / name).documents("text", seen.append))
        assert seen == sorted(seen) and seen[-1] == len(data)


def test_without_pyarrow(tmp_path, monkeypatch):
    """Columnar files need an extra, and the message says which."""
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs the package pyarrow.*pip install 'gqe_jax\[columnar\]'"):
        texts(tmp_path / "a.parquet")
