"""What `gqe prepare` does: text to rows that `gqe train` reads."""

from __future__ import annotations

import argparse
import re
import shlex
import tempfile
import time
from pathlib import Path

from gqe_jax.config import ConfigError
from gqe_jax.data.manifest import MANIFEST_FILE, Manifest, copied_sources, verify
from gqe_jax.data.preparing.prepare import prepare
from gqe_jax.data.preparing.splitting import split_document, split_rule
from gqe_jax.data.reading.mixture import MIXTURE_FILE, MixturePart, rounded_shares, write_mixture
from gqe_jax.data.sources.corpus import Corpus, files_corpus, stdlib_corpus
from gqe_jax.data.sources.seqio_source import DEFAULT_FEATURE, corpus_tokenizer, mixture_rates, task_corpus
from gqe_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece


def run_prepare(args: argparse.Namespace) -> int:
    """Prepares the data and says what was done; returns the exit code 0.

    Raises ConfigError for unusable input, OSError for a disk that is full or cannot be written (see `prepare`).
    """
    if args.seqio_mixture is not None:
        return _run_mixture(args)
    began = time.monotonic()
    if args.seqio_task is not None:
        feature = args.column or DEFAULT_FEATURE
        corpus = task_corpus(args.seqio_task, args.modules, feature)
        tokenizer = corpus_tokenizer(args.seqio_task, args.modules, feature)
    else:
        corpus = files_corpus(args.data, args.column or "text") if args.data else stdlib_corpus()
        tokenizer = None
    tokenizer = _choose_tokenizer(args, corpus, tokenizer)
    manifest = _prepare(args, corpus, args.out, tokenizer)
    print(report(manifest, args.out, time.monotonic() - began))
    if not args.deduplicate and "://" not in args.out and (copies := copied_sources(args.out)):
        print(
            f"warning: {copies:,} files have the bytes of another one, and may be held out where it is trained on: "
            f"--deduplicate leaves them out"
        )
    print(next_command(manifest, args.out))
    return 0


def _run_mixture(args: argparse.Namespace) -> int:
    """Prepares the tasks of a mixture, each in a folder of `--out`, and writes the weights that mix them at its rates.

    seqio's rates are shares of examples and ours shares of rows, so each is multiplied by the task's rows per example.
    """
    feature, out = args.column or DEFAULT_FEATURE, Path(args.out)
    rates = mixture_rates(args.seqio_mixture, args.modules)
    if (out / MIXTURE_FILE).exists():
        raise ConfigError(f"out={str(out)!r} exists and is not empty: choose another folder, or delete it first")
    manifests = {}
    for name in rates:
        began = time.monotonic()
        corpus = task_corpus(name, args.modules, feature)
        tokenizer = _choose_tokenizer(args, corpus, corpus_tokenizer(name, args.modules, feature))
        folder = out / _folder_name(name)
        if (folder / MANIFEST_FILE).exists():  # finished by a run that was stopped in a later task
            manifests[name] = verify(folder)
            manifests[name].check_tokenizer(tokenizer)
        else:
            manifests[name] = _prepare(args, corpus, folder, tokenizer)
        print(report(manifests[name], folder, time.monotonic() - began))
    rows = [rate * _rows_per_example(manifests[name]) for name, rate in rates.items()]
    parts = [MixturePart(_folder_name(name), weight) for name, weight in zip(rates, rounded_shares(rows), strict=True)]
    write_mixture(out, args.seqio_mixture, parts)
    print(f"\nmixture {args.seqio_mixture}, at seqio's rates of examples:")
    for (name, rate), part in zip(rates.items(), parts, strict=True):
        print(f"  {name:30} {rate / sum(rates.values()):8.4%} of the examples, {float(part.weight):8.4%} of the rows")
    print(next_command(min(manifests.values(), key=lambda manifest: manifest.heldout.bytes), out))
    return 0


def _rows_per_example(manifest: Manifest) -> float:
    """Rows that one example of the task became on average, examples without text included."""
    documents = manifest.train.documents + manifest.heldout.documents
    return (manifest.train.rows + manifest.heldout.rows) / (documents + manifest.empty_documents + manifest.duplicates)


def _folder_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task)


def _choose_tokenizer(args: argparse.Namespace, corpus: Corpus, given: Tokenizer | None) -> Tokenizer:
    """Chooses the tokenizer; `given` is the source's own, or None."""
    if given is not None:
        if args.tokenizer is not None or args.train_sentencepiece is not None:
            raise ConfigError(
                f"{corpus.description} has a vocabulary of its own ({given.name}): leave out --tokenizer and "
                "--train-sentencepiece"
            )
        return given
    if args.train_sentencepiece is None:
        return load_tokenizer(args.tokenizer or "bytes")
    return _train_tokenizer(corpus, args.train_sentencepiece, args.heldout)


def _prepare(args: argparse.Namespace, corpus: Corpus, out: str | Path, tokenizer: Tokenizer) -> Manifest:
    return prepare(
        corpus,
        out,
        tokenizer=tokenizer,
        seq_len=args.seq_len,
        heldout_fraction=args.heldout,
        packing=args.packing,
        deduplicate=args.deduplicate,
        workers=args.workers,
        show_progress=True,
    )


def _train_tokenizer(corpus: Corpus, vocab_size: int, heldout_fraction: float) -> Tokenizer:
    rule = split_rule(corpus, heldout_fraction)
    parts = (
        split_document(document, rule, heldout_fraction, file.split)
        for file in corpus.files
        for document in file.documents(corpus.column)
    )
    with tempfile.TemporaryDirectory() as folder:
        return train_sentencepiece(
            (part["train"].text for part in parts if "train" in part), vocab_size, Path(folder) / "sentencepiece.model"
        )


def report(manifest: Manifest, out: str | Path, seconds: float) -> str:
    """Returns what was prepared, for people."""
    files = f"{manifest.source_files:,} file{'s' * (manifest.source_files != 1)}"
    size = f"{manifest.source_bytes:,} bytes in {files}, " if manifest.source_bytes else ""
    lines = [
        f"{manifest.source}: {size}prepared in {seconds:.1f} s",
        f"tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size:,}; rows of {manifest.seq_len:,} tokens, "
        f"packed by {manifest.packing}: {manifest.padding('train'):.2%} of the training rows is padding",
        f"{'':8}  {'documents':>11}  {'bytes':>15}  {'tokens':>15}  {'rows':>11}  {'bytes/token':>11}",
    ]
    for name, split in (("train", manifest.train), ("held-out", manifest.heldout)):
        ratio = f"{split.bytes / split.tokens:.3f}" if split.tokens else "-"
        lines.append(
            f"{name:8}  {split.documents:>11,}  {split.bytes:>15,}  {split.tokens:>15,}  {split.rows:>11,}  {ratio:>11}"
        )
    if manifest.split_rule == "tail":
        lines.append("few files: the end of every file is held out, rather than whole files")
    if manifest.empty_documents:
        lines.append(f"documents without text, left out: {manifest.empty_documents:,}")
    if manifest.deduplicated:
        lines.append(f"documents whose text came before, left out: {manifest.duplicates:,}")
    lines.append(f"invalid UTF-8 sequences replaced by U+FFFD: {manifest.replaced:,}")
    lines.append(f"written to {out}")
    return "\n".join(lines)


def next_command(manifest: Manifest, out: str | Path) -> str:
    """Returns what to type next; of a mixture, `manifest` is that of the set with the least held-out text."""
    if not manifest.heldout.bytes:
        return "to train on it, held-out text is needed: prepare it again with --heldout above 0, such as 0.05"
    model = f"--config.model.context={manifest.seq_len} --config.model.vocab_size={manifest.vocab_size}"
    run = shlex.quote(f"runs/{Path(out).name}")
    command = f"gqe train --config smoke --run {run} --config.data.path={shlex.quote(str(out))} {model}"
    return f"train on it with\n  {command}"
