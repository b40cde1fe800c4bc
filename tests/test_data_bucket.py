"""Sources and prepared data in a bucket (gs://), by a file system that keeps the bucket in a local folder."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from gqe_jax.attention import GQAConfig
from gqe_jax.cli.main import main
from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.manifest import Manifest, verify
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.reading.pipeline import PreparedRows, train_batches
from gqe_jax.data.reading.prepared import open_data
from gqe_jax.data.sources.corpus import files_corpus
from gqe_jax.data.tokenizer import ByteTokenizer

ATTENTION = GQAConfig(num_query_heads=1, num_kv_heads=1)  # of a model that is never built

SETTINGS = {"tokenizer": ByteTokenizer(), "seq_len": 16, "heldout_fraction": 0.2}
MODEL = ModelConfig(attention=ATTENTION, context=16)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that gs://bucket/ stands for; the user's cache is in a folder of its own."""
    root = tmp_path / "store"

    class FakeBucket(LocalFileSystem):
        @classmethod
        def _strip_protocol(cls, path):
            path = os.fspath(path)
            return super()._strip_protocol(f"{root}/{path.removeprefix('gs://')}" if path.startswith("gs://") else path)

        def glob(self, path, **options):
            return [found.removeprefix(f"{root}/") for found in super().glob(path, **options)]

    monkeypatch.setitem(_registry, "gcs", FakeBucket)
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (root / "bucket").mkdir(parents=True)
    yield root / "bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()


def write_texts(folder) -> None:
    folder.mkdir(parents=True)
    for i in range(3):
        lines = (json.dumps({"text": f"text {i} {n} é"}) + "\n" for n in range(40))
        (folder / f"{i}.jsonl").write_text("".join(lines))


def test_bucket_and_disk_give_the_same_bytes(bucket, tmp_path):
    """Reading from and writing to a bucket changes no byte: the same files under the same names, complete at the end.

    The manifest, which makes the folder a data set, comes last; what is left in the cache is nothing.
    """
    write_texts(bucket / "texts")
    write_texts(tmp_path / "texts")
    prepare(files_corpus(["gs://bucket/texts/*.jsonl"]), "gs://bucket/out", **SETTINGS)
    prepare(files_corpus([tmp_path / "texts/*.jsonl"]), tmp_path / "out", **SETTINGS)
    for folder in (tmp_path / "out", bucket / "out"):
        verify(folder)
    names = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (tmp_path / "out", bucket / "out")]
    assert names[0] == names[1]
    assert all((tmp_path / "out" / name).read_bytes() == (bucket / "out" / name).read_bytes() for name in names[0])
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(ConfigError, match=r"out='gs://bucket/out' exists and is not empty.*changed .*: none"):
        prepare(files_corpus(["gs://bucket/texts/0.jsonl", "gs://bucket/texts/*"]), "gs://bucket/out", **SETTINGS)


def test_training_reads_a_copy(bucket, tmp_path):
    """Rows of a bucket are those of its copy in the cache, made once and completed after an interruption."""
    write_texts(tmp_path / "texts")
    prepare(files_corpus([tmp_path / "texts/*.jsonl"]), "gs://bucket/out", **SETTINGS)
    data = open_data(DataConfig(path="gs://bucket/out"), MODEL)
    with train_batches(data, batch_size=4, seed=0) as batches:
        first = next(batches)
    assert data.sets[0].directory.is_relative_to(tmp_path / "cache")
    rows = PreparedRows(bucket / "out", "train")
    every = rows.read(range(len(rows)))["targets"]
    assert all((every == row).all(1).any() for row in first["targets"])
    shard = data.sets[0].directory / Manifest.load(bucket / "out").train.shards[0].name
    shard.unlink()
    again = open_data(DataConfig(path="gs://bucket/out"), MODEL)
    with train_batches(again, batch_size=4, seed=0) as batches:
        np.testing.assert_array_equal(next(batches)["targets"], first["targets"])


def test_a_copy_that_the_disk_cannot_hold(bucket, tmp_path, monkeypatch):
    """It is refused before the first byte is copied: a pod would fill its disks for an hour, and then fail."""
    write_texts(tmp_path / "texts")
    prepare(files_corpus([tmp_path / "texts/*.jsonl"]), "gs://bucket/out", **SETTINGS)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ConfigError, match=r"'gs://bucket/out': 0.0 GB of it are to be copied to .*, which has 0"):
        open_data(DataConfig(path="gs://bucket/out"), MODEL)
    assert not list((tmp_path / "cache").rglob("*.array_record"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", "smoke", "--run", "gs://bucket/run"],
        ["train", "--config", "smoke", "--run", "run", "--config.data.path=gs://bucket/data"],
        ["prepare", "--data", "gs://bucket/*.txt", "--out", "out"],
        ["eval", "--run", "gs://bucket/run"],
    ],
)
def test_without_gcsfs(arguments, monkeypatch, capsys, tmp_path):
    """Whatever names a bucket first, the answer is one sentence with the remedy, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend.fsspec_backend._get_filesystem.cache_clear()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "need gcsfs, which is not installed: pip install 'gqe_jax[gcs]'" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.parametrize("recipe", ["worker/install.sh", "gke/Dockerfile"])
def test_pods_install_what_a_bucket_needs(recipe):
    """Every way to a pod installs the extra `gcs`, of which each version is fixed."""
    root = Path(__file__).parents[1]
    (extras,) = re.findall(r"\[([\w,]+)\]'", (root / "tpu_scripts" / recipe).read_text())
    assert {"tpu", "gcs"} <= set(extras.split(","))
    for pins in ("constraints.txt", "constraints-newest.txt"):
        fixed = set(re.findall(r"^([\w-]+)==", (root / pins).read_text(), re.MULTILINE))
        assert {"gcsfs", "fsspec", "google-auth", "google-cloud-storage", "aiohttp"} <= fixed


def test_what_a_bucket_does_not_hold(bucket):
    """Missing data and patterns are named as on disk; a recursive pattern is refused before it lists a whole bucket."""
    with pytest.raises(ConfigError, match=r"data.path='gs://bucket/no' holds no manifest.json"):
        open_data(DataConfig(path="gs://bucket/no"), MODEL)
    with pytest.raises(ConfigError, match=r"data='gs://bucket/no.txt' does not exist"):
        files_corpus(["gs://bucket/no.txt"])
    with pytest.raises(ConfigError, match=r"data='gs://bucket/\*.txt' matches no file"):
        files_corpus(["gs://bucket/*.txt"])
    with pytest.raises(ConfigError, match=r"'\*\*' is not searched in a bucket: name the folders"):
        files_corpus(["gs://bucket/**/*.txt"])
