"""`gqe bench`."""

import argparse
import os

from gqe_jax.tpu import GENERATIONS

EPILOG = """examples:
  gqe bench data
  gqe bench attention
  gqe bench attention --target v6e"""

EPILOG_OF_ATTENTION = """examples:
  gqe bench attention --seq-len 4096 --heads 8 --repeats 3
  gqe bench attention --target v6e --csv v6e.csv --plot v6e.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe bench`."""
    parser.epilog = EPILOG
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_attention(what.add_parser("attention", help="attention and whole layers beside their rivals"))
    _add_data(what.add_parser("data", help="preparing text, reading rows, waiting for them"))


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit code."""
    return args.measure(args)


def _add_attention(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(measure=_attention)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG_OF_ATTENTION
    parser.add_argument("--target", metavar="TPU", help=f"compare for a TPU that is not here: {', '.join(GENERATIONS)}")
    parser.add_argument("--seq-len", type=int, nargs="+", metavar="S", help="default: from 2048 up; on a CPU 4096 8192")
    parser.add_argument("--head-dim", type=int, metavar="D", help="default: 128; on a CPU always 64")
    parser.add_argument("--heads", type=int, nargs="+", metavar="N", help="on a CPU (default: 8 16); elsewhere 16")
    parser.add_argument("--repeats", type=int, default=7, metavar="R", help="rounds per comparison (default: 7)")
    parser.add_argument("--csv", metavar="FILE", help="write every row of the tables to this file too")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up against context length (not on a CPU)")


def _attention(args: argparse.Namespace) -> int:
    from gqe_jax.bench import attention

    attention.run(
        target=args.target,
        seq_lens=args.seq_len,
        head_dim=args.head_dim,
        heads=args.heads,
        repeats=args.repeats,
        csv_file=args.csv,
        plot_file=args.plot,
    )
    return 0


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(measure=_data)
    parser.add_argument("--megabytes", type=float, default=200, metavar="MB", help="text to prepare (default: 200)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="beside bytes (default: a SentencePiece model of 8000 pieces, trained here)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: cores)")


def _data(args: argparse.Namespace) -> int:
    from gqe_jax.bench import data

    data.run(megabytes=args.megabytes, tokenizer=args.tokenizer, workers=args.workers)
    return 0
