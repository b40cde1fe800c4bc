"""Texts from outside that were altered in any way are read, or refused in one sentence: no traceback, no hang.

Real files are mutated, in their bytes and in their values. Each mutation must be read, or end in a ConfigError of one
line, which the command reports with exit code 2; within five seconds of this process's time, and without a new file.
"""

import contextlib
import copy
import json
import random
import shutil
import signal
from fractions import Fraction

import pytest
from tiny_run import prepare_tiny, tiny_config

from gqe_jax.config import ConfigError
from gqe_jax.config_dict import to_dict
from gqe_jax.data.manifest import changed_sources, copied_sources, heldout_documents, prepared_tokenizer
from gqe_jax.data.reading.mixture import Part, quotas, read_mixture, write_mixture
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.evaluate.data_report import describe
from gqe_jax.runs.record import read_run

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
QUICK, MANY = 150, 2000  # mutations of each kind of file
SECONDS = 5


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with one of everything that is read."""
    root = tmp_path_factory.mktemp("outside")
    prepare_tiny(root / "data", documents=30)
    (root / "mixture").mkdir()
    write_mixture(root / "mixture", "both", [Part("a", Fraction(1, 2)), Part("b", Fraction(1, 2))])
    lines = [{"text": f"text {i} é\n", "id": i, "more": [{"a": None}]} for i in range(20)]
    (root / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = pa.table({"text": [line["text"] for line in lines], "id": range(20)})
    pq.write_table(table, root / "table.parquet", row_group_size=7)
    pq.write_table(table.set_column(0, "text", table["text"].dictionary_encode()), root / "coded.parquet")
    (root / "set").mkdir()
    with pa.OSFile(str(root / "set" / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    (root / "set" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], "_split": None}))
    (root / "sets").mkdir()
    (root / "sets" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    config = to_dict(tiny_config(root / "data"))
    (root / "run").mkdir()
    (root / "run" / "config.json").write_text(json.dumps(config))
    (root / "run" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 1.0, "load": [[[0.5, 0.5]]]}) + "\n" for step in range(1, 9))
    )
    return root


def read_prepared(root):
    describe(root / "data")
    rows = PreparedRows(root / "data", "train")
    rows.read([0, len(rows) - 1])


def read_texts(name):
    return lambda root: [len(document.text) for document in files_corpus([root / name]).documents()]


READERS = {
    "data/manifest.json": read_prepared,
    "data/heldout.jsonl": lambda root: list(heldout_documents(root / "data")),
    "data/sources.jsonl": lambda root: (changed_sources(root / "data", files_corpus([root / "lines.jsonl"])),
                                        copied_sources(root / "data")),
    "data/tokenizer/bytes.json": lambda root: prepared_tokenizer(root / "data"),
    "mixture/mixture.json": lambda root: quotas(read_mixture(root / "mixture")),
    "lines.jsonl": read_texts("lines.jsonl"),
    "table.parquet": read_texts("table.parquet"),
    "coded.parquet": read_texts("coded.parquet"),
    "set/data.arrow": read_texts("set"),
    "set/state.json": read_texts("set"),
    "sets/dataset_dict.json": read_texts("sets"),
    "run/config.json": lambda root: read_run(root / "run"),
    "run/metrics.jsonl": lambda root: read_run(root / "run").load(),
}  # fmt: skip

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = [
    None, True, -1, 0, 7, 2**31, 2**63, 10**40, 0.5, 1e308, float("nan"), float("inf"), "", "x", "5", "1e99999",
    "../../x", "/etc/passwd", "a\0b", "x" * 300, "é\ud800", [], {}, [1, 2], {"a": 1}, [[[[]]]], ["x"],
]  # fmt: skip


def altered_value(rng: random.Random, content: bytes) -> bytes:
    """One value, key or item of JSON (of one line, if there are several) replaced, left out or put twice."""
    lines = content.splitlines(keepends=True)
    try:
        number, text = 0, content
        value = json.loads(content)
        lines = [content]
    except ValueError:
        number = rng.randrange(len(lines))
        text = lines[number]
        try:
            value = json.loads(text)
        except ValueError:
            return altered_bytes(rng, content)
    root = [value]
    places = [(root, 0)]
    for holder, key in places:  # grows
        inner = holder[key]
        items = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        places += [(inner, item) for item, _ in items]
    holder, key = rng.choice(places)
    change = rng.randrange(6)
    if change == 0 and holder is not root:
        del holder[key]
    elif change == 1 and isinstance(holder[key], dict):
        holder[key][rng.choice(["unknown", "", "x" * 100, "name"])] = rng.choice(VALUES)
    elif change == 2 and isinstance(holder, list) and holder is not root:
        holder.append(copy.deepcopy(holder[key]))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    written = json.dumps(root[0]).encode()
    if change == 5:
        written = written.replace(b"7", rng.choice([DEEP.encode(), b"9" * 5000, b"1e400", b"NaN"]), 1)
    lines[number] = written + (b"\n" if text.endswith(b"\n") else b"")
    return b"".join(lines)


def altered_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes flipped, cut out, put in, repeated; the end cut off; something put before all."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 3, 10])):
        begin = rng.randrange(len(content) + 1)
        end = min(len(content), begin + rng.choice([1, 1, 2, 4, 8, 100]))
        change = rng.randrange(7)
        if change == 0 and begin < len(content):
            content[begin] ^= 1 << rng.randrange(8)
        elif change == 1:
            del content[begin:end]
        elif change == 2:
            content[begin:begin] = rng.randbytes(end - begin)
        elif change == 3:
            content[begin:begin] = content[begin:end]
        elif change == 4:
            del content[begin:]
        elif change == 5:
            content[begin:end] = rng.choice([b"\xff" * (end - begin), bytes(end - begin), b'"', b"{", b"]", b"9" * 30])
        else:
            content[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"[" * 5000, b" " * 1000])
    return bytes(content)


@contextlib.contextmanager
def within(seconds: float):
    """Raises TimeoutError when this process has worked so long, however busy the machine is."""

    def late(*_):
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def listing(root):
    return {str(path) for path in root.rglob("*")}


def mutate(name, root, count, seed):
    path = root / name
    original = path.read_bytes()
    read = READERS[name]
    read_or_refused(read, root, lambda: None)
    before = listing(root.parent)
    rng = random.Random(f"{name} {seed}")
    refused = 0
    for number in range(count):
        change = rng.choice([altered_value, altered_bytes])
        path.write_bytes(changed := change(rng, original))
        refused += read_or_refused(read, root, lambda: f"{name}, mutation {number}: {changed[:300]!r}")  # noqa: B023
    path.write_bytes(original)
    assert listing(root.parent) == before
    assert 0 < refused


def read_or_refused(read, root, what) -> bool:
    try:
        with within(SECONDS):
            read(root)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, what()
        return True
    except BaseException as error:
        raise AssertionError(what()) from error
    return False


@pytest.mark.parametrize("name", READERS)
def test_an_altered_file_is_read_or_refused(outside, tmp_path, name):
    mutate(name, shutil.copytree(outside, tmp_path / "root"), QUICK, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_altered_files_are_read_or_refused(outside, tmp_path, name):
    mutate(name, shutil.copytree(outside, tmp_path / "root"), MANY, 1)
