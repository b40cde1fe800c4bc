"""Documents: where they come from, what their names are, and what input is refused."""

import glob
import gzip
import json
import os
import socket
import sysconfig
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqe_jax.config import ConfigError
from gqe_jax.data.sources import files
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


def test_json_lines_with_a_byte_order_mark(tmp_path):
    """What some editors put before the first line is no part of it (RFC 8259, section 8.1)."""
    path = write(tmp_path / "a.jsonl", "\ufeff" + json_lines({"text": "\ufeffone"}, {"text": "two"}))
    assert [document.text for document in files_corpus([path]).documents()] == ["\ufeffone", "two"]


def test_a_line_has_a_bound(tmp_path, monkeypatch):
    """A small compressed file could claim a line of any length, which has to be held whole."""
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines({"text": "a"}).encode() + b" " * 10**6))
    with pytest.raises(ConfigError, match=r"a.jsonl.gz, line 2 has more than 100 bytes: divide it"):
        list(files_corpus([path]).documents())


def test_each_file_is_read_once(tmp_path):
    """However many names lead to it: a loop of links, one to a folder above, `..`, the same name twice, a hard link."""
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "sub/b.txt", "b")
    os.link(tmp_path / "sub/b.txt", tmp_path / "sub/hard.txt")
    for name in ("e", "f", "sub/up"):
        (tmp_path / name).symlink_to(tmp_path)
    patterns = ["**/*.txt", "sub/../sub/b.txt", "a.txt", "a.txt", "sub/../a.txt", "**/**/a.txt", "*/a.txt"]
    for chosen in (patterns, patterns[::-1]):
        corpus = files_corpus([f"{tmp_path}/{pattern}" for pattern in chosen])
        assert [file.name for file in corpus.files] == ["a.txt", "sub/b.txt"]
    assert [file.name for file in files_corpus([tmp_path / "sub/../sub/b.txt", tmp_path / "a.txt"]).files] == [
        "a.txt",
        "sub/b.txt",
    ]


@settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["**", "*", "a", "b*", "*.txt", "a.txt", "[ab]"]), min_size=1, max_size=4))
def test_patterns_match_what_glob_matches(tree, parts):
    """Where no link leads back, a pattern finds the files that Python's own `glob` finds."""
    pattern = str(tree.joinpath(*parts))
    expected = {os.path.realpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    try:
        found = {os.path.realpath(file.path) for file in files_corpus([pattern]).files}
    except ConfigError:
        found = set()
    assert found == expected


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    for name in ("a.txt", "b.txt", "a/a.txt", "a/b/a.txt", "b/a/a.txt", "b1/c.txt", ".hidden/a.txt", "a/.a.txt"):
        write(root / name, name)
    (root / "bl").symlink_to(root / "a/b")
    return root


def test_what_is_no_file_is_refused_at_once(tmp_path):
    """A pipe would block for ever, a device never end: both are named before they are opened, also in a pattern."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.txt").symlink_to(tmp_path / "circle.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    write(tmp_path / "good.txt", "good")
    for pattern, message in (
        ("pipe.txt", r"pipe.txt is a pipe, and what is read must be a file: write the text to one first"),
        ("p*.txt", r"pipe.txt is a pipe"),
        ("socket", r"socket is a socket"),
        ("/dev/zero", r"/dev/zero is a device"),
        ("lost.txt", r"lost.txt cannot be read \(No such file"),
        ("*.txt", r"circle.txt cannot be read \(Too many levels of symbolic links\): repair it, or leave it out"),
        ("good.txt/x", r"does not exist"),
        ("x" * 5000, r"does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            files_corpus([tmp_path / pattern])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("dataset_dict.json", '{"splits": []}', r"is a Hugging Face dataset without splits: save .* again"),
        ("dataset_dict.json", '{"splits": ["train"', r"dataset_dict.json is no JSON"),
        ("dataset_dict.json", '{"splits": "train"}', r"splits='train' must be a list of texts"),
        ("dataset_dict.json", '{"splits": ["train", "test"]}', r"with the splits train, test: name one, such as"),
        ("state.json", '{"_data_files": [', r"state.json is no JSON .*save the dataset again with save_to_disk"),
        ("state.json", "[]", r"state.json holds no JSON object"),
        ("state.json", "{}", r"state.json names no files of the dataset"),
        ("state.json", '{"_data_files": [5]}', r"_data_files=\[5\] must be a list of objects"),
        ("state.json", '{"_data_files": [{}]}', r"names the file None, but must name one in its own folder"),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}', r"names the file '../a.arrow', but must name"),
        ("state.json", '{"_data_files": [{"filename": "a.arrow"}]}', r"names a.arrow, which is missing: restore"),
    ],
)
def test_broken_dataset_folders(tmp_path, name, content, message):
    """A Hugging Face folder that is torn, empty, lacks a shard or leads elsewhere is refused by the file's name."""
    write(tmp_path / "set" / name, content)
    with pytest.raises(ConfigError, match=message):
        files_corpus([tmp_path / "set"])


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
        ("[" * 100_000, r"line 1: not valid JSON \(maximum recursion depth exceeded.*repair or remove"),
        ('{"text": ' + "1" * 5000 + "}", r"line 1: not valid JSON \(Exceeds the limit \(4300 digits\)"),
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
