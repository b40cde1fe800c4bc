"""`gqe inspect`."""

import argparse
import sys

from gqe_jax.cli.options import add_config
from gqe_jax.data.choices import SPLITS

EPILOG = """examples:
  gqe inspect data data/mine
  gqe inspect run --run runs/smoke
  gqe inspect kernels --config gqe_250m:head_dim=128"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe inspect`."""
    parser.epilog = EPILOG
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_run(what.add_parser("run", help="configuration, loss curve and expert load of a run"))
    _add_data(what.add_parser("data", help="manifest, rows and lengths of prepared data"))
    _add_kernels(what.add_parser("kernels", help="which attention kernel each platform takes, and why"))


def run(args: argparse.Namespace) -> int:
    """Prints what was asked for; returns the exit code."""
    return args.look(args)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(look=_run)
    parser.add_argument("--run", required=True, metavar="DIR", help="directory of the run")
    parser.add_argument("--png", metavar="FILE", help="also draw loss and expert load (extra `viz`)")


def _run(args: argparse.Namespace) -> int:
    from gqe_jax.evaluate.run_report import report, write_png
    from gqe_jax.runs.record import read_run

    record = read_run(args.run)
    if args.png is not None:
        write_png(record, args.png)
    print(report(record))
    if args.png is not None:
        print(f"wrote {args.png}", file=sys.stderr)
    return 0


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(look=_data)
    parser.add_argument("directory", metavar="DIR", help="folder that `gqe prepare` wrote, of a set or of a mixture")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose rows are shown (default: train)")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="how many rows are shown (default: 2)")
    parser.add_argument("--png", metavar="FILE", help="also draw the histogram of lengths (extra `viz`)")


def _data(args: argparse.Namespace) -> int:
    from gqe_jax.evaluate import data_report

    data_report.print_report(args.directory, split=args.split, rows=args.rows, png=args.png)
    return 0


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(look=_kernels)
    add_config(parser, purpose="configuration whose layers are looked at", required=False, default="gqe_250m")


def _kernels(args: argparse.Namespace) -> int:
    from gqe_jax.config_files import load_config
    from gqe_jax.evaluate import kernel_report

    print(kernel_report.report(load_config(args.config, args.overrides)))
    return 0
