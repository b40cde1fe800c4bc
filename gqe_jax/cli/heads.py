"""`gqe heads`."""

import argparse
import sys
from pathlib import Path

from gqe_jax.config import ConfigError

EPILOG = """examples:
  gqe heads --runs runs/h16g8_* runs/h8g2_* --target 2.6 --context 8192 131072
  gqe heads --runs runs/h* --target 2.6 --context 131072 --gqe 16,8,1 --save curves.json --plot heads.png
  gqe heads --constants curves.json --target 2.5 --context 2048

Each choice of heads needs finished runs of at least four sizes, on the same data (docs/studies.md)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe heads`."""
    parser.epilog = EPILOG
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--runs", nargs="+", metavar="DIR", help="finished runs to fit loss against size to")
    source.add_argument("--constants", metavar="FILE", help="or the curves that --save wrote")
    parser.add_argument("--target", type=float, required=True, metavar="LOSS", help="held-out nats per token to reach")
    parser.add_argument("--context", type=int, nargs="+", required=True, metavar="T", help="tokens; several: one each")
    parser.add_argument("--gqe", metavar="N,G,K", help="GQE of N query experts, G KV heads, top_k K beside its rivals")
    parser.add_argument("--save", metavar="FILE", help="write the curves as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw curves and costs (extra `viz`)")


def run(args: argparse.Namespace) -> int:
    """Fits, searches and prints; returns the exit code 0.

    Raises:
      ConfigError: runs that cannot be fitted, or a loss that no size reaches.
    """
    from gqe_jax.study import heads

    if not 0 < args.target < 100:
        raise ConfigError(f"--target={args.target} is no loss in nats: give one above 0")
    for context in args.context:
        if context < 1:
            raise ConfigError(f"--context={context} must be at least 1 token: raise it")
    routed = None if args.gqe is None else _routed(args.gqe)
    curves = heads.fit_runs(args.runs) if args.runs else heads.read_constants(args.constants)
    searches = {context: heads.recommend(curves, args.target, context) for context in args.context}
    text = [heads.report_curves(curves)]
    for context, ranked in searches.items():
        text.append(heads.report_search(ranked, args.target, context, curves.head_dim, curves.vocab_size))
        if routed is not None:
            text.append(heads.report_rivals(heads.compare_gqe(curves, routed, args.target, context), context))
    if args.plot is not None:
        heads.write_png(curves, searches, args.plot)
    if args.save is not None:
        Path(args.save).write_text(heads.constants(curves))
    print("\n\n".join(text))
    for path in filter(None, (args.save, args.plot)):
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _routed(text: str) -> tuple[int, int, int]:
    numbers = [int(part) for part in text.split(",") if part.isascii() and part.isdigit()]
    if len(numbers) != 3 or not all(numbers) or text.count(",") != 2:
        raise ConfigError(f"--gqe={text!r} must be query experts, KV heads and top_k, as in --gqe 16,8,1")
    return numbers[0], numbers[1], numbers[2]
