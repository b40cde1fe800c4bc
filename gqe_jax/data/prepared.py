"""The prepared data that a configuration names, checked against the model that is to read it."""

import dataclasses
import functools
import hashlib
from pathlib import Path

from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.manifest import Manifest, check_sizes, prepared_tokenizer
from gqe_jax.data.prepare import default_corpus_dir
from gqe_jax.data.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared directory with its manifest and its tokenizer."""

    directory: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @functools.cached_property
    def digest(self) -> str:
        """Of the manifest, which holds those of all files."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()

    def tokens_per_byte(self, split: str) -> float:
        """Targets of the split over bytes of its text: nats per token times this over ln 2 are bits per byte."""
        info = self.manifest.split(split)
        return info.tokens / info.bytes


def open_data(config: DataConfig, model: ModelConfig) -> PreparedData:
    """Opens `config.path`; None stands for the default corpus, prepared on first use.

    Raises:
      ConfigError: missing or damaged data, rows longer than the model's context, ids beyond its vocabulary,
        no held-out text.
    """
    if config.path is None:
        directory = default_corpus_dir(load_tokenizer(config.tokenizer), model.context)
    else:
        directory = Path(config.path)
    manifest = Manifest.load(directory)
    manifest.check_vocab_size(model.vocab_size)
    if manifest.seq_len > model.context:
        raise ConfigError(
            f"model.context={model.context} is shorter than the rows of {directory}, which have {manifest.seq_len} "
            f"tokens: raise model.context, or prepare the data with --seq-len {model.context}"
        )
    if not manifest.heldout.bytes:
        raise ConfigError(
            f"data.path={str(directory)!r} holds no held-out text to evaluate on: prepare it again with "
            f"--heldout above 0"
        )
    check_sizes(directory, manifest.files + manifest.train.shards + manifest.heldout.shards)
    return PreparedData(directory, manifest, prepared_tokenizer(directory))
