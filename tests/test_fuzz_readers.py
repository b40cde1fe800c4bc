"""What comes from outside and was altered in any way is read, or refused in a sentence: no traceback, no hang.

Real files are mutated, in their bytes and in their values. Each mutation must be read, or end in a ConfigError of one
line (and one for each tensor that does not fit), which the command reports with exit code 2; within five seconds of
this process's time, and without a new file. Where a checksum would find the change, the file of sums is made anew.
"""

import contextlib
import copy
import json
import random
import shutil
import signal
import time
from fractions import Fraction
from unittest import mock

import pytest
from test_hostile_runs import untrained
from tiny_run import prepare_tiny, tiny_config

from gqe_jax.config import ConfigError
from gqe_jax.config_dict import build, to_dict
from gqe_jax.data.manifest import changed_sources, copied_sources, heldout_documents, prepared_tokenizer
from gqe_jax.data.reading.mixture import MixturePart, parse_mixture, quotas, read_mixture, write_mixture
from gqe_jax.data.reading.pipeline import PreparedRows
from gqe_jax.data.reading.position import Position
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import load_tokenizer, tokenizer_from_files, train_sentencepiece
from gqe_jax.evaluate.data_report import describe
from gqe_jax.pytorch import importing
from gqe_jax.pytorch.exporting import export_hf
from gqe_jax.pytorch.hf_tokenizer import read_tokenizer
from gqe_jax.pytorch.importing import import_folder
from gqe_jax.runs import integrity
from gqe_jax.runs.checkpoint import Checkpoints
from gqe_jax.runs.record import read_run
from gqe_jax.runs.saved_model import open_model

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("sentencepiece")
QUICK, MANY = 150, 2000  # mutations of each kind of file
COSTLY = 10  # times as long one mutation of arrays takes, which so get fewer
SECONDS = 5


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A folder with one of everything that is read."""
    root = tmp_path_factory.mktemp("outside")
    prepare_tiny(root / "data", documents=30)
    (root / "mixture").mkdir()
    write_mixture(root / "mixture", "both", [MixturePart("a", Fraction(1, 2)), MixturePart("b", Fraction(1, 2))])
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
    (root / "mixture.txt").write_text("data/web:0.7, gs://bucket/books:1/3,data/c:2e-3")
    (root / "trained").mkdir()
    exported = open_model(untrained(root / "trained", argument="gqa"))
    export_hf(exported, root / "folder")
    (root / "folder" / "bytes.json").unlink()  # so that tokenizer.json counts
    words = (f"the quick brown fox {number}\n" for number in range(300))
    train_sentencepiece(words, 300, root / "pieces.model")
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


def read_rows(root):
    """The rows, in a folder whose manifest has the shards' sizes."""
    manifest = json.loads((root / "data" / "manifest.json").read_bytes())
    for shard in manifest["train"]["shards"]:
        shard["bytes"] = (root / "data" / shard["name"]).stat().st_size
    (root / "data" / "manifest.json").write_text(json.dumps(manifest))
    rows = PreparedRows(root / "data", "train")
    rows.read(range(len(rows)))


CHECKPOINT = "trained/run/checkpoints/0"


def read_item(read):
    """A reader of a checkpoint of step 0 whose record has the sums of what is there."""

    def reader(root):
        integrity.write_record(root / CHECKPOINT)
        read(Checkpoints(root / CHECKPOINT / ".."))

    return reader


def read_parameters(root):
    integrity.write_record(root / CHECKPOINT)
    open_model(root / "trained/run").read("layers.attention.q_proj.kernel")


class Imported(Exception):
    """The folder was read, and the run would be written."""


def read_folder(root):
    with mock.patch.object(importing, "new_folder", side_effect=Imported), contextlib.suppress(Imported):
        import_folder(root / "folder", root / "imported")


def read_tokens(load):
    def reader(root):
        tokenizer = load(root)
        tokenizer.decode(tokenizer.encode("the quick é"))

    return reader


read_folders_tokens = read_tokens(lambda root: read_tokenizer(root / "folder"))

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
    "mixture.txt": lambda root: quotas(parse_mixture((root / "mixture.txt").read_bytes().decode("utf-8", "replace"))),
    "data/train-00000-of-00001.arrayrecord": read_rows,
    f"{CHECKPOINT}/integrity.json": lambda root: (Checkpoints(root / CHECKPOINT / "..").verify(0),
                                                  integrity.recorded_bytes(root / CHECKPOINT)),
    f"{CHECKPOINT}/config/metadata": read_item(lambda checkpoints: build(checkpoints.read_config(0))),
    f"{CHECKPOINT}/data/metadata": read_item(lambda checkpoints: Position.read(
        checkpoints.read_data(0).get("position"), "here")),
    f"{CHECKPOINT}/tokenizer/metadata": read_item(lambda checkpoints: tokenizer_from_files(
        checkpoints.read_tokenizer(0))),
    f"{CHECKPOINT}/format/metadata": read_item(lambda checkpoints: checkpoints.read_format(0)),
    "folder/config.json": read_folder,
    "folder/model.safetensors": read_folder,
    "folder/tokenizer.json": read_folders_tokens,
    "folder/tokenizer_config.json": read_folders_tokens,
    "folder/generation_config.json": read_folders_tokens,
    "pieces.model": read_tokens(lambda root: load_tokenizer(root / "pieces.model")),
}  # fmt: skip
ARRAYS = [f"{CHECKPOINT}/params/{name}" for name in
          ("_METADATA", "_sharding", "layers.attention.q_proj.kernel/.zarray")]  # fmt: skip

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

    began = time.process_time()

    def late(*_):
        if time.process_time() - began > seconds:  # the timer itself may be early on a machine that others keep busy
            raise TimeoutError(f"more than {seconds} seconds")

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)


def listing(root):
    return {str(path) for path in root.rglob("*")}


def mutate(name, root, count, seed):
    path = root / name
    original = path.read_bytes()
    read = READERS.get(name, read_parameters)
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
        first, *more = str(error).split("\n")
        assert len(first) < 2000 and all(line.startswith("  ") and len(line) < 300 for line in more), what()
        return True
    except BaseException as error:
        raise AssertionError(what()) from error
    return False


@pytest.mark.parametrize("name", READERS)
def test_an_altered_file_is_read_or_refused(outside, tmp_path, name):
    mutate(name, shutil.copytree(outside, tmp_path / "root"), QUICK, 0)


@pytest.mark.parametrize("name", ARRAYS)
def test_an_altered_array_is_read_or_refused(outside, tmp_path, name):
    mutate(name, shutil.copytree(outside, tmp_path / "root"), QUICK // COSTLY, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_altered_files_are_read_or_refused(outside, tmp_path, name):
    mutate(name, shutil.copytree(outside, tmp_path / "root"), MANY, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARRAYS)
def test_many_altered_arrays_are_read_or_refused(outside, tmp_path, name):
    mutate(name, shutil.copytree(outside, tmp_path / "root"), MANY // COSTLY, 1)
