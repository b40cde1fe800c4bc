"""Documents: where they come from, what their names are, and what input is refused."""

import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqe_jax.config import ConfigError
from gqe_jax.data.sources.corpus import files_corpus, stdlib_corpus
from gqe_jax.data.sources.files import Document, decode_utf8


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_stdlib_is_this_pythons_sources():
    """Real sources of the running Python, in one order, without its tests, packages, tables and machine settings."""
    corpus = stdlib_corpus()
    names = [file.name for file in corpus.files]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "encodings", "pydoc_data"}
    assert not any(part.startswith("_sysconfigdata") for part in parts)
    first = next(file for file in corpus.files if file.name == "argparse.py")
    source = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()
    assert [*first.documents("text")] == [Document("argparse.py", source.decode("utf-8"))]


def test_stdlib_without_sources(tmp_path):
    """A zipped or frozen Python has no .py files: the message says what to use instead."""
    with pytest.raises(ConfigError, match=r"holds no .py files: use a Python installed with its sources, or .*--data"):
        stdlib_corpus(tmp_path)


def test_names_do_not_depend_on_the_place(tmp_path, monkeypatch):
    """Names are relative to the files' common folder, sorted, each file once: a moved corpus is the same corpus."""
    for root in ("here", "there/deeper"):
        for name in ("b.txt", "sub/a.txt", "sub/sub/c.txt", "sub/d.md", ".hidden.txt"):
            write(tmp_path / root / name, name)
    here = files_corpus([str(tmp_path / "here/**/*.txt"), str(tmp_path / "here/b.txt")])
    assert [file.name for file in here.files] == ["b.txt", "sub/a.txt", "sub/sub/c.txt"]
    monkeypatch.chdir(tmp_path / "there/deeper")
    there = files_corpus(["**/*.txt"])
    assert list(there.documents()) == list(here.documents())
    assert [document.text for document in there.documents()] == ["b.txt", "sub/a.txt", "sub/sub/c.txt"]


def test_text_is_kept_as_it_is(tmp_path):
    """Newlines of any style, NUL, tabs and byte-order marks are text: nothing is translated."""
    text = "\ufeffa\r\nb\rc\n\x00\td"
    path = write(tmp_path / "a.txt", text)
    assert [document.text for document in files_corpus([path]).documents()] == [text]


def test_json_lines(tmp_path):
    """One document per line, named by file and line; blank lines are no documents, invalid text is replaced."""
    lines = json_lines({"text": "one", "id": 1}) + "\n" + json_lines({"text": "two\n\ud800"}, {"text": ""})
    path = write(tmp_path / "a.jsonl", lines.encode() + b'{"text": "\xff"}')
    assert list(files_corpus([path]).documents()) == [
        Document("a.jsonl:1", "one"),
        Document("a.jsonl:3", "two\n\ufffd", replaced=1),
        Document("a.jsonl:4", ""),
        Document("a.jsonl:5", "\ufffd", replaced=1),
    ]
    other = write(tmp_path / "b.jsonl", json_lines({"body": "x", "text": "y"}))
    assert [document.text for document in files_corpus([other], column="body").documents()] == ["x"]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.sampled_from([b"a", b"\xff", b"\xc3", b"\xa9", b"\xe2\x82", b"\xef\xbf\xbd", b"\xef", b"\xf0\x9f"])))
def test_replacements_are_counted(pieces):
    """U+FFFD that the text itself holds is not counted; every one put in for invalid bytes is.

    Independent count: Python's own decoder calls the error handler once for each.
    """
    import codecs

    calls = []

    def count(error):
        calls.append(error)
        return "\ufffd", error.end

    codecs.register_error("count_for_test", count)
    data = b"".join(pieces)
    expected = data.decode("utf-8", errors="count_for_test")
    assert decode_utf8(data) == (expected, len(calls))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": "b"\n', r"a.jsonl, line 2: not valid JSON .*repair or remove the line"),
        ('{"title": "a", "n": 1}\n', r"a.jsonl, line 1: field 'text' is missing \(fields with text: title\).*--column"),
        ('{"text": 5}\n', r"line 1: field 'text' is of type int, not a string \(fields with text: none\)"),
        ('\n["text"]\n', r'line 2: a JSON list stands where an object is expected: write {"text": "..."}'),
    ],
)
def test_broken_json_lines(tmp_path, content, message):
    """File and line are named, and the fields that could have been meant."""
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ConfigError, match=message):
        list(files_corpus([path]).documents())


def test_unusable_paths(tmp_path):
    """Every path that gives no text is refused by name, with what to type instead."""
    write(tmp_path / "folder/a.txt", "a")
    write(tmp_path / "b.txt.bz2", b"")
    with pytest.raises(ConfigError, match=r"missing.txt' does not exist: check the path, or give a pattern"):
        files_corpus([tmp_path / "missing.txt"])
    with pytest.raises(ConfigError, match=r"folder' is a folder, and no Hugging Face dataset: .* --data '.*\*.txt'"):
        files_corpus([tmp_path / "folder"])
    with pytest.raises(ConfigError, match=r"\*.md' matches no file: .*quote the pattern"):
        files_corpus([tmp_path / "folder/**/*.md"])
    with pytest.raises(ConfigError, match=r"b.txt.bz2' is packed \(.bz2\).*unpack it first"):
        files_corpus([tmp_path / "*"])
    with pytest.raises(ConfigError, match="data is empty: give at least one path"):
        files_corpus([])
