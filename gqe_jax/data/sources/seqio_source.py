"""seqio tasks and mixtures (Roberts et al. 2022, arXiv 2203.17189) as corpora.

What a task does to its examples is left to seqio: its source, preprocessors, vocabulary and splits. The examples are
read once, in order and untrimmed, and packed into rows here: seqio's own packing cuts every document to one row.
TensorFlow is imported only when a task is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gqe_jax.config import ConfigError, nearest
from gqe_jax.data.sources.corpus import Corpus
from gqe_jax.data.sources.files import Document, Progress, decode_utf8
from gqe_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer

SHIPPED_TASKS = "gqe_jax.data.sources.seqio_tasks"
DEFAULT_FEATURE = "targets"

_HELDOUT_SPLIT = "validation"
_LONGEST = 2**30  # tokens of an example, for preprocessors that ask; nothing is trimmed
_UNKNOWN_SIZE = 2**25  # bytes assumed of a shard that is no file


@dataclasses.dataclass(frozen=True)
class SeqioShard:
    """Represents a shard of a task's split, with the interface of `SourceFile`; pickles names of modules alone.

    split: "train" or "heldout", where its documents go; None: divided by a hash of their names.
    """

    name: str
    task: str
    modules: tuple[str, ...]
    seqio_split: str
    index: int
    count: int
    path: Path
    split: str | None = None
    holds_records: bool = True

    @functools.cached_property
    def content_digest(self) -> tuple[str | None, int]:
        """(sha256 hex, bytes) of the shard's file; (None, 0) where seqio's source reads no file of its name."""
        if not self.path.is_file():
            return None, 0
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()

    def stamp(self) -> tuple[int, int]:
        """(bytes, time of the last change) of the shard's file, as far as it has one."""
        if not self.path.is_file():
            return _UNKNOWN_SIZE, 0
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def documents(self, column: str, progress: Progress = lambda position: None) -> Iterator[Document]:
        """Yields the examples' feature `column`: tokens with their text, or text alone where the feature is text."""
        task = _task(import_seqio(self.modules), self.task)
        tokenizer = None if _is_text(task, column) else task_tokenizer(task, column)
        for number, example in enumerate(self._examples(task, column), start=1):
            progress(0)
            name, value = f"{self.name}:{number}", example[column]
            if tokenizer is None:
                yield Document(name, *decode_utf8(value))
                continue
            tokens = np.asarray(value, np.int32)
            if len(tokens) and tokens[-1] == tokenizer.eos_id:  # every document is given one here
                tokens = tokens[:-1]
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
                raise ConfigError(
                    f"seqio task {self.task!r}, {name}: token {tokens.max()} is beyond its vocabulary of "
                    f"{tokenizer.vocab_size}: preprocessors that add ids of their own are not for language models"
                )
            text = example.get(f"{column}_pretokenized")
            text = decode_utf8(text) if isinstance(text, bytes) else (tokenizer.decode(tokens), 0)
            yield Document(name, *text, tokens=tokens)

    def _examples(self, task: Any, column: str) -> Iterator[dict[str, Any]]:
        seqio = import_seqio(self.modules)
        takes_seed = not isinstance(task.source, seqio.FunctionDataSource) or "seed" in inspect.signature(
            task.source._dataset_fn
        ).parameters
        dataset = task.get_dataset(
            dict.fromkeys(task.output_features, _LONGEST),
            self.seqio_split,
            shuffle=False,
            seed=0 if takes_seed else None,
            shard_info=seqio.ShardInfo(self.index, self.count),
            trim_output_features=False,
            try_in_mem_cache=False,
        )
        return dataset.as_numpy_iterator()


def import_seqio(modules: Sequence[str]) -> ModuleType:
    """seqio, with the tasks of these modules registered. Raises ConfigError if a module cannot be imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it looks for GPUs, and says so
    try:
        seqio = importlib.import_module("seqio")
    except ImportError as error:
        raise ConfigError(
            "seqio tasks need the package seqio, which brings TensorFlow: pip install 'gqe_jax[seqio]', best into an "
            "environment of its own; training on what is prepared there does not need it"
        ) from error
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    for module in (SHIPPED_TASKS, *modules):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there; what it imports is not
            raise ConfigError(
                f"--import={module} cannot be imported: give the name of a Python module in this folder or on "
                "PYTHONPATH, without .py"
            ) from error
    return seqio


def _task(seqio: ModuleType, name: str) -> Any:
    if name not in seqio.TaskRegistry.names():
        known = {*seqio.TaskRegistry.names()}
        raise ConfigError(
            f"--seqio-task={name!r} is not registered ({nearest(name, known)}): check the name, or name the module "
            "that registers it with --import"
        )
    return seqio.TaskRegistry.get(name)


def task_corpus(name: str, modules: Sequence[str], feature: str = DEFAULT_FEATURE) -> Corpus:
    """Returns the task's training split as a corpus, with its validation split held out if it has one.

    Raises ConfigError for a task that is not registered, has no training split, or lacks the feature.
    """
    seqio = import_seqio(modules)
    task = _task(seqio, name)
    if feature not in task.output_features:
        raise ConfigError(
            f"seqio task {name!r} has no feature {feature!r} ({nearest(feature, task.output_features)}): choose one "
            "with --column"
        )
    if "train" not in task.splits:
        raise ConfigError(f"seqio task {name!r} has no split 'train', only {', '.join(task.splits)}: name it so")
    shards = []
    validated = _HELDOUT_SPLIT in task.splits
    for seqio_split, split in (("train", "train"), (_HELDOUT_SPLIT, "heldout"))[: 1 + validated]:
        files = task.source.list_shards(seqio_split)
        for index, file in enumerate(files):
            shard_name = f"{name}/{seqio_split}-{index:05d}-of-{len(files):05d}"
            place = (seqio_split, index, len(files), Path(file))
            shards.append(SeqioShard(shard_name, name, tuple(modules), *place, split=split if validated else None))
    return Corpus(f"seqio task {name}", tuple(shards), feature)


def task_tokenizer(task: Any, feature: str) -> Tokenizer:
    """Returns the tokenizer that a task's vocabulary is. Raises ConfigError for vocabularies of other kinds."""
    import seqio

    vocabulary = task.output_features[feature].vocabulary
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return SentencePieceTokenizer(vocabulary.sp_model, f"of seqio task {task.name}")
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteTokenizer()
    raise ConfigError(
        f"seqio task {task.name!r} has the vocabulary {type(vocabulary).__name__}, and what can be used in training "
        "and generation is SentencePieceVocabulary and ByteVocabulary: change it, or let the task give text (a feature "
        "of dtype tf.string and rank 0, with PassThroughVocabulary) and tokenise here with --tokenizer"
    )


def _is_text(task: Any, feature: str) -> bool:
    """Says whether the feature is text, to be tokenised here."""
    import tensorflow as tf

    return task.output_features[feature].dtype == tf.string


def corpus_tokenizer(name: str, modules: Sequence[str], feature: str = DEFAULT_FEATURE) -> Tokenizer | None:
    """Returns the tokenizer of a registered task; None if the task gives text."""
    task = _task(import_seqio(modules), name)
    return None if _is_text(task, feature) else task_tokenizer(task, feature)


def mixture_rates(name: str, modules: Sequence[str]) -> dict[str, float]:
    """Returns the mixture's tasks and their rates, which are shares of *examples*. Raises ConfigError for an unknown
    name."""
    seqio = import_seqio(modules)
    if name not in seqio.MixtureRegistry.names():
        known = {*seqio.MixtureRegistry.names()}
        hint = "; it is a task: use --seqio-task" if name in seqio.TaskRegistry.names() else ""
        raise ConfigError(
            f"--seqio-mixture={name!r} is not registered ({nearest(name, known)}{hint}): check the name, or name the "
            "module that registers it with --import"
        )
    mixture = seqio.MixtureRegistry.get(name)
    return {task.name: float(mixture.get_rate(task)) for task in mixture.tasks}
