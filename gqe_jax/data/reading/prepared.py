"""The prepared data that a configuration names, one set or a mixture, checked before the first step."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from etils import epath

from gqe_jax.config import ConfigError, DataConfig, ModelConfig
from gqe_jax.data.manifest import MANIFEST_FILE, FileRecord, Manifest, check_sizes, damaged_files, prepared_tokenizer
from gqe_jax.data.preparing.prepare import cache_directory, default_corpus_dir
from gqe_jax.data.reading.mixture import MixturePart, MixtureSchedule, parse_mixture, quotas, read_mixture
from gqe_jax.data.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class PreparedSet:
    """One prepared folder.

    Attributes:
      name: as the configuration names it, or "default corpus".
      directory: on this machine.
      manifest: of the folder.
      damaged: names of shards that are left out, where the configuration says so.
    """

    name: str
    directory: Path
    manifest: Manifest
    damaged: frozenset[str] = frozenset()

    @property
    def parts(self) -> list[Any]:
        """What decides its rows: the manifest, which holds the hashes of all files, and the shards left out."""
        return [self.manifest.to_json(), sorted(self.damaged)]

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what decides its rows, wherever it lies."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()

    @property
    def train_rows(self) -> int:
        """Rows of an epoch of training."""
        return sum(shard.rows for shard in self.manifest.train.shards if shard.name not in self.damaged)


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """One prepared set, or several with the same tokenizer and length of rows.

    Attributes:
      sets: in the order of the configuration.
      quotas: of any sum(quotas) rows in a row of training, how many each set gives.
      tokenizer: of all sets.
    """

    sets: tuple[PreparedSet, ...]
    quotas: tuple[int, ...]
    tokenizer: Tokenizer

    @property
    def name(self) -> str:
        """The name of the set, or the names of all sets."""
        return ", ".join(data.name for data in self.sets)

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.sets[0].manifest.seq_len

    @property
    def shares(self) -> list[Fraction]:
        """Share of each set in the rows of training."""
        return [Fraction(quota, sum(self.quotas)) for quota in self.quotas]

    @functools.cached_property
    def digest(self) -> str:
        """Hash of what decides the batches: manifests, which hold the hashes of all files, quotas, shards left out."""
        return hashlib.sha256(json.dumps([[data.parts for data in self.sets], self.quotas]).encode()).hexdigest()

    @functools.cached_property
    def schedule(self) -> MixtureSchedule:
        """Whose turn it is at each position of the stream of training rows."""
        return MixtureSchedule(self.quotas)

    def tokens_per_byte(self, split: str) -> float:
        """Targets of the split over bytes of its text: nats per token times this over ln 2 are bits per byte.

        Of a mixture, over the held-out text of all sets, and over training's rows as they are mixed.
        """
        infos = [data.manifest.split(split) for data in self.sets]
        weights = self.shares if split == "train" else [info.tokens for info in infos]
        bytes_per_token = sum(weight * info.bytes / info.tokens for weight, info in zip(weights, infos, strict=True))
        return float(sum(weights) / bytes_per_token)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if the data was made with another tokenizer."""
        self.sets[0].manifest.check_tokenizer(tokenizer)

    def describe(self) -> str:
        """Returns one line for each set, for the log."""
        lines = []
        for data, share in zip(self.sets, self.shares, strict=True):
            split = data.manifest.train
            lines.append(
                f"{data.name} ({split.documents:,} documents, {split.bytes:,} bytes, {split.rows:,} rows of "
                f"{self.seq_len} tokens, tokenizer {data.manifest.tokenizer})"
                + (f", {float(share):.4%} of the rows" if len(self.sets) > 1 else "")
            )
            if data.damaged:
                left = [shard for shard in split.shards if shard.name in data.damaged]
                rows = sum(shard.rows for shard in left)
                lines.append(
                    f"warning: {len(data.damaged)} damaged shard(s) of {data.name} left out, with {rows:,} of the "
                    f"{split.rows:,} training rows: {', '.join(sorted(data.damaged))}"
                )
        return "\n".join(lines)


def open_data(config: DataConfig, model: ModelConfig, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Opens `config.path` or `config.mixture`; neither stands for the default corpus, prepared on first use.

    Args:
      config: what to open.
      model: that reads the rows.
      tokenizer: of a trained model, which the data must have too; None: any will do that fits the vocabulary.

    Raises:
      ConfigError: missing or damaged data, sets that do not fit each other, rows longer than the model's context, ids
        beyond its vocabulary, another tokenizer than `tokenizer`, no held-out text.
    """
    if config.path is None and config.mixture is None:
        directory = default_corpus_dir(load_tokenizer(config.tokenizer), model.context)
        sets, weights = [PreparedSet("default corpus", directory, Manifest.load(directory))], [1]
    else:
        parts = parse_mixture(config.mixture) if config.mixture is not None else _parts(config.path)
        weights = quotas(parts)
        sets = [_open_set(part.path) for part in parts]
    if tokenizer is not None:
        for data in sets:
            data.manifest.check_tokenizer(tokenizer)
    _require_fit(sets, model)
    checked = tuple(_check_files(data, config) for data in sets)
    _refuse_copies(checked)
    return PreparedData(checked, tuple(weights), prepared_tokenizer(checked[0].directory))


def _parts(path: str) -> list[MixturePart]:
    return read_mixture(epath.Path(path)) or [MixturePart(path, Fraction(1))]


def _open_set(path: str) -> PreparedSet:
    if read_mixture(epath.Path(path)) is not None:
        raise ConfigError(
            f"data.mixture names {path!r}, which is a mixture itself: name its sets, or it alone as data.path"
        )
    directory = _local_copy(path) if "://" in path else Path(path)
    return PreparedSet(path, directory, Manifest.load(directory))


def _require_fit(sets: Sequence[PreparedSet], model: ModelConfig) -> None:
    first = sets[0]
    for data in sets:
        manifest = data.manifest
        if manifest.seq_len != first.manifest.seq_len:
            raise ConfigError(
                f"a mixture's rows must have one length, and those of {first.name} have {first.manifest.seq_len} "
                f"tokens, those of {data.name} {manifest.seq_len}: prepare them with the same --seq-len"
            )
        if manifest.tokenizer_digest != first.manifest.tokenizer_digest:
            raise ConfigError(
                f"a mixture's sets must share one tokenizer, and {first.name} was made with {first.manifest.tokenizer} "
                f"(vocab_size={first.manifest.vocab_size}, sha256 {first.manifest.tokenizer_digest[:12]}), {data.name} "
                f"with {manifest.tokenizer} (vocab_size={manifest.vocab_size}, sha256 "
                f"{manifest.tokenizer_digest[:12]}): prepare them with the same --tokenizer"
            )
        manifest.check_vocab_size(model.vocab_size)
        if manifest.seq_len > model.context:
            raise ConfigError(
                f"model.context={model.context} is shorter than the rows of {data.directory}, which have "
                f"{manifest.seq_len} tokens: raise model.context, or prepare the data with --seq-len {model.context}"
            )
        if not manifest.heldout.bytes:
            raise ConfigError(
                f"data.path={str(data.directory)!r} holds no held-out text to evaluate on: prepare it again with "
                f"--heldout above 0"
            )


def _refuse_copies(sets: Sequence[PreparedSet]) -> None:
    names: dict[str, str] = {}
    for data in sets:
        if (other := names.setdefault(data.digest, data.name)) != data.name:
            raise ConfigError(
                f"a mixture's sets must differ, and {other} and {data.name} are copies of the same rows: name one of "
                f"them, with the sum of their weights"
            )


def _check_files(data: PreparedSet, config: DataConfig) -> PreparedSet:
    """Returns the set after checking its files' sizes, and with `config.verify` their hashes."""
    manifest = data.manifest
    check_sizes(data.directory, manifest.files)
    shards = manifest.train.shards + manifest.heldout.shards
    damaged = damaged_files(data.directory, shards, hashes=config.verify)
    if not damaged:
        return data
    problems = "; ".join(damaged.values())
    if not config.skip_damaged:
        raise ConfigError(
            f"prepared data {str(data.directory)!r} is damaged: {problems}. To repair: restore these shards from a "
            "copy, or delete the folder and prepare it again with `gqe prepare`; to go on without them: "
            "--config.data.skip_damaged=true"
        )
    for split in (manifest.train, manifest.heldout):
        if all(shard.name in damaged for shard in split.shards):
            raise ConfigError(
                f"prepared data {str(data.directory)!r} is damaged, with no whole shard left of a split: {problems}. "
                "To repair: restore these shards from a copy, or delete the folder and prepare it again with "
                "`gqe prepare`"
            )
    return dataclasses.replace(data, damaged=frozenset(damaged))


def _local_copy(path: str) -> Path:
    """Returns a prepared folder of a bucket as a copy in the user's cache, made once: rows are read at random."""
    remote = epath.Path(path)
    if not (remote / MANIFEST_FILE).exists():
        raise ConfigError(f"data.path={path!r} holds no {MANIFEST_FILE}, so it is no prepared data set: check the path")
    text = (remote / MANIFEST_FILE).read_text()
    local = cache_directory() / "copies" / hashlib.sha256(text.encode()).hexdigest()[:16]
    local.mkdir(parents=True, exist_ok=True)
    (local / MANIFEST_FILE).write_text(text)
    manifest = Manifest.load(local)
    files = manifest.files + manifest.train.shards + manifest.heldout.shards

    def is_there(file: FileRecord) -> bool:
        copy = local / file.name
        return copy.is_file() and copy.stat().st_size == file.bytes

    missing = sum(file.bytes for file in files if not is_there(file))
    free = shutil.disk_usage(local).free
    if missing > free:
        raise ConfigError(
            f"data.path={path!r}: {missing / 1e9:,.1f} GB of it are to be copied to {cache_directory()}, which has "
            f"{free / 1e9:,.1f} GB left: give the machine a larger disk (DISK_GB of tpu_scripts/pod.env), point "
            f"XDG_CACHE_HOME at one, or prepare less"
        )

    def fetch(file: FileRecord) -> None:
        copy = local / file.name
        if not is_there(file):
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial = copy.with_name(f"{copy.name}.{os.getpid()}")
            (remote / file.name).copy(epath.Path(partial), overwrite=True)
            partial.rename(copy)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(fetch, files))
    return local
