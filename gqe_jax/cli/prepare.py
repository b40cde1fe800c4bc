"""`gqe prepare`."""

import argparse
import os

from gqe_jax.data.choices import DEFAULT_HELDOUT_FRACTION, DEFAULT_PACKING, PACKINGS

DESCRIPTION = "Turn text into tokenised rows of fixed length, split into training and held-out documents."

EPILOG = """example, with the text of Python's own standard library:
  gqe prepare --out data/stdlib --seq-len 256

and with files of your own:
  gqe prepare --data 'books/**/*.txt' --out data/books
  gqe prepare --data 'corpus/*.parquet' --column text --tokenizer spm.model --seq-len 2048 --out data/corpus

and with seqio, in an environment that has it:
  gqe prepare --seqio-task fineweb_edu --tokenizer tokenizer.json --seq-len 2048 --out data/fineweb_edu
  gqe prepare --import my_tasks --seqio-mixture my_mixture --out data/my_mixture
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe prepare`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text, JSON lines (.jsonl), both also .gz and .zst, Parquet, by path or pattern such as 'path/**/*.txt' "
        "(quoted), or the folder of a Hugging Face dataset; default: the text of Python's own standard library",
    )
    source.add_argument("--seqio-task", metavar="NAME", help="a registered task; its training and validation splits")
    source.add_argument(
        "--seqio-mixture", metavar="NAME", help="a registered mixture: its tasks, one folder each, mixed at its rates"
    )
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="a Python module that registers seqio tasks",
    )
    parser.add_argument(
        "--column", help="of JSON lines, Parquet and datasets (default: text), or a task's feature (default: targets)"
    )
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
    parser.add_argument(
        "--packing",
        choices=PACKINGS,
        default=DEFAULT_PACKING,
        help="of documents into rows: one stream that is cut into rows without padding (concat, the default), or no "
        "document cut that fits a row (best-fit)",
    )
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="leave out documents whose text came before; reads the sources twice",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)"
    )


def run(args: argparse.Namespace) -> int:
    """Prepares the data and says what was done; returns the exit code 0. Raises as `run_prepare`."""
    from gqe_jax.cli.preparing import run_prepare

    return run_prepare(args)
