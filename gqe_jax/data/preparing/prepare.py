"""Offline preparation: documents to tokens to ArrayRecord shards of fixed-length rows, with a manifest.

The same corpus, tokenizer and settings give the same bytes, whatever the number of processes. Everything is written to
a work folder beside the target and renamed at the end, so the target exists only when it is complete; after a kill the
next run goes on with what is finished there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

from etils import epath

from gqe_jax.config import ConfigError
from gqe_jax.data.choices import DEFAULT_HELDOUT_FRACTION, DEFAULT_PACKING, LONGEST_ROW, PACKINGS, SPLITS
from gqe_jax.data.manifest import (
    FORMAT_VERSION,
    HELDOUT_FILE,
    MANIFEST_FILE,
    SOURCES_FILE,
    TOKENIZER_DIRECTORY,
    FileRecord,
    Manifest,
    SplitInfo,
    changed_sources,
)
from gqe_jax.data.preparing.deduplicate import is_hashed, mark_duplicates
from gqe_jax.data.preparing.splitting import split_rule
from gqe_jax.data.preparing.units import Job, Settings, UnitResult, plan_units
from gqe_jax.data.preparing.work import run_units, work_folder
from gqe_jax.data.sources.corpus import Corpus, stdlib_corpus
from gqe_jax.data.tokenizer import Tokenizer


def prepare(
    corpus: Corpus,
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    heldout_fraction: float = DEFAULT_HELDOUT_FRACTION,
    packing: str = DEFAULT_PACKING,
    deduplicate: bool = False,
    workers: int = 1,
    show_progress: bool = False,
) -> Manifest:
    """Writes the corpus to the folder `out` as rows of `seq_len` inputs (see `rows` and `manifest`).

    Args:
      out: must not exist, or be empty; in a bucket (gs://), the finished data is made in the user's cache and copied.
      packing: "concat" (one stream, cut) or "best-fit" (no document is cut that fits a row); see `packing`.
      deduplicate: leave out documents whose text came before (see `deduplicate`).
      workers: processes that share the work; they change no byte of it.
      show_progress: a line on stderr.

    Raises ConfigError if `out` is not empty, a setting is out of range, a document cannot be read, or a split comes out
    empty; OSError if the disk is full or `out` cannot be written. In each case `out` is not made; what is finished of a
    larger corpus is kept beside it, and the same call goes on with that.
    """
    if not 1 <= seq_len <= LONGEST_ROW:
        raise ConfigError(
            f"seq_len={seq_len} must be positive and at most {LONGEST_ROW}: choose the input tokens of a row, such as "
            f"512"
        )
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout={heldout_fraction} must lie in [0, 1): choose a fraction such as 0.05")
    if packing not in PACKINGS:
        raise ConfigError(f"packing={packing!r} is unknown: use one of {', '.join(PACKINGS)}")
    if workers < 1:
        raise ConfigError(f"workers={workers} must be positive: choose a number of processes, or leave it out")
    target = epath.Path(out)
    _refuse_used(target, corpus)
    settings = Settings(seq_len, heldout_fraction, split_rule(corpus, heldout_fraction), packing, deduplicate)
    if "://" not in str(out):
        real = Path(os.path.realpath(out))  # a link keeps leading where it leads
        return _prepare_locally(corpus, real, tokenizer, settings, workers, show_progress)
    local = cache_directory() / "uploads" / hashlib.sha256(str(out).encode()).hexdigest()[:16]
    if not (local / MANIFEST_FILE).is_file():
        _prepare_locally(corpus, local, tokenizer, settings, workers, show_progress)
    for path in sorted(local.rglob("*"), key=lambda path: path.name == MANIFEST_FILE):  # the manifest: it is complete
        if path.is_file():
            copy = target / path.relative_to(local).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(path).copy(copy, overwrite=True)
    manifest = Manifest.load(local)
    shutil.rmtree(local)
    return manifest


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/gqe_jax`, else `~/.cache/gqe_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gqe_jax"


def _refuse_used(out: epath.Path, corpus: Corpus) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    changed = ""
    if (out / MANIFEST_FILE).exists():
        names = changed_sources(out, corpus)
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        changed = f"; sources that changed since it was prepared: {shown or 'none'}"
    raise ConfigError(f"out={str(out)!r} exists and is not empty: choose another folder, or delete it first{changed}")


def _prepare_locally(
    corpus: Corpus, out: Path, tokenizer: Tokenizer, settings: Settings, workers: int, show_progress: bool
) -> Manifest:
    out.parent.mkdir(parents=True, exist_ok=True)
    stamps = {file.name: file.stamp() for file in corpus.files}
    units = tuple(plan_units(corpus))
    plan = {
        "units": len(units),
        "format_version": FORMAT_VERSION,
        "settings": dataclasses.asdict(settings) | {"column": corpus.column},
        "tokenizer": tokenizer.digest,
        "sources": {name: list(stamp) for name, stamp in stamps.items()},
    }
    with work_folder(out, plan) as folder:
        job = Job(units, corpus.column, stamps, folder, tokenizer, settings)
        numbers = range(len(units))
        if settings.deduplicate:
            pending = [number for number in numbers if not is_hashed(folder, number)]
            run_units(job, "hash_unit", pending, workers, "comparing" if show_progress else None)
            mark_duplicates(folder, len(units))
        pending = [number for number in numbers if not job.finished(number)]
        run_units(job, "write_unit", pending, workers, "preparing" if show_progress else None)
        finished = _join(job, corpus)
        try:
            finished.rename(out)
        except OSError:
            _refuse_used(epath.Path(out), corpus)  # another process was quicker
            raise
    return Manifest.load(out)


def _join(job: Job, corpus: Corpus) -> Path:
    """Returns the finished units as one data set, in a folder of the work folder; the units are used up by it."""
    folders = [job.unit_folder(number) for number in range(len(job.units))]
    results = [UnitResult.load(folder) for folder in folders]
    finished = job.folder / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    splits = {split: _sum(results, split) for split in SPLITS}
    _require_text(corpus, splits, job.settings.heldout_fraction)
    (finished / TOKENIZER_DIRECTORY).mkdir(parents=True)
    names = [SOURCES_FILE, HELDOUT_FILE]
    for name, content in sorted(job.tokenizer.files().items()):
        names.append(f"{TOKENIZER_DIRECTORY}/{name}")
        (finished / names[-1]).write_bytes(content)
    for name in (SOURCES_FILE, HELDOUT_FILE):
        with (finished / name).open("wb") as joined:
            for folder in folders:
                with (folder / name).open("rb") as file:
                    shutil.copyfileobj(file, joined)
    with (finished / SOURCES_FILE).open() as sources:
        source_bytes = sum(json.loads(line)["bytes"] for line in sources)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=corpus.description,
        source_files=len(corpus.files),
        source_bytes=source_bytes,
        heldout_fraction=job.settings.heldout_fraction,
        split_rule=job.settings.rule,
        packing=job.settings.packing,
        replaced=sum(result.replaced for result in results),
        empty_documents=sum(result.empty_documents for result in results),
        deduplicated=job.settings.deduplicate,
        duplicates=sum(result.duplicates for result in results),
        tokenizer=job.tokenizer.name,
        tokenizer_digest=job.tokenizer.digest,
        vocab_size=job.tokenizer.vocab_size,
        eos_id=job.tokenizer.eos_id,
        pad_id=job.tokenizer.pad_id,
        seq_len=job.settings.seq_len,
        train=splits["train"],
        heldout=splits["heldout"],
        files=tuple(FileRecord.of(finished, name) for name in names),
    )
    (finished / MANIFEST_FILE).write_text(manifest.to_json(), "utf-8", newline="\n")
    for split in SPLITS:
        shards = [folder / shard.name for folder, result in zip(folders, results, strict=True)
                  for shard in result.splits[split].shards]  # fmt: skip
        for path, shard in zip(shards, splits[split].shards, strict=True):
            path.rename(finished / shard.name)
    return finished


def _sum(results: list[UnitResult], split: str) -> SplitInfo:
    parts = [result.splits[split] for result in results]
    shards = [shard for part in parts for shard in part.shards]
    count = len(shards)
    named = tuple(
        dataclasses.replace(shard, name=f"{split}-{i:05d}-of-{count:05d}.arrayrecord") for i, shard in enumerate(shards)
    )
    totals = {name: sum(getattr(part, name) for part in parts) for name in ("documents", "bytes", "words", "tokens")}
    return SplitInfo(**totals, rows=sum(part.rows for part in parts), shards=named)


def _require_text(corpus: Corpus, splits: dict[str, SplitInfo], heldout_fraction: float) -> None:
    train, heldout = splits["train"], splits["heldout"]
    if not train.rows and not heldout.rows:
        raise ConfigError(
            f"the corpus ({corpus.description}, the first {corpus.files[0].path}) holds no text, only empty documents: "
            "check the path and, for JSON lines, --column"
        )
    if not train.rows or (heldout_fraction > 0 and not heldout.rows):
        empty, full = ("train", heldout) if not train.rows else ("held-out", train)
        raise ConfigError(
            f"heldout={heldout_fraction} leaves the {empty} split empty (the corpus has {full.documents} documents "
            "with text): change --heldout, or give more documents"
        )


def default_corpus_dir(tokenizer: Tokenizer, seq_len: int) -> Path:
    """Returns the prepared default corpus, made on first use in the user's cache (see `cache_directory`).

    The folder's name is a digest of the sources, the tokenizer and the settings. Safe for processes that start at once.
    """
    corpus = stdlib_corpus()
    settings = [FORMAT_VERSION, DEFAULT_HELDOUT_FRACTION, DEFAULT_PACKING, tokenizer.digest, seq_len]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for file in corpus.files:
        digest.update(json.dumps([file.name, *file.content_digest]).encode())
    out = cache_directory() / f"stdlib-{digest.hexdigest()[:16]}"
    if not (out / MANIFEST_FILE).is_file():
        try:
            prepare(corpus, out, tokenizer=tokenizer, seq_len=seq_len)
        except ConfigError:
            if not (out / MANIFEST_FILE).is_file():  # else another process made it meanwhile
                raise
    return out
