"""seqio tasks that come with gqe_jax. Each gives text, so the tokenizer is chosen with `gqe prepare --tokenizer`.

  fineweb_edu        HuggingFaceFW/fineweb-edu, the sample of 100 billion tokens
  fineweb_edu_10bt   the sample of 10 billion
  c4                 allenai/c4, English; its validation split is held out
  local_text         files of your own, GQE_LOCAL_TEXT='path/**/*.txt'; else the text of Python's own standard library

Those of the Hugging Face Hub are downloaded file by file, or read from the folder that GQE_HUB_COPY names, with the
paths that the files have there: `<folder>/HuggingFaceFW/fineweb-edu/sample/100BT/...`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import seqio
import tensorflow as tf

from gqe_jax.config import ConfigError
from gqe_jax.data.sources.corpus import Corpus, files_corpus, stdlib_corpus
from gqe_jax.data.sources.files import SourceFile

TEXT = tf.TensorSpec((), tf.string)


class HubFiles(seqio.DataSource):
    """Files of documents in a data set of the Hugging Face Hub; a shard is a file, downloaded when it is read."""

    def __init__(self, repository: str, patterns: Mapping[str, str], column: str = "text"):
        """patterns: split to the files' pattern in the repository, in a form that `SourceFile` reads."""
        super().__init__(splits=patterns.keys())
        self.repository, self.patterns, self.column = repository, dict(patterns), column

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """Paths of the files: on this machine if there is a copy, else within the repository."""
        pattern = self.patterns[split]
        if copy := os.environ.get("GQE_HUB_COPY"):
            found = [str(path) for path in Path(copy, self.repository).glob(pattern)]
        else:
            import huggingface_hub

            root = f"datasets/{self.repository}/"
            found = [path.removeprefix(root) for path in huggingface_hub.HfFileSystem().glob(root + pattern)]
        if not found:
            place = f"{copy}/{self.repository}" if copy else f"the Hub's {self.repository}"
            raise ConfigError(f"no file {pattern} in {place}: check the name, the network, or GQE_HUB_COPY")
        return sorted(found)

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        files = self.list_shards(split)
        if shard_info is not None:
            files = files[shard_info.index :: shard_info.num_shards]

        def texts() -> Iterator[dict[str, bytes]]:
            for name in files:
                path = Path(name if os.environ.get("GQE_HUB_COPY") else self._download(name))
                for document in SourceFile(Path(name).name, path).documents(self.column):
                    yield {"text": document.text.encode()}

        dataset = tf.data.Dataset.from_generator(texts, output_signature={"text": TEXT})
        return dataset.shuffle(10_000, seed=seed) if shuffle else dataset

    def _download(self, name: str) -> str:
        import huggingface_hub

        return huggingface_hub.hf_hub_download(self.repository, name, repo_type="dataset")


def local_corpus() -> Corpus:
    """Returns the corpus that the task `local_text` reads."""
    patterns = os.environ.get("GQE_LOCAL_TEXT")
    return files_corpus(patterns.split(os.pathsep)) if patterns else stdlib_corpus()


def _local_texts(split: str, shuffle_files: bool) -> tf.data.Dataset:
    def texts() -> Iterator[dict[str, bytes]]:
        for document in local_corpus().documents():
            yield {"text": document.text.encode()}

    return tf.data.Dataset.from_generator(texts, output_signature={"text": TEXT})


def text_task(name: str, source: seqio.DataSource) -> None:
    """Registers a task that gives the text of `source` as its feature `targets`."""
    rename = functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})
    vocabulary = seqio.PassThroughVocabulary(size=0)
    feature = seqio.Feature(vocabulary, add_eos=False, dtype=tf.string, rank=0)
    seqio.TaskRegistry.add(name, source, preprocessors=[rename], output_features={"targets": feature})


text_task("fineweb_edu", HubFiles("HuggingFaceFW/fineweb-edu", {"train": "sample/100BT/*.parquet"}))
text_task("fineweb_edu_10bt", HubFiles("HuggingFaceFW/fineweb-edu", {"train": "sample/10BT/*.parquet"}))
text_task(
    "c4",
    HubFiles("allenai/c4", {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}),
)
text_task("local_text", seqio.FunctionDataSource(_local_texts, splits=["train"]))
