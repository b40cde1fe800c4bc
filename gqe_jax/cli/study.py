"""`gqe study`."""

import argparse
import shlex
import sys
from typing import Any

from gqe_jax.config import ConfigError

EPILOG = """examples:
  gqe study run table2:laptop --out studies/table2 -j 2
  gqe study table table2:laptop --out studies/table2
  gqe study plot table2:laptop --out studies/table2
  gqe study run table2:paper --out studies/paper --dry-run --topology v5e:16x16 --config.data.path=DIR

FILE is a study file (docs/studies.md) or the name of one that comes with gqe_jax."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `gqe study`."""
    parser.epilog = EPILOG
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    _add_run(what.add_parser("run", help="train every cell that is not finished"))
    _add_table(what.add_parser("table", help="losses with intervals, paired by seed against the reference"))
    _add_plot(what.add_parser("plot", help="losses against tokens, differences, load of the experts"))


def run(args: argparse.Namespace) -> int:
    """Runs a part of a study, or tells what came of it; returns the exit code."""
    return args.act(args)


def _add_study(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, metavar="FILE", help="study file, or the name of one, as table2:laptop")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the study's cells")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="these and the reference alone (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="these alone (default: all)")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(act=_run)
    _add_study(parser, "config")  # the name makes --config.a.b=value go to all cells
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="cells at a time (default: 1)")
    parser.add_argument("--distributed", action="store_true", help="on each machine of a pod, as gqe train's; -j is 1")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and train nothing")
    parser.add_argument("--topology", metavar="NAME", help="with --dry-run: the time on this slice, as v5e:4x4")


def _run(args: argparse.Namespace) -> int:
    from etils import epath

    from gqe_jax.study import running
    from gqe_jax.study.definition import cells, read_study

    if args.jobs < 1:
        raise ConfigError(f"--jobs={args.jobs} must be at least 1: raise it")
    if args.distributed and args.jobs > 1:
        raise ConfigError(f"--jobs={args.jobs}: with --distributed a cell takes all machines: leave --jobs out")
    if args.topology and not args.dry_run:
        raise ConfigError(f"--topology={args.topology} only says what a slice would take: add --dry-run")
    study, out = read_study(args.config).part(args.arms, args.seeds), epath.Path(args.out)
    planned = cells(study, args.overrides)
    if args.dry_run:
        for command in running.commands(planned, out, distributed=args.distributed):
            print(shlex.join(command))
        if args.topology:
            from gqe_jax.study.estimate import estimate

            print("\n" + estimate(planned, args.topology))
        return 0
    failures = running.run_study(study, planned, out, jobs=args.jobs, distributed=args.distributed)
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    if not failures:
        table = shlex.join(["gqe", "study", "table", args.config, "--out", args.out])
        print(f"all {len(planned)} cells are done: {table}")
    return 1 if failures else 0


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(act=_table)
    _add_study(parser, "study")


def _table(args: argparse.Namespace) -> int:
    from gqe_jax.study.table import write_tables

    print(write_tables(*_finished(args)))
    return 0


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(act=_plot)
    _add_study(parser, "study")


def _plot(args: argparse.Namespace) -> int:
    from gqe_jax.study.plot import write_plots

    for path in write_plots(*_finished(args)):
        print(f"wrote {path}")
    return 0


def _finished(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Returns the study, its finished cells, and its folder."""
    from etils import epath

    from gqe_jax.study.definition import read_study
    from gqe_jax.study.table import finished_cells

    study, out = read_study(args.study).part(args.arms, args.seeds), epath.Path(args.out)
    return study, finished_cells(study, out), out
