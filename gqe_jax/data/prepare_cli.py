"""`gqe prepare`: text to rows that `gqe train` reads."""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from pathlib import Path

from gqe_jax.data.corpus import Corpus, files_corpus, stdlib_corpus
from gqe_jax.data.manifest import Manifest
from gqe_jax.data.prepare import DEFAULT_HELDOUT_FRACTION, prepare, split_document, split_rule
from gqe_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

DESCRIPTION = "Turn text into tokenised rows of fixed length, split into training and held-out documents."

EPILOG = """example, with the text of Python's own standard library:
  gqe prepare --out data/stdlib --seq-len 256

and with files of your own:
  gqe prepare --data 'books/**/*.txt' --out data/books
  gqe prepare --data corpus.jsonl --field text --tokenizer spm.model --seq-len 2048 --out data/corpus
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe prepare`, its description and its examples."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text or .jsonl files, or patterns such as 'path/**/*.txt' (quoted); "
        "default: the text of the running Python's standard library",
    )
    parser.add_argument("--field", default="text", help="the field of JSON lines that holds the text (default: text)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make; must not exist, or be empty")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="'bytes' (default), a SentencePiece .model or a Hugging Face tokenizer.json",
    )
    tokenizer.add_argument(
        "--train-sentencepiece",
        type=int,
        metavar="VOCAB_SIZE",
        help="train a SentencePiece tokenizer of this size on the training documents, and use it",
    )
    parser.add_argument(
        "--seq-len", type=int, default=512, metavar="S", help="tokens of a row: the model's context (default: 512)"
    )
    parser.add_argument(
        "--heldout",
        type=float,
        default=DEFAULT_HELDOUT_FRACTION,
        metavar="FRACTION",
        help="share of the documents that is held out; of a few text files, the end of each (default: 0.05)",
    )


def run(args: argparse.Namespace) -> int:
    """Prepares the data and says what was done; returns the exit code 0.

    Raises ConfigError for unusable input, OSError for a disk that is full or cannot be written; nothing is left then.
    """
    began = time.monotonic()
    corpus = files_corpus(args.data, args.field) if args.data else stdlib_corpus()
    if args.train_sentencepiece is None:
        tokenizer = load_tokenizer(args.tokenizer or "bytes")
    else:
        tokenizer = _train_tokenizer(corpus, args.train_sentencepiece, args.heldout)
    manifest = prepare(corpus, args.out, tokenizer=tokenizer, seq_len=args.seq_len, heldout_fraction=args.heldout)
    print(report(manifest, args.out, time.monotonic() - began))
    return 0


def _train_tokenizer(corpus: Corpus, vocab_size: int, heldout_fraction: float) -> Tokenizer:
    rule = split_rule(corpus, heldout_fraction)
    parts = (split_document(document, rule, heldout_fraction) for document in corpus.documents())
    with tempfile.TemporaryDirectory() as folder:
        return train_sentencepiece(
            (part["train"].text for part in parts if "train" in part), vocab_size, Path(folder) / "sentencepiece.model"
        )


def report(manifest: Manifest, out: str | Path, seconds: float) -> str:
    """What was prepared, for people, and what to type next."""
    files = f"{manifest.source_files:,} file{'s' * (manifest.source_files != 1)}"
    lines = [
        f"{manifest.source}: {manifest.source_bytes:,} bytes in {files}, prepared in {seconds:.1f} s",
        f"tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size:,}; rows of {manifest.seq_len:,} tokens",
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
    lines.append(f"invalid UTF-8 sequences replaced by U+FFFD: {manifest.replaced:,}")
    lines.append(f"written to {out}; train on it with")
    model = f"--config.model.context={manifest.seq_len} --config.model.vocab_size={manifest.vocab_size}"
    run = shlex.quote(f"runs/{Path(out).name}")
    lines.append(f"  gqe train --config smoke --run {run} --config.data.path={shlex.quote(str(out))} {model}")
    return "\n".join(lines)
